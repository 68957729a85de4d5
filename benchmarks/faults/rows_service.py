"""Faults of the launcher's own processes, and of its disk: supervisor, gateway, state and logs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from faults import processes
from faults.instance import Instance, LateError
from faults.load import Reference
from faults.rows_engine import none_lost
from faults.strike import ROOM, Expectation, Row, strike
from qwen3emb_launch.up.gateway_runner import PROBE, PROBE_EVERY

PROBE_FAILURES = 3  # of the gateway, which has deadlines of its own
GATEWAY_BACK = 3.0  # seconds: an interpreter's start, the libraries
IN_THE_AIR = 3  # requests that a killed gateway had accepted: nobody else can answer on their connections


def supervisor_killed(instance: Instance, reference: Reference) -> Row:
    """SIGKILL: the engine goes with it, the service manager starts both again."""
    expect = Expectation(noticed=1.0)
    return strike(
        instance, reference, "SIGKILL supervisor", lambda: processes.send(instance.service.pid, signal.SIGKILL), expect
    )


def supervisor_stopped(instance: Instance, reference: Reference) -> Row:
    """SIGSTOP: the engine serves on; the service manager's watchdog finds it within its period."""
    period = instance.service.watchdog
    assert period is not None
    barks = len(instance.service.barked)
    begin = 0.0

    def act() -> None:
        nonlocal begin
        begin = time.monotonic()
        processes.send(instance.service.pid, signal.SIGSTOP)

    row = strike(
        instance, reference, f"SIGSTOP supervisor (watchdog {period:.0f} s)",
        act, Expectation(noticed=period + ROOM),
    )  # fmt: skip
    if len(instance.service.barked) == barks:
        return replace(row, period=period, misses=(*row.misses, "the watchdog did not fire"))
    sure = instance.service.barked[barks] - begin
    late = () if sure <= period + ROOM else (f"the watchdog fired after {sure:.1f} s, {period:.0f} at most",)
    return replace(row, sure=sure, period=period, misses=(*row.misses, *late))


def gateway_signalled(instance: Instance, reference: Reference, number: signal.Signals) -> Row | None:
    """The gateway killed or stopped: it comes back alone, the engine keeps running, and nobody is refused meanwhile.
    None without a gateway."""
    return _gateway_process(instance, reference, "gateway", f"{number.name} gateway", number)


def worker_signalled(instance: Instance, reference: Reference, number: signal.Signals) -> Row | None:
    """One of several gateway workers killed or stopped. A killed one comes back alone; a stopped one takes the whole
    gateway along, since its parent does not ask it for signs of life. None where there is one only."""
    return _gateway_process(instance, reference, "worker", f"{number.name} gateway worker", number)


