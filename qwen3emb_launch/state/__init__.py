"""Instances on disk: one private folder each, written by its supervisor alone, readable by every other command.

    instances/<name>/            0700
        lock                     held with flock by the supervisor for as long as it lives
        plan.json                what was decided
        instance.json            what is the case now (InstanceRecord)
        events.jsonl             every transition, oldest first
        engine.yaml              the engine's keys, 0600; there only while an engine runs
        temporary                there where it lives for one run of another command (passing.py)
        logs/                    one file a start, and the supervisor's own when detached

A record counts only while the process it names lives: pid and start time must both agree, since pids are used again,
also after a reboot. A record that cannot be read is no error: the instance is shown as failed, with a warning.
"""

from __future__ import annotations

from qwen3emb_launch.state.claim import Claim, adopt, claim, lock_holder, write_private
from qwen3emb_launch.state.records import (
    Instance,
    InstanceRecord,
    ProcessId,
    UnitRecord,
    check_name,
    find,
    identify,
    instances,
    lasting,
    load,
    running,
)

__all__ = [
    "Claim",
    "Instance",
    "InstanceRecord",
    "ProcessId",
    "UnitRecord",
    "adopt",
    "check_name",
    "claim",
    "find",
    "identify",
    "instances",
    "lasting",
    "load",
    "lock_holder",
    "running",
    "write_private",
]
