"""The engine as a process: started under a guard, its output in a log file, nothing of it left afterwards."""

from __future__ import annotations

from qwen3emb_launch.engine_process.command import EngineCommand
from qwen3emb_launch.engine_process.events import (
    Doomed,
    Exited,
    Gone,
    GuardLost,
    ProcessEvent,
    Spawned,
    SpawnFailed,
    Stuck,
)
from qwen3emb_launch.engine_process.process import EngineProcess

__all__ = [
    "Doomed",
    "EngineCommand",
    "EngineProcess",
    "Exited",
    "Gone",
    "GuardLost",
    "ProcessEvent",
    "SpawnFailed",
    "Spawned",
    "Stuck",
]
