"""The supervisor with a misbehaving engine: real processes, real sockets, conditions instead of pauses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import free_port
from supervised import EAGER, PATIENT, QUICK, Supervised, fake_plan, gone, until

from qwen3emb_launch import state
from qwen3emb_launch.cli.supervise import SMOKE
from qwen3emb_launch.engine_process import EngineProcess
from qwen3emb_launch.engine_process.guard import descendants
from qwen3emb_launch.errors import Exit, UnfitError
from qwen3emb_launch.facts import Setting
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.planning import plan_to_dict
from qwen3emb_launch.probe import Target, embed_once
from qwen3emb_launch.up import runner
from qwen3emb_launch.up.detached import Detached, command, detach

CROWDED = (
    "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=0.21. "
    "Raise --mem-fraction-static above 0.218 (minimum viable = 1 - available/pre = 0.2178)."
)
OOM = """Traceback (most recent call last):
  File "model_runner.py", line 1, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"""


def embeds(plan_port: int) -> bool:
    return embed_once(Target("127.0.0.1", plan_port, "fake", 64), "test", 5).ok


def test_up_smoke_stop() -> None:
    """A good engine becomes ready through the smoke test, serves, drains on stop, and leaves no key behind."""
    with Supervised(fake_plan(deadlines=PATIENT), SMOKE) as run:
        run.reach(State.READY)
        assert embeds(run.plan.port)
        pid = run.engine_pid
        assert run.claim.keys.stat().st_mode & 0o777 == 0o600
    assert run.watcher.states == [State.READY, State.STOPPING, State.STOPPED]
    assert run.outcome is not None
    assert run.outcome.was_ready
    assert gone(pid)
    assert not run.claim.keys.exists()


def test_crash_is_noticed_within_a_second_and_answered() -> None:
    """An engine killed with SIGKILL is noticed by its end, not by a probe, and is back, with another pid. Three times,
    as a machine that is busy for a second is no fault of the supervisor's."""
    took = []
    with Supervised(fake_plan(deadlines=PATIENT)) as run:
        run.reach(State.READY)
        for time_ in (1, 2, 3):
            pid = run.engine_pid
            begin = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            run.reach(State.RESTARTING, time_)
            took.append(time.monotonic() - begin)
            run.reach(State.READY, time_ + 1)
            assert run.engine_pid != pid
            assert run.supervisor.record.restarts == time_
            assert embeds(run.plan.port)
        reasons = [t.reason for t in run.watcher.transitions if t.after is State.RESTARTING]
    assert reasons == ["the engine was killed by SIGKILL"] * 3
    assert min(took) < 1


def test_each_ready_engine_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the names of its shared memory: an engine that dies by itself later shows them to nobody."""
    seen: list[int] = []
    monkeypatch.setattr(EngineProcess, "look", lambda process: seen.append(process.guard_pid))
    with Supervised(fake_plan()) as run:
        run.reach(State.READY)
        os.kill(run.engine_pid, signal.SIGKILL)
        run.reach(State.READY, 2)
        until(lambda: len(set(seen)) == 2, "a look at each")


def test_crashes_end_at_the_limit(tmp_path: Path) -> None:
    """An engine that dies at every second request is restarted up to the limit, then the instance has failed."""
    starts = tmp_path / "starts"
    with Supervised(fake_plan({"die_after": 2, "starts": str(starts)})) as run:
        error = run.wait().error
    assert run.watcher.states[-1] is State.FAILED
    assert len(starts.read_text().split()) == 1 + EAGER.limit
    assert error is not None
    assert error.exit is Exit.ENGINE
    assert "3 restarts" in error.message


@pytest.mark.parametrize(
    ("behaviour", "code", "word"),
    [
        ({"last_words": OOM}, "engine_oom_gpu", "Tried to allocate 2.00 GiB"),
        ({"last_words": CROWDED}, "engine_crowded_gpu", "others on the GPU took memory while this engine loaded"),
        (
            {"last_words": "sglang serve: error: unrecognized arguments: --enable-prompts", "status": 2},
            "engine_unknown_flag",
            "--enable-prompts",
        ),
        ({"last_words": "AssertionError: tp_size must divide heads"}, "engine_died", "tp_size must divide"),
        ({"last_words": "bye", "status": 0}, "engine_died", "ended with status 0"),
        ({"wrong_dims": 63}, "engine_wrong_answer", "63 numbers came back, 64"),
        ({"nan": True}, "engine_wrong_answer", "NaN"),
        ({"norm": 3.0}, "engine_wrong_answer", "length is 3"),
        ({"refuse": 400}, "engine_wrong_answer", "HTTP 400"),
        ({"room": 512}, "engine_short_pool", "room for 512 tokens"),
        ({"shuffle": True}, "smoke_test_failed", "order"),
        ({"ignore_dimensions": True}, "smoke_test_failed", "64 dims for 32 asked"),
    ],
)
def test_failed_start_says_why(behaviour: dict[str, object], code: str, word: str) -> None:
    """A start that cannot succeed ends with exit 4, the cause in words and the engine's last lines."""
    with Supervised(fake_plan(behaviour), SMOKE) as run:
        error = run.wait().error
    assert error is not None
    assert error.exit is Exit.ENGINE
    assert error.code == code
    assert word in error.message
    assert error.details["last_lines"]
    assert run.watcher.states == [State.FAILED]


