"""The scheduler's idle and reporting work, done at a rate that a person can read instead of once a loop turn.

An idle scheduler checks every memory pool and publishes its load on every turn of its loop, and a request that comes
meanwhile waits for it. The load snapshot is also written before each batch's answers go out.
"""

from __future__ import annotations

import time
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import misfit

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
IDLE_EVERY = 0.05  # seconds between two rounds of idle housekeeping
SNAPSHOT_EVERY = 0.02  # seconds between two load snapshots under load


def idle() -> str | None:
    """A round of idle housekeeping after a batch, then every IDLE_EVERY seconds; sleep on idle stays as it is."""
    from sglang.srt.managers.scheduler import Scheduler

    problem = (
        misfit(Scheduler.on_idle, "self", "self.maybe_sleep_on_idle()")
        or misfit(Scheduler.maybe_sleep_on_idle, "self")
        or misfit(Scheduler.run_batch, None, "self.forward_ct += 1")
    )
    if problem:
        return problem
    last, batches = float("-inf"), -1

    def on_idle(original: Any, self: Any) -> None:
        nonlocal last, batches
        if self.forward_ct != batches or time.monotonic() - last >= IDLE_EVERY:
            batches = self.forward_ct
            original(self)
            last = time.monotonic()
        elif self.is_fully_idle():
            self.maybe_sleep_on_idle()

    HookRegistry.register(f"{SCHEDULER}.on_idle", on_idle, HookType.AROUND)
    return None


def snapshots() -> str | None:
    """Load snapshots at most every SNAPSHOT_EVERY seconds while there is work; an idle one writes at once."""
    from sglang.srt.managers.scheduler import Scheduler

    problem = misfit(Scheduler.publish_load_snapshot, "self force", "get_loads(")
    if problem:
        return problem
    last = float("-inf")

    def publish(original: Any, self: Any, force: bool = False) -> Any:
        nonlocal last
        now = time.monotonic()
        if now - last < SNAPSHOT_EVERY and not self.is_fully_idle():
            return None
        last = now
        return original(self, force)

    HookRegistry.register(f"{SCHEDULER}.publish_load_snapshot", publish, HookType.AROUND)
    return None
