"""Faults of the engine's processes and of what it needs: signals, memory, its port, its model, the hub, the clock."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from faults import groups, processes
from faults.instance import Instance
from faults.load import Reference
from faults.strike import KILL_NOTICED, ROOM, Expectation, Row, strike

WORKER_NOTICED = 3.0  # seconds: SGLang's main process looks after its workers every second
STARVED_SHARE = 0.001  # of one processor: an embedding takes tens of milliseconds of it
STARVED_FOR = 1.5  # times as long as a hang takes to be sure
PORT_HELD = 3.0
MODEL_AWAY = 6.0


def none_lost(instance: Instance) -> int | None:
    """With the gateway no request may fail for an engine's fault; without it they do."""
    return 0 if instance.setup.gateway else None


def signalled(instance: Instance, reference: Reference, role: str, number: signal.Signals) -> Row | None:
    """One process of the engine killed or stopped. None where this engine has no such process."""
    pid = instance.pid(role)
    if pid is None:
        return None
    # Of its main process the supervisor knows the end at once; of a worker's, when the main process has looked.
    period = instance.setup.hang_seconds if number == signal.SIGSTOP else None
    seconds = period or (KILL_NOTICED if role in ("http", "guard") else WORKER_NOTICED)
    expect = Expectation(noticed=seconds, period=period, failed=none_lost(instance))
    return strike(instance, reference, f"{number.name} {role}", lambda: processes.send(pid, number), expect)


def stopped_guard(instance: Instance, reference: Reference) -> Row:
    """The guard hangs, and the engine dies: neither may keep the other from going."""
    guard, engine = instance.pid("guard"), instance.pid("http")
    assert guard is not None
    assert engine is not None

    def act() -> None:
        processes.send(guard, signal.SIGSTOP)
        processes.send(engine, signal.SIGKILL)

    expect = Expectation(noticed=instance.setup.hang_seconds, failed=none_lost(instance))
    return strike(instance, reference, "SIGSTOP guard, SIGKILL http", act, expect)


def out_of_memory(instance: Instance, reference: Reference) -> Row | str:
    """The kernel kills the process that computes, for want of memory. A sentence where that cannot be tried."""
    pid = instance.pid("scheduler") or instance.pid("http")
    assert pid is not None
    group = groups.make("memory")
    if group is None:
        return "no memory control group may be made here"

    def act() -> None:
        group.limit_memory(4096)
        group.add([pid])

    # Nothing is killed before it asks for memory: the load makes it ask.
    expect = Expectation(noticed=WORKER_NOTICED, failed=none_lost(instance))
    return strike(instance, reference, "killed for memory (control group)", act, expect, undo=group.close)


def starved(instance: Instance, reference: Reference) -> Row | str:
    """The engine gets next to no processor time, for longer than a hang takes to be sure: it is not the engine's fault,
    and it lives. A sentence where that cannot be tried."""
    group = groups.make("cpu")
    if group is None:
        return "no processor control group may be made here"
    seconds = STARVED_FOR * instance.setup.hang_seconds
    before = instance.record
    wall = time.time()

    def act() -> None:
        group.limit_processor(STARVED_SHARE)
        group.add(who.pid for who in instance.engine_processes())
        end = time.monotonic() + seconds
        try:
            passed = lambda: time.monotonic() > end or instance.record.restarts != before.restarts  # noqa: E731
            instance.until(passed, "the time to pass", seconds + 5)
        finally:
            group.close()
        instance.until(lambda: instance.state == "ready", "ready again", 30)

    expect = Expectation(noticed=None, failed=none_lost(instance), replaces=False)
    row = strike(instance, reference, f"no processor time for {seconds:.0f} s", act, expect)
    misses = list(row.misses)
    if (instance.record.engines, instance.record.restarts) != (before.engines, before.restarts):
        misses.append("a healthy engine was replaced")
    if not any("starved" in event["reason"] for event in instance.events_since(wall)):
        misses.append("nobody said that it was starved")
    return replace(row, misses=tuple(misses))