def _gateway_process(
    instance: Instance, reference: Reference, role: str, fault: str, number: signal.Signals
) -> Row | None:
    pid = instance.pid(role)
    if pid is None:
        return None
    period = PROBE_EVERY + PROBE_FAILURES * (PROBE + 1) if number == signal.SIGSTOP else None
    engine = instance.pid("http")
    count = instance.setup.workers if instance.setup.workers > 1 else 0
    sure: list[float] = []

    def back() -> bool:
        gateway = instance.pid("gateway")
        return gateway not in (pid, None) and len(processes.gateway_workers(gateway or 0)) == count

    def act() -> None:
        begin = time.monotonic()
        processes.send(pid, number)
        instance.until(lambda: not processes.lives(pid), "its end", (period or 0.0) + 20)
        sure.append(time.monotonic() - begin)
        instance.until(back, "its successor", 20)
        instance.until(lambda: instance.state == "ready", "ready again", 20)

    row = strike(instance, reference, fault, act, Expectation(noticed=None, failed=IN_THE_AIR, replaces=False))
    misses = list(row.misses)
    if instance.pid("http") != engine:
        misses.append("the engine was restarted with it")
    if any("ConnectError" in reason for reason in row.reasons):
        misses.append("connections were refused")
    if instance.setup.judge_times:
        if period and sure and sure[0] > period:
            misses.append(f"replaced after {sure[0]:.1f} s, {period:.1f} at most")
        if row.gap is not None and row.gap > (period or 0.0) + GATEWAY_BACK:
            misses.append(f"no answer for {row.gap:.1f} s, {(period or 0.0) + GATEWAY_BACK:.1f} at most")
    if period and sure:
        row = replace(row, sure=sure[0], period=period)
    return replace(row, recovery=row.gap, misses=tuple(misses))


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[bool]:
    """A file system of its own for `folder`, so that it can be filled. False where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs", str(folder)])
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_full(instance: Instance, reference: Reference, disk: Path) -> Row:
    """State and logs have no room for a byte, the engine dies and comes back all the same; then there is room again."""
    filler = disk / "filler"
    engine = instance.pid("http")
    assert engine is not None

    def act() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        processes.send(engine, signal.SIGKILL)

    def undo() -> None:
        filler.unlink(missing_ok=True)

    # A full disk keeps the record as it was, so it is the engine's pid that tells: see `served_again`.
    restarted = threading.Event()

    def served_again() -> None:
        act()
        instance.until(lambda: instance.pid("http") not in (engine, None), "another engine on a full disk", 60)
        restarted.set()

    expect = Expectation(noticed=None, failed=none_lost(instance), replaces=False)
    row = strike(instance, reference, "disk full (state, logs), SIGKILL http", served_again, expect, undo=undo)
    misses = [*row.misses, *broken_files(instance)]
    again = instance.pid("http")
    if again and restarted.is_set():
        processes.send(again, signal.SIGKILL)
    with contextlib.suppress(LateError):
        instance.until(lambda: instance.record.restarts >= 2, "the record to be written again", 120)
        instance.until(lambda: instance.state == "ready", "ready again", 120)
        return replace(row, recovery=row.gap, misses=tuple(misses))
    return replace(row, misses=(*misses, "the record was not written again"))


def broken_files(instance: Instance) -> list[str]:
    """State files that are not whole."""
    found = instance.found
    assert found is not None
    broken = [f"{p.name} is left over" for p in found.folder.glob(".*.partial")]
    if found.record is None:
        broken.append(f"instance.json: {found.warning}")
    for line in found.events.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            broken.append(f"events.jsonl has half a line: {line[:60]}")
    try:
        json.loads(found.plan.read_text(encoding="utf-8"))
    except ValueError:
        broken.append("plan.json is not whole")
    return broken


def second_up(instance: Instance, reference: Reference) -> Row:
    """Another `up` of the same name while the first one serves: refused with exit status 3, the first undisturbed."""
    said: list[str] = []

    def act() -> None:
        service = instance.service
        environ = {**os.environ, **instance.setup.environ}
        done = subprocess.run(service.argv, env=environ, capture_output=True, text=True, timeout=120)
        said.append(f"exit {done.returncode}: {(done.stdout + done.stderr).strip()[:120]}")

    row = strike(
        instance, reference, "a second `up` of its name", act, Expectation(noticed=None, failed=0, replaces=False)
    )
    right = bool(said) and said[0].startswith("exit 3") and "already" in said[0]
    misses = row.misses if right else (*row.misses, f"the second one: {said}")
    return replace(row, seen=f"second: {said[0] if said else '?'}", misses=misses)


def hub_gone() -> Row:
    """A model that is not here, and a hub that does not answer: exit status 5, in words, soon."""
    nowhere = dict.fromkeys(("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"), "http://127.0.0.1:9")
    environ = {**os.environ, **nowhere, "QWEN3EMB_DATA_DIR": str(state_folder() / "nothing")}
    argv = [sys.executable, "-m", "qwen3emb_launch", "download", "0.6b", "--json"]
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120)
    error = json.loads(done.stdout).get("error", {})
    misses = () if done.returncode == 5 else (f"exit status {done.returncode}: {done.stdout[:200]}",)
    return Row(
        "hub gone, model not here", seen=f"exit {done.returncode}: {error.get('message', '')[:120]}", misses=misses
    )


def state_folder() -> Path:
    """Where this run keeps its state."""
    return Path(os.environ["QWEN3EMB_STATE_DIR"])