FP8 = (Setting("quantization", "fp8", "flag"),)


def test_float8_noise_of_a_checkpoint_that_nobody_knows_starts_with_a_warning() -> None:
    """What an H200 saw of the 8B's shape with random weights: said before ready, once for all checks that see it."""
    with Supervised(fake_plan({"noise": 0.037}, settings=FP8, deadlines=PATIENT), SMOKE) as run:
        run.reach(State.READY)
    (told,) = [note for note in run.watcher.notes if note.startswith("warning: ")]
    assert "12 of 12 differ, up to 0.037: float8 noise that this checkpoint amplifies" in told
    assert "serve bfloat16, or accept it" in told


@pytest.mark.parametrize(("noise", "settings", "official"), [(0.2, FP8, None), (0.037, FP8, "0.6b"), (0.037, (), None)])
def test_what_float8_noise_does_not_explain_never_starts(
    noise: float, settings: tuple[Setting, ...], official: str | None
) -> None:
    """More than it can be, a checkpoint that is known to be steady, or no float8 at all."""
    plan = fake_plan({"noise": noise}, settings=settings)
    plan = replace(plan, model=replace(plan.model, catalog_key=official))
    with Supervised(plan, SMOKE) as run:
        error = run.wait().error
    assert error is not None
    assert error.code == "smoke_test_failed"
    assert f"batch = single: 12 of 12 differ, up to {noise}" in error.message


def test_never_ready_is_given_up_at_the_deadline() -> None:
    """An engine that never listens is killed at the start deadline, and the error says what it was busy with."""
    plan = fake_plan({"never_listen": True}, deadlines=replace(QUICK, start=1.5))
    with Supervised(plan) as run:
        pid = run.engine_pid
        error = run.wait().error
    assert gone(pid)
    assert error is not None
    assert error.code == "engine_not_ready"
    assert "1.5 s" in error.message
    assert "loading weights" in error.message


def test_slow_start_is_waited_for_and_explained() -> None:
    """A start that takes its time is no failure; what it is busy with is told."""
    with Supervised(fake_plan({"start_delay": 1.2})) as run:
        run.reach(State.READY)
        assert "loading weights" in run.watcher.stages


def test_a_part_of_the_plugin_that_does_not_run_is_told() -> None:
    """Served all the same, and slower: not for somebody to find in a log. Two processes say it, one line is enough."""
    line = "qwen3emb plugin: template stands aside: an import initialised CUDA"
    with Supervised(fake_plan({"start_delay": 1.2, "says": f"{line}\n{line}"})) as run:
        run.reach(State.READY)
        told = [note for note in run.watcher.notes if "stands aside" in note]
    assert told == ["engine plugin: template stands aside: an import initialised CUDA"]