def port_stolen(instance: Instance, reference: Reference) -> Row:
    """The engine dies and somebody takes its port before it is back, for a few seconds."""
    port = int(instance.record.engine_url.removesuffix("/v1").rpartition(":")[2])
    engine = instance.pid("http")
    assert engine is not None
    let_go = threading.Event()

    def hold() -> None:
        thief = socket.socket()
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                thief.bind(("127.0.0.1", port))
                thief.listen(1)
                break
        let_go.wait(PORT_HELD)
        thief.close()

    thread = threading.Thread(target=hold)

    def act() -> None:
        processes.send(engine, signal.SIGKILL)
        thread.start()

    def undo() -> None:
        let_go.set()
        thread.join()

    recovery = 10.0 + PORT_HELD + instance.start_seconds + ROOM  # the thief waits for the port itself, too
    expect = Expectation(recovery=recovery, failed=none_lost(instance))
    return strike(instance, reference, f"SIGKILL http, port stolen for {PORT_HELD:g} s", act, expect, undo=undo)


def model_away(instance: Instance, reference: Reference) -> Row:
    """The checkpoint is moved away and the engine dies; it is put back after some seconds."""
    folder = instance.model_folder
    hidden = folder.with_name("hidden")
    return _model_fault(
        instance, reference, "model removed", lambda: folder.rename(hidden), lambda: hidden.rename(folder)
    )


def model_cut(instance: Instance, reference: Reference) -> Row:
    """The weights' file is cut in half and the engine dies; the whole file comes back after some seconds."""
    weights, whole = _weights(instance)
    half = len(whole) // 2
    return _model_fault(
        instance, reference, "model cut in half", lambda: _put(weights, whole[:half]), lambda: _put(weights, whole)
    )


def model_altered(instance: Instance, reference: Reference) -> Row:
    """Numbers in the weights' file change while it stays a good file, and the engine dies: other vectors would come."""
    weights, whole = _weights(instance)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    changed = bytearray(whole)
    for place in range(header + 1, len(whole), 64):
        changed[place] ^= 0x80  # the sign of every 32nd bfloat16 number
    return _model_fault(
        instance, reference, "weights altered", lambda: _put(weights, bytes(changed)), lambda: _put(weights, whole)
    )


def _weights(instance: Instance) -> tuple[Path, bytes]:
    path = next(instance.model_folder.glob("*.safetensors"))
    return path, path.read_bytes()


def _put(path: Path, data: bytes) -> None:
    """A new file in the old one's place: the running engine keeps what it has mapped."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    fresh.replace(path)


def _model_fault(
    instance: Instance, reference: Reference, fault: str, harm: Callable[[], object], mend: Callable[[], object]
) -> Row:
    engine = instance.pid("http")
    assert engine is not None
    mended = threading.Event()

    def later() -> None:
        mended.wait(instance.start_seconds + MODEL_AWAY)
        mend()

    thread = threading.Thread(target=later)

    def act() -> None:
        harm()
        processes.send(engine, signal.SIGKILL)
        thread.start()

    def undo() -> None:
        mended.set()
        thread.join()

    # One start fails, or several; the one that comes after the mending serves.
    recovery = 3 * instance.start_seconds + MODEL_AWAY + ROOM
    expect = Expectation(recovery=recovery)  # it may last longer than the gateway holds requests
    return strike(instance, reference, f"SIGKILL http, {fault} for a while", act, expect, undo=undo)


@contextlib.contextmanager
def clock_file(folder: Path) -> Iterator[tuple[dict[str, str], Callable[[str], None]]]:
    """Variables that let a process's wall clock be moved, and the means to do it; empty ones without libfaketime."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    stamp = folder / "clock"

    def move(offset: str) -> None:
        fresh = stamp.with_suffix(".new")
        fresh.write_text(offset + "\n")
        fresh.replace(stamp)

    move("+0")
    environ = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(stamp),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # a jump moves the wall clock only
        "FAKETIME_CACHE_DURATION": "1",
    }
    yield (environ if library else {}), move


def clock_jump(instance: Instance, reference: Reference, move: Callable[[str], None], offset: str) -> Row:
    """The wall clock jumps, and nothing may come of it."""
    seconds = instance.setup.hang_seconds  # long enough for every probe and deadline to have noticed
    begin = time.monotonic()

    def act() -> None:
        move(offset)
        instance.until(lambda: time.monotonic() - begin > seconds, "the time to pass", seconds + 5)

    expect = Expectation(noticed=None, failed=0, replaces=False)
    restarts = instance.record.restarts
    row = strike(instance, reference, f"wall clock jumps by {offset}", act, expect)
    if instance.record.restarts != restarts:
        return replace(row, misses=(*row.misses, "the engine was restarted"))
    return row
