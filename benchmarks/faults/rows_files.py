"""Faults that need no load: state files cut or half-written, names fought for, a thousand restarts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

from faults import processes
from faults.instance import NAME, Instance, LateError, Setup
from faults.strike import Row, leftovers
from qwen3emb_launch import state
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.errors import LaunchError

FILES = ("instance.json", "plan.json", "events.jsonl", "engine.yaml", "lock")
DEEP = 20  # every so many cuts the commands themselves are run, too
SHARE = 0.05  # by which files and memory may differ after all the restarts

WRITER = """
import sys
from qwen3emb_launch import state
from qwen3emb_launch.lifecycle import State, Transition
from dataclasses import replace
claim = state.claim(sys.argv[1])
record = state.InstanceRecord.from_dict(__import__("json").loads(sys.argv[2]))
print("on", flush=True)
number = 0
while True:
    number += 1
    claim.write(replace(record, reason="x" * (number % 5000)))
    claim.append(Transition("one", State.STARTING, State.READY, "y" * (number % 500), 1.0))
"""

RACER = """
import sys, time
from qwen3emb_launch import state
from qwen3emb_launch.errors import LaunchError
while time.time() < float(sys.argv[2]): pass
try:
    claim = state.claim(sys.argv[1])
    print("won", flush=True)
    input()
except LaunchError as error:
    print(error.code, flush=True)
"""


def cut_everywhere(instance: Instance, step: int = 1) -> Row:
    """Each state file of a running instance cut at every `step`-th byte: whoever reads it answers, nobody crashes."""
    found = instance.found
    assert found is not None
    cuts, problems = 0, []
    for name in FILES:
        path = found.folder / name
        whole = path.read_bytes() if path.exists() else b""
        for end in range(0, len(whole), step):
            path.write_bytes(whole[:end])
            cuts += 1
            problem = _readers(cuts % DEEP == 0)
            if problem:
                problems.append(f"{name} cut at {end}: {problem}")
        path.write_bytes(whole)
    if not instance.found or not instance.found.running:
        problems.append("not seen as running after the files were whole again")
    return Row(
        f"state files cut at every byte ({cuts} cuts)",
        seen="a warning that names the file, and the instance as left over" if not problems else "",
        misses=tuple(problems[:3]),
    )


def _readers(deep: bool) -> str:
    """What goes wrong when everything that reads an instance's files does so; empty when nothing does."""
    try:
        for found in state.instances():
            found.engine_key()
        with contextlib.suppress(LaunchError):
            state.running(NAME)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}: {error}"
    for words in (["status", "--json"], ["logs", NAME, "--json"], ["logs", NAME, "--events", "--json"]) if deep else ():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            run(words)
        if "internal_error" in out.getvalue():
            return f"{' '.join(words)}: {out.getvalue()[:120]}"
    return ""


def writer_killed(times: int) -> Row:
    """A process that writes state without pause is killed again and again: what lies there is always whole."""
    record = json.dumps(_record())
    problems = []
    source = random.Random(0)
    for _ in range(times):
        child = subprocess.Popen([sys.executable, "-c", WRITER, "one", record], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(source.uniform(0, 0.03))
        child.kill()
        child.communicate()
        found = state.load("one")
        assert found is not None
        if found.record is None:
            problems.append(f"instance.json: {found.warning}")
        lines = found.events.read_bytes().split(b"\n") if found.events.exists() else [b""]
        if lines[-1]:
            problems.append(f"half an event: {lines[-1][:40]!r}")
    return Row(
        f"writer of state killed {times} times", seen="the text before or after, never half", misses=tuple(problems[:3])
    )


def _record() -> dict[str, object]:
    me = state.identify(os.getpid())
    assert me is not None
    return {
        "name": "one", "state": "ready", "reason": "x", "supervisor": vars(me), "engines": [], "profile": "demo",
        "model": "demo", "served_model_name": "demo", "base_url": "http://127.0.0.1:1/v1",
        "engine_url": "http://127.0.0.1:1/v1", "max_dims": 64, "context_length": 512, "started_at": 1.0, "schema": 1,
    }  # fmt: skip


def race(rounds: int, racers: int = 6) -> Row:
    """Several claim one name in the same instant: exactly one gets it, the others are told who did."""
    problems = []
    for number in range(rounds):
        start = time.time() + 1.0
        argv = [sys.executable, "-c", RACER, f"race-{number}", str(start)]
        group = [
            subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(racers)
        ]
        words = [child.stdout.readline().strip() for child in group if child.stdout]
        for child in group:
            child.communicate("\n")
        if sorted(words) != ["already_running"] * (racers - 1) + ["won"]:
            problems.append(f"round {number}: {words}")
    return Row(
        f"{racers} supervisors race for a name, {rounds} times",
        seen="one wins, the others: already_running",
        misses=tuple(problems),
    )


def restarts(setup: Setup, count: int) -> Row:
    """The engine killed `count` times: the supervisor holds as many files and as much memory as after the first ten."""
    first = min(10, count // 3)
    problems: list[str] = []
    begin = time.monotonic()
    before = after = (0, 0, 0)
    with Instance(setup) as instance:
        try:
            for number in range(1, count + 1):
                _crash(instance, number)
                if number == first:
                    before = _held(instance)
            after = _held(instance)
        except LateError as error:
            problems.append(str(error))
        problems += leftovers(instance, {})
    seconds = time.monotonic() - begin
    for what, a, b in zip(("files", "processes, zombies", "bytes of memory"), before, after, strict=True):
        if abs(b - a) > SHARE * a:
            problems.append(f"{what}: {a} after {first} restarts, {b} after {count}")
    shown = f"{before[0]} -> {after[0]} files, {before[2] >> 10} -> {after[2] >> 10} KiB"
    shown += f", {after[1]} processes; {seconds:.0f} s"
    return Row(f"{count} restarts of the fake engine", seen=shown, misses=tuple(problems))


def _crash(instance: Instance, number: int) -> None:
    """Kill the engine and wait until its successor serves."""
    instance.until(lambda: instance.record.engines and instance.state == "ready", "an engine to kill", 60)
    engines = instance.record.engines
    processes.send(engines[0].pid, signal.SIGKILL)
    instance.until(
        lambda: (r := instance.record).restarts >= number and r.engines and r.engines != engines and r.state == "ready",
        f"restart {number}",
        60,
    )


def _held(instance: Instance) -> tuple[int, int, int]:
    """Open files, processes and zombies below, resident bytes of the supervisor, once its helpers have ended."""
    pid = instance.service.pid

    def seen() -> tuple[int, int, int]:
        below = len(processes.tree(pid)) + processes.zombies(pid)
        return processes.open_files(pid), below, processes.resident(pid)

    best = seen()
    end = time.monotonic() + 2
    while time.monotonic() < end:
        now = seen()
        best = min(best, now)
        time.sleep(0.05)
    return best
