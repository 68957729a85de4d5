"""Ending an instance from outside: its supervisor is asked, then told, then killed; its engine goes with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass

from qwen3emb_launch.errors import EngineFailedError, UnfitError
from qwen3emb_launch.state import Instance, ProcessId, lock_holder

KILL_PATIENCE = 10.0  # seconds from "at once" to the supervisor's own end, and from its death to the engine's
LOOK_EVERY = 0.05


@dataclass(frozen=True)
class Stopped:
    """What became of one instance. `killed`: its requests were not waited for."""

    name: str
    was_running: bool
    killed: bool
    seconds: float


def stop(instance: Instance, timeout: float) -> Stopped:
    """Stop it and wait until no process of it is left.

    `timeout` seconds are for the drain. Raises UnfitError `not_yours` when it belongs to another user, and
    EngineFailedError `still_there` when even SIGKILL did not help.
    """
    begin = time.monotonic()
    record = instance.record
    processes = list(record.processes) if record else []
    supervisor = record.supervisor if record and instance.running else None
    if supervisor is None and record is None:
        supervisor = lock_holder(instance.folder)  # its record cannot be read, but it lives
        processes = [supervisor] if supervisor else []
    if supervisor is None:
        # A supervisor that was killed leaves no engine behind; a recorded one that lives all the same is removed.
        leftover = [p for p in processes if p.alive and (record is None or p != record.supervisor)]
        for process in leftover:
            send(process, signal.SIGKILL)
        _gone(leftover, KILL_PATIENCE, instance.name)
        return Stopped(instance.name, bool(leftover), bool(leftover), time.monotonic() - begin)
    send(supervisor, signal.SIGTERM)
    killed = not _wait([supervisor], timeout)
    if killed:
        send(supervisor, signal.SIGTERM)  # the second one means at once
        if not _wait([supervisor], KILL_PATIENCE):
            send(supervisor, signal.SIGKILL)  # its guard sees the pipe close and kills the engine
    _gone(processes, KILL_PATIENCE, instance.name)
    return Stopped(instance.name, True, killed, time.monotonic() - begin)


def send(process: ProcessId, number: signal.Signals) -> None:
    """Signal that very process, if it still lives. Raises UnfitError `not_yours`."""
    if not process.alive:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    except PermissionError as error:
        raise UnfitError(
            "not_yours", f"pid {process.pid} belongs to another user", "ask that user, or use sudo"
        ) from error


def _wait(processes: list[ProcessId], timeout: float) -> bool:
    """Whether all of them ended within `timeout` seconds."""
    pause = threading.Event()
    end = time.monotonic() + timeout
    while any(p.alive for p in processes):
        if time.monotonic() >= end:
            return False
        pause.wait(LOOK_EVERY)
    return True


def _gone(processes: list[ProcessId], timeout: float, name: str) -> None:
    if not _wait(processes, timeout):
        left = ", ".join(str(p.pid) for p in processes if p.alive)
        raise EngineFailedError("still_there", f"{name}: pid {left} did not end, even killed", "see dmesg")