def test_hang_behind_a_healthy_health_route_is_found(tmp_path: Path) -> None:
    """An engine whose /health says 200 while embeddings hang is degraded, killed and replaced."""
    plan = fake_plan({"hang_after": 3, "starts": str(tmp_path / "starts"), "faulty_starts": 1})
    with Supervised(plan) as run:
        run.reach(State.RESTARTING)
        assert State.DEGRADED in run.watcher.states
        run.reach(State.READY, 2)
        assert embeds(plan.port)


def test_engine_that_says_it_is_lost_is_replaced_at_once(tmp_path: Path) -> None:
    """SGLang that lost a process looks for traces for a minute before it ends: it is not waited for, nor probed."""
    faults = {"hang_after": 3, "doomed": True, "starts": str(tmp_path / "starts"), "faulty_starts": 1}
    patient = replace(QUICK, probe=60)  # so that it is not a probe that finds it
    with Supervised(fake_plan(faults, deadlines=patient)) as run:
        run.reach(State.READY, 2)
    reasons = [t.reason for t in run.watcher.transitions if t.after is State.RESTARTING]
    assert reasons == ["the engine lost a process (scheduler_0, exit code -9)"]


def test_long_queue_is_not_death() -> None:
    """Probes that time out while the engine's log shows batches do not kill it, however many."""
    with Supervised(fake_plan({"hang_after": 3, "busy": True})) as run:
        run.reach(State.READY)
        until(lambda: sum(note.startswith("busy") for note in run.watcher.notes) >= 4, "four busy probes")
        assert run.watcher.states == [State.READY]


def test_engine_that_ignores_sigterm_is_killed_after_the_drain() -> None:
    """Stop waits for the drain deadline, then kills; nothing is left."""
    plan = fake_plan({"ignore_term": True}, deadlines=replace(QUICK, drain=0.3))
    with Supervised(plan) as run:
        run.reach(State.READY)
        pid = run.engine_pid
    assert run.watcher.states[-1] is State.STOPPED
    assert any("not drained" in note for note in run.watcher.notes)
    assert gone(pid)


def test_second_stop_kills_a_draining_engine() -> None:
    """The second Ctrl-C does not wait for a drain of ten minutes."""
    plan = fake_plan({"drain": 600}, deadlines=replace(QUICK, drain=600))
    with Supervised(plan) as run:
        run.reach(State.READY)
        run.supervisor.stop("SIGINT")
        run.reach(State.STOPPING)
    assert run.watcher.states[-1] is State.STOPPED


def test_stubborn_grandchildren_are_gone_before_the_next_start(tmp_path: Path) -> None:
    """Daemonised grandchildren that ignore SIGTERM die with a crashed engine; no two starts overlap."""
    pids, starts = tmp_path / "pids", tmp_path / "starts"
    with Supervised(fake_plan({"stubborn": str(pids), "starts": str(starts), "faulty_starts": 1})) as run:
        run.reach(State.READY)
        stubborn = until(lambda: pids.exists() and pids.read_text().split(), "the grandchild")
        os.kill(run.engine_pid, signal.SIGKILL)
        until(lambda: len(starts.read_text().split()) == 2, "the second start")
        assert all(gone(int(pid)) for pid in stubborn)


def test_lost_guard_is_a_crash_and_leaves_nothing(tmp_path: Path) -> None:
    """Somebody kills the guard: the engine goes with it, its escaped children too, and a new start follows."""
    pids = tmp_path / "pids"
    plan = fake_plan({"stubborn": str(pids), "starts": str(tmp_path / "starts"), "faulty_starts": 1})
    with Supervised(plan) as run:
        run.reach(State.READY)
        stubborn = until(lambda: pids.exists() and pids.read_text().split(), "the grandchild")
        engine = run.engine_pid
        parent = int(Path(f"/proc/{engine}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGKILL)
        run.reach(State.READY, 2)
        assert gone(engine)
        assert all(gone(int(pid)) for pid in stubborn)


def test_stolen_port_is_named_and_not_mistaken_for_the_engine() -> None:
    """A port held by another process fails the start with exit 3 and the holder's pid."""
    plan = fake_plan()
    with socket.create_server(("127.0.0.1", plan.port)), Supervised(plan) as run:
        error = run.wait().error
    assert error is not None
    assert (error.code, error.exit) == ("port_in_use", Exit.UNFIT)
    assert str(os.getpid()) in error.message


def test_keys_reach_neither_log_nor_argv() -> None:
    """The engine gets a fresh admin key by a private file; its log, its argv and our files do not show it."""
    with Supervised(fake_plan({"print_args": True})) as run:
        run.reach(State.READY)
        key = json.loads(run.claim.keys.read_text())["admin-api-key"]
        log = Path(str(run.supervisor.record.log)).read_text()
        argv = Path(f"/proc/{run.engine_pid}/cmdline").read_bytes().decode()
        instance = state.load("fake")
        assert instance is not None
        assert instance.engine_key() == key
    assert len(key) >= 32
    assert "[redacted]" in log
    for path in [p for p in run.claim.folder.rglob("*") if p.is_file()]:
        assert key not in path.read_text()
        assert path.stat().st_mode & 0o077 == 0
    assert key not in log + argv


def test_engine_behind_a_gateway_wants_a_key() -> None:
    """Where users call another address than the engine's, the engine asks a key of everyone; probes have it."""
    plan = fake_plan({"want_key": True})
    with Supervised(replace(plan, port=free_port()), SMOKE) as run:
        run.reach(State.READY)
        assert not embeds(plan.engine_port)


def test_record_and_events_tell_the_story() -> None:
    """instance.json and events.jsonl say what happened, readable by every other command."""
    with Supervised(fake_plan()) as run:
        run.reach(State.READY)
        instance = state.find("fake")
        assert instance.running
        assert instance.record is not None
        assert instance.record.engines[0].alive
        assert state.find() == instance
    after = state.find("fake")
    assert (after.state, after.running) == (State.STOPPED, False)
    story = [json.loads(line)["after"] for line in after.events.read_text().splitlines()]
    assert story == ["ready", "stopping", "stopped"]


def test_full_disk_does_not_end_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """While state cannot be written the engine serves on, which is said once; later changes are written again."""
    with Supervised(fake_plan()) as run:
        run.reach(State.READY)
        before = state.find("fake").record

        def full(*_: object) -> None:
            raise UnfitError("state_unwritable", "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(type(run.claim), "write", full)
            disk.setattr(type(run.claim), "append", full)
            disk.setattr(runner, "write_private", full)  # the keys of the next start
            os.kill(run.engine_pid, signal.SIGKILL)
            run.reach(State.READY, 2)
        assert embeds(run.plan.port)
        assert state.find("fake").record == before
        assert sum("No space left" in note for note in run.watcher.notes) == 1
    assert state.find("fake").state is State.STOPPED


# ---- as processes of their own --------------------------------------------------------------------------------------


def behind(behaviour: dict[str, object] | None = None, *flags: str, name: str = "fake") -> Detached:
    """The fake engine under a real detached supervisor."""
    plan = fake_plan(behaviour, name=name)
    claim = state.claim(plan.name)
    state.write_private(claim.plan, json.dumps(plan_to_dict(plan)))
    return detach(claim, ["--behind", *flags])


def test_supervisor_killed_leaves_no_engine(tmp_path: Path) -> None:
    """SIGKILL of a detached supervisor: engine and stubborn grandchildren end, status says failed, up works again."""
    pids = tmp_path / "pids"
    first = behind({"stubborn": str(pids)}, "--no-verify")
    record = first.wait_ready(print)
    processes = [record.engines[0].pid, *map(int, pids.read_text().split())]
    first.process.kill()
    first.process.wait()
    until(lambda: all(map(gone, processes)), "the end of the engine's processes")
    left = state.find("fake")
    assert (left.state, left.running) == (State.FAILED, False)
    second = behind(None, "--no-verify")
    second.wait_ready(print)
    second.stop()


def test_detached_supervisor_is_small_and_ends_cleanly() -> None:
    """Supervisor and guard together hold under 80 MB; SIGTERM after serving is exit status 0."""
    run = behind()
    run.wait_ready(print)
    tree = [run.process.pid, *_children(run.process.pid)]
    assert sum(map(_rss_kib, tree)) < 80 * 1024
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(20) == Exit.OK


def test_detached_failure_is_told_as_it_was() -> None:
    """What a supervisor behind fails with arrives at the waiting command: code, words, last lines."""
    run = behind({"last_words": OOM})
    with pytest.raises(Exception, match="memory ran out") as caught:
        run.wait_ready(print)
    assert caught.value.code == "engine_oom_gpu"
    assert caught.value.details["last_lines"][-1].startswith("torch.OutOfMemoryError")
    assert run.process.wait(20) == Exit.ENGINE


def test_two_of_one_name_exclude_each_other() -> None:
    """While a supervisor lives its name cannot be claimed, and the error names its pid; side by side is fine."""
    one, other = behind(None, "--no-verify"), behind(None, "--no-verify", name="other")
    try:
        one.wait_ready(print)
        other.wait_ready(print)
        with pytest.raises(Exception, match=str(one.process.pid)) as caught:
            state.claim("fake")
        assert caught.value.code == "already_running"
        assert [i.name for i in state.instances() if i.running] == ["fake", "other"]
    finally:
        one.stop()
        other.stop()


def test_lost_terminal_does_not_end_a_service() -> None:
    """Nobody reads stderr any more: the supervisor goes on, and answers a crash as ever."""
    plan = fake_plan()
    claim = state.claim(plan.name)
    state.write_private(claim.plan, json.dumps(plan_to_dict(plan)))
    run = subprocess.Popen(
        command(claim, ["--no-verify"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(claim.lock_fd,)
    )
    claim.release()
    try:
        first = until(lambda: (r := state.load("fake")) and r.state is State.READY and r.record, "ready")
        run.stdout.close()  # type: ignore[union-attr]
        run.stderr.close()  # type: ignore[union-attr]
        os.kill(first.engines[0].pid, signal.SIGKILL)
        until(lambda: (r := state.find("fake")).state is State.READY and r.record.restarts == 1, "the return")
    finally:
        run.send_signal(signal.SIGTERM)
        assert run.wait(20) == Exit.OK


def test_ctrl_c_while_starting_leaves_nothing() -> None:
    """SIGINT during a start ends with 130 and without an engine."""
    run = behind({"never_listen": True})
    record = until(lambda: (i := state.load("fake")) and i.record and i.record.engines and i.record, "an engine")
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(20) == Exit.INTERRUPTED
    assert gone(record.engines[0].pid)


def _children(pid: int) -> list[int]:
    from qwen3emb_launch.engine_process.guard import parents

    guards = [child for child, parent in parents().items() if parent == pid]
    return [g for g in guards if b"guard.py" in Path(f"/proc/{g}/cmdline").read_bytes()]


def _rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_restarts_leak_nothing() -> None:
    """After twenty-five crashes the supervisor holds as many files, threads and children as after five."""
    plan = fake_plan(restart=replace(EAGER, first=0.01, longest=0.01, limit=1000))
    check = (sys.executable, "-I", "-S", "-c", "input(); print('{\"faults\": []}')")
    others = threading.active_count()  # of this process, before: tests share it
    with Supervised(plan, check) as run:

        def held() -> tuple[int, int]:
            return len(list(Path("/proc/self/fd").iterdir())), len(descendants(os.getpid()))

        def crash_until(crashes: int) -> None:
            while run.supervisor.record.restarts < crashes:
                number = run.supervisor.record.restarts
                run.reach(State.READY, number + 1)
                os.kill(run.engine_pid, signal.SIGKILL)
                until(lambda n=number: run.supervisor.record.restarts > n, "the restart")
            run.reach(State.READY, crashes + 1)
            until(lambda: threading.active_count() <= others + 8, "the end of the helper threads")

        crash_until(5)
        after_five = held()
        crash_until(25)
        # A probe on its way holds a socket: what leaked would stay.
        until(lambda: all(a <= b for a, b in zip(held(), after_five, strict=True)), f"no more than {after_five}")
