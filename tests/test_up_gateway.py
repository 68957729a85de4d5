"""The supervisor with the real gateway before misbehaving engines: what users' requests see of each fault."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_engine import Behaviour, Engine
from supervised import EAGER, PATIENT, QUICK, Load, Supervised, fake_plan, gateway_plan, gone, until

from qwen3emb_launch import state
from qwen3emb_launch.cli.supervise import SMOKE
from qwen3emb_launch.engine_process.guard import descendants
from qwen3emb_launch.errors import CheckFailedError, EngineFailedError, Exit, LaunchError, NetworkError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.gateway import admin_client
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.planning import plan_to_dict
from qwen3emb_launch.probe import Target, embed_once
from qwen3emb_launch.up import gateway_runner, machine
from qwen3emb_launch.up.control import Candidate, How
from qwen3emb_launch.up.control import replace as replace_engines
from qwen3emb_launch.up.detached import detach
from qwen3emb_launch.up.events import EngineGone, Event
from qwen3emb_launch.up.member import Member
from qwen3emb_launch.up.sockets import short_path

TRUTH = Engine(Behaviour())


def right(text: str, vector: list[float]) -> bool:
    """Whether it is the vector that a good fake engine gives."""
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(vector, TRUTH.vector(text, None), strict=True))) < 1e-3


def load(plan: LaunchPlan) -> Load:
    return Load(plan.base_url, right)


def behaving(plan: LaunchPlan, **faults: Any) -> LaunchPlan:
    """The plan with engines that behave otherwise."""
    return replace(plan, env={"FAKE_ENGINE": json.dumps({**json.loads(plan.env["FAKE_ENGINE"]), **faults})})


def unit(run: Supervised, name: str) -> state.UnitRecord:
    return next(u for u in run.supervisor.record.units if u.name == name)


def pids(run: Supervised) -> list[int]:
    return [p.pid for p in run.supervisor.record.engines]


def test_served_through_the_gateway_and_nothing_left() -> None:
    """Ready means tested through the users' own address; the engine is private; the end leaves no process, key or
    socket."""
    plan = gateway_plan(deadlines=PATIENT)
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        assert load(plan).ask("hello")
        engine = unit(run, "engine")
        host, port = engine.url.removeprefix("http://").removesuffix("/v1").split(":")
        assert port != str(plan.port)
        assert not embed_once(Target(host, int(port), "fake", 64), "no key", 5).ok
        key = run.instance.engine_api_key()
        assert embed_once(Target(host, int(port), "fake", 64, key), "key", 5).ok
        processes = [run.engine_pid, run.gateway_pid]
        assert {u.name: u.state for u in run.instance.record.units} == {"engine": State.READY, "gateway": State.READY}
        for path in [p for p in run.claim.folder.rglob("*") if p.suffix == ".log" or p.name.startswith("i")]:
            assert str(key) not in path.read_text()
        for path in run.claim.folder.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
    assert run.watcher.states == [State.READY, State.STOPPING, State.STOPPED]
    assert all(map(gone, processes))
    assert sorted(p.name for p in run.claim.folder.iterdir()) == [
        "events.jsonl",
        "instance.json",
        "lock",
        "logs",
        "plan.json",
    ]


def test_stop_during_the_smoke_test_waits_for_nobody() -> None:
    """Nobody is served yet: the test's own request, which waits in the gateway for its engine, is nothing to drain."""
    plan = gateway_plan({"hang_after": 4}, deadlines=replace(QUICK, drain=60))
    plan = replace(plan, gateway={**plan.gateway, "drain": 60.0, "hold": 60.0})
    with Supervised(plan, SMOKE) as run:
        path = str(run.claim.folder / "gateway.sock")

        def tested() -> bool:
            with contextlib.suppress(LaunchError):
                return bool(admin_client.call(path, "GET", "/state")["in_air"])
            return False

        until(tested, "a request of the smoke test")
        run.supervisor.stop("SIGINT")
        assert run.wait(10).state is State.STOPPED


def test_engine_killed_under_load_costs_no_request() -> None:
    """SIGKILL to the only engine: requests are held until it is back; none fails, none gets a wrong vector. Then the
    gateway is killed: it is back within two seconds, and the engine did not notice."""
    plan = gateway_plan({"start_delay": 0.5})
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        with load(plan) as clients:
            clients.goes_on()
            os.kill(run.engine_pid, signal.SIGKILL)
            run.reach(State.READY, 2)
            clients.goes_on()
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        engine, gateway = run.engine_pid, run.gateway_pid
        os.kill(gateway, signal.SIGKILL)
        run.reach(State.READY, 3)
        assert load(plan).ask("again")
        assert (run.engine_pid, run.supervisor.record.restarts) == (engine, 1)
        assert unit(run, "gateway").restarts == 1
    stamps = {t.after: t.at for t in run.watcher.transitions[-6:]}
    assert stamps[State.READY] - stamps[State.RESTARTING] < 5


def test_hung_gateway_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP to the gateway: noticed by its silence, killed and started again, the engine untouched. Who connects
    meanwhile waits for the next one: the address is the supervisor's."""
    monkeypatch.setattr(gateway_runner, "PROBE", 0.3)
    monkeypatch.setattr(gateway_runner, "PROBE_EVERY", 0.1)
    monkeypatch.setattr(machine, "starved", lambda _: "")  # a test machine may well be
    plan = gateway_plan(deadlines=replace(QUICK, probe=5))
    with Supervised(plan) as run:
        run.reach(State.READY)
        engine, gateway = run.engine_pid, run.gateway_pid
        os.kill(gateway, signal.SIGSTOP)
        with load(plan) as clients:
            until(lambda: gone(gateway), "the end of the hung gateway")
            run.reach(State.READY, 2)
            clients.goes_on()
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        assert run.engine_pid == engine


def test_address_of_a_killed_gateway_stays_open() -> None:
    """While the gateway is down connections are taken, and answered by its successor; after the end they are
    refused."""
    plan = gateway_plan()
    with Supervised(plan) as run:
        run.reach(State.READY)
        gateway = run.gateway_pid
        os.kill(gateway, signal.SIGSTOP)  # it accepts nothing between here and its death
        with socket.create_connection(("127.0.0.1", plan.port), timeout=60) as early:
            early.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            os.kill(gateway, signal.SIGKILL)
            until(lambda: gone(gateway), "the end of the gateway")
            with socket.create_connection(("127.0.0.1", plan.port), timeout=60):
                assert early.recv(12) == b"HTTP/1.1 200"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", plan.port), timeout=5)


def test_several_workers_all_know_the_engines() -> None:
    """Two gateway workers: both have the engine, also the one that was killed and started again by its parent."""
    plan = gateway_plan()
    plan = replace(plan, gateway={**plan.gateway, "workers": 2})
    with Supervised(plan) as run:
        run.reach(State.READY)

        def upstreams(worker: str) -> list[str]:
            with short_path(run.claim.folder, worker) as path:
                return [u["state"] for u in admin_client.call(path, "GET", "/state", timeout=5)["upstreams"]]

        def pid(worker: str) -> int:
            with short_path(run.claim.folder, worker) as path:
                return int(admin_client.call(path, "GET", "/state", timeout=5)["pid"])

        for worker in ("gateway.sock", "gateway.sock.1"):
            until(lambda w=worker: upstreams(w) == ["up"], f"{worker} to have the engine")
        os.kill(pid("gateway.sock.1"), signal.SIGKILL)

        def back() -> bool:
            with contextlib.suppress(NetworkError):
                return upstreams("gateway.sock.1") == ["up"]
            return False

        until(back, "the second worker's return")
        assert load(plan).ask("served")


def test_killed_supervisor_takes_gateway_and_engines_along() -> None:
    """SIGKILL to the supervisor: no engine and no gateway survives."""
    plan = gateway_plan(replicas=2)
    claim = state.claim(plan.name)
    state.write_private(claim.plan, json.dumps(plan_to_dict(plan)))
    behind = detach(claim, ["--behind", "--no-verify"])
    behind.wait_ready(print)
    tree = descendants(behind.process.pid)
    assert len(tree) >= 6  # three guards, two engines, the gateway
    behind.process.kill()
    behind.process.wait()
    until(lambda: all(map(gone, tree)), "the end of every process")


def test_gateway_that_cannot_start_says_why(tmp_path: Path) -> None:
    """A gateway that refuses its settings ends the start with its own words and exit status; no engine is left."""
    plan = gateway_plan({"start_delay": 30})
    with Supervised(replace(plan, gateway={**plan.gateway, "keys_file": str(tmp_path / "none")})) as run:
        error = run.wait().error
    assert error is not None
    assert (error.code, error.exit) == ("bad_keys", Exit.INVALID)
    argv = " ".join(plan.argv)  # its start may be over before anybody could ask for its pid
    assert not [p for p in psutil.process_iter(["cmdline"]) if argv in " ".join(p.info["cmdline"] or ())]
    assert run.watcher.states == [State.FAILED]


def test_keys_of_users_are_asked_for(tmp_path: Path) -> None:
    """With API keys nobody else is served, and the smoke test still goes through the gateway, with a key of its own."""
    keys = tmp_path / "keys"
    keys.write_text("alice sesame-open\n")
    plan = gateway_plan()
    with Supervised(replace(plan, gateway={**plan.gateway, "keys_file": str(keys)}), SMOKE) as run:
        run.reach(State.READY)
        assert embed_once(Target("127.0.0.1", plan.port, "fake", 64), "nobody", 5).status == 401
        assert embed_once(Target("127.0.0.1", plan.port, "fake", 64, "sesame-open"), "alice", 5).ok


def test_two_engines_one_killed() -> None:
    """One of two engines dies under load: degraded, nobody notices, ready again when it is back."""
    plan = gateway_plan({"start_delay": 0.3}, replicas=2, deadlines=PATIENT)
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        assert len(pids(run)) == 2
        with load(plan) as clients:
            clients.goes_on()
            os.kill(pids(run)[1], signal.SIGKILL)
            run.reach(State.DEGRADED)
            run.reach(State.READY, 2)
            clients.goes_on()
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        assert unit(run, "engine-2").restarts == 1
    assert run.watcher.states == [
        State.READY, State.DEGRADED, State.READY, State.STOPPING, State.STOPPED
    ]  # fmt: skip


def test_given_up_engine_leaves_the_other_serving_and_restart_brings_it_back(tmp_path: Path) -> None:
    """An engine that dies at every start is given up, said aloud; the other serves on, degraded; `restart` mends it."""
    starts = tmp_path / "starts"
    plan = gateway_plan({"starts": str(starts)}, replicas=2, restart=replace(EAGER, limit=2))
    with Supervised(plan) as run:
        run.reach(State.READY)
        broken = json.dumps({"width": 64, "want_key": True, "last_words": "RuntimeError: no luck", "status": 1})
        second = run.supervisor.engines[1]
        good = second.runner.spec
        second.runner.spec = replace(good, env={"FAKE_ENGINE": broken})
        os.kill(pids(run)[1], signal.SIGKILL)
        until(lambda: unit(run, "engine-2").state is State.FAILED, "engine-2 given up")
        assert run.supervisor.record.state is State.DEGRADED
        assert any("engine-2 HAS FAILED" in note for note in run.watcher.notes)
        assert load(plan).ask("still served")
        done = replace_engines(run.instance)
        assert [one.unit for one in done] == ["engine", "engine-2"]
        until(lambda: run.supervisor.record.state is State.READY, "ready again")
        assert len(pids(run)) == 2


def test_first_start_of_one_of_two_fails() -> None:
    """Two engines asked for and one cannot start: the instance fails, with that one's words, and leaves nothing."""
    plan = gateway_plan({"last_words": "AssertionError: no second one", "status": 1}, replicas=2)
    with Supervised(plan) as run:
        error = run.wait().error
    assert error is not None
    assert error.exit is Exit.ENGINE
    assert "no second one" in error.message
    assert run.watcher.states == [State.FAILED]


@pytest.mark.parametrize(("how", "replicas"), [("auto", 1), ("in_place", 1), ("auto", 2)])
def test_restart_under_load_costs_no_request(how: How, replicas: int) -> None:
    """Every engine is a new process, none of the old is left, no request failed, no vector is wrong."""
    plan = gateway_plan({"start_delay": 0.3}, replicas=replicas, deadlines=PATIENT)
    said: list[str] = []
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        before = pids(run)
        with load(plan) as clients:
            clients.goes_on()
            done = replace_engines(run.instance, how=how, say=said.append)
            clients.goes_on()
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        after = pids(run)
        assert len(after) == replicas
        assert all(map(gone, before))
        assert [(one.old_pid, one.new_pid) for one in done] == list(zip(before, after, strict=True))
        assert {one.how for one in done} == {"in_place" if how == "in_place" else "beside"}
        assert [u.name for u in run.supervisor.record.units if u.kind == "engine"] == ["engine", "engine-2"][:replicas]
        assert run.supervisor.record.state is State.READY
        if how == "auto":
            assert run.watcher.states == [State.READY]  # users saw nothing of it
    assert any("beside" in line or "in place" in line for line in said)


@pytest.mark.parametrize("how", ["beside", "in_place"])
def test_failing_replacement_leaves_the_old_one(how: How) -> None:
    """A new engine that does not start: exit 4 with its last words; under load nothing fails, and the old plan
    serves."""
    plan = gateway_plan()
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        before = pids(run)
        bad = behaving(plan, last_words="torch.OutOfMemoryError: CUDA out of memory. Tried", status=1)
        with load(plan) as clients:
            clients.goes_on()
            with pytest.raises(EngineFailedError) as caught:
                replace_engines(run.instance, plan=bad, how=how)
            clients.goes_on()
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        assert caught.value.code == "engine_oom_gpu"
        assert caught.value.exit is Exit.ENGINE
        assert caught.value.details["last_lines"]
        assert run.supervisor.record.state is State.READY
        assert len(pids(run)) == 1
        assert (pids(run) == before) is (how == "beside")
        assert run.supervisor.plan == plan


def test_caller_looks_at_a_candidate_before_it_gets_traffic(tmp_path: Path) -> None:
    """`confirm` reaches both engines with their keys; its refusal is the caller's own error and changes nothing; its
    consent lets another plan's engine in, which is then what the instance runs."""
    plan = gateway_plan()
    other = behaving(plan, starts=str(tmp_path / "starts"))
    seen: list[Candidate] = []

    def refuse(candidate: Candidate) -> None:
        seen.append(candidate)
        for url, key in ((candidate.url, candidate.key), (str(candidate.old_url), candidate.old_key)):
            host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
            assert embed_once(Target(host, int(port), "fake", 64, key), "compare", 5).ok
        raise CheckFailedError("vectors_differ", "cosine 0.93", "qwen3emb diff")

    with Supervised(plan) as run:
        run.reach(State.READY)
        before = pids(run)
        with pytest.raises(CheckFailedError) as caught:
            replace_engines(run.instance, plan=other, confirm=refuse)
        assert caught.value.code == "vectors_differ"
        assert (pids(run), len(seen)) == (before, 1)
        replace_engines(run.instance, plan=other, confirm=seen.append)
        assert pids(run) != before
        assert len(seen) == 2
        written = json.loads(run.claim.plan.read_text())
        assert written["env"] == dict(other.env)
        assert not list(run.claim.folder.glob("plan.new*"))
        os.kill(run.engine_pid, signal.SIGKILL)  # a crash afterwards starts the new plan, not the old one
        run.reach(State.READY, 2)
        assert len((tmp_path / "starts").read_text().split()) == 3


def test_engines_with_other_vectors_are_refused_and_the_first_is_taken_back() -> None:
    """The gateway refuses an engine whose vectors are another model's. With two engines, where the second of a new
    plan is refused by the caller, the first gets its old plan again."""
    plan = gateway_plan(replicas=2)
    with Supervised(plan) as run:
        run.reach(State.READY)
        before = pids(run)
        with pytest.raises(EngineFailedError) as caught:
            replace_engines(run.instance, plan=behaving(plan, shuffle=False, salt="another model"))
        assert caught.value.code == "gateway_refuses"
        assert pids(run) == before

        asked: list[Candidate] = []

        def only_the_first(candidate: Candidate) -> None:
            asked.append(candidate)
            if len(asked) == 2:
                raise CheckFailedError("no", "not the second one", "")

        with pytest.raises(CheckFailedError):
            replace_engines(run.instance, plan=behaving(plan, drain=0.1), confirm=only_the_first)
        assert len(asked) == 2
        assert all(json.loads(m.runner.spec.env["FAKE_ENGINE"]).get("drain") is None for m in run.supervisor.engines)
        assert run.supervisor.record.state is State.READY


def test_engine_that_comes_back_with_other_vectors_is_given_up(tmp_path: Path) -> None:
    """Where a restarted engine embeds otherwise than before (its files were changed), the gateway refuses it: no wrong
    vector gets out, and after the limit of restarts the instance has failed, saying so."""
    plan = gateway_plan(restart=replace(EAGER, limit=1), deadlines=replace(QUICK, probe=5))
    with Supervised(plan) as run:
        run.reach(State.READY)
        load(plan).ask("what the first one embeds is what counts")
        engine = run.supervisor.engines[0]
        engine.runner.spec = replace(engine.runner.spec, env=behaving(plan, salt="changed on disk").env)
        os.kill(run.engine_pid, signal.SIGKILL)
        error = run.wait().error
    assert error is not None
    assert "another model's" in error.message
    assert error.exit is Exit.ENGINE


def test_replacement_ends_with_the_instance() -> None:
    """Stopping in the middle of a restart: the caller is told, the candidate goes with the rest."""
    plan = gateway_plan()
    with Supervised(plan) as run:
        run.reach(State.READY)
        slow = behaving(plan, never_listen=True)
        errors: list[LaunchError] = []

        def on_line(text: str) -> None:
            until(lambda: len(pids(run)) == 2, "the candidate")
            errors.append(UnfitError("seen", text))
            run.supervisor.stop("SIGTERM")

        with pytest.raises(UnfitError) as caught:
            replace_engines(run.instance, plan=slow, say=on_line)
        assert caught.value.code == "stopping"
        run.wait()
    assert run.outcome is not None
    assert run.outcome.state is State.STOPPED


def test_a_candidate_may_be_the_last_to_go() -> None:
    """Its end comes after the engine's and the gateway's: the instance ends all the same."""
    plan = gateway_plan()
    with Supervised(plan) as run:
        run.reach(State.READY)
        supervisor, feed = run.supervisor, run.supervisor.feed

        def late(member: Member, event: Event) -> None:
            last = all(m.ended for m in supervisor.members if m is not member)
            if member in supervisor.others and isinstance(event, EngineGone) and not last:
                supervisor._inbox.put(lambda: late(member, event))
            else:
                feed(member, event)

        def on_line(_: str) -> None:
            until(lambda: len(pids(run)) == 2, "the candidate")
            supervisor.feed = late  # type: ignore[method-assign]
            supervisor.stop("SIGTERM")

        with pytest.raises(UnfitError):
            replace_engines(run.instance, plan=behaving(plan, never_listen=True), say=on_line)
        assert run.wait().state is State.STOPPED


def test_what_cannot_be_replaced() -> None:
    """Another service's plan, a bare engine, and an instance without a supervisor are refused, each with its code."""
    plan = gateway_plan()
    with Supervised(plan) as run:
        run.reach(State.READY)
        with pytest.raises(LaunchError) as caught:
            replace_engines(run.instance, plan=replace(plan, max_dims=32))
        assert caught.value.code == "other_service"
        instance = run.instance
    with pytest.raises(UnfitError) as dead:
        replace_engines(state.find(plan.name))
    assert dead.value.code == "not_running"
    with pytest.raises(UnfitError) as silent:
        replace_engines(instance)
    assert silent.value.code == "no_control"
    with Supervised(fake_plan()) as run:
        run.reach(State.READY)
        with pytest.raises(UnfitError) as alone:
            replace_engines(run.instance)
        assert alone.value.code == "no_gateway"


NONSENSE = [
    b"", b"\n", b"nonsense\n", b"[1]\n", b'{"do": "dance"}\n', b'{"do": "replace", "how": "no"}\n',
    b'{"do": "replace", "plan": {"schema": 1}}\n', b"x" * (1 << 20) + b"\n",
]  # fmt: skip


def test_control_socket_takes_no_nonsense() -> None:
    """Whatever arrives at the control socket, the answer is an error and the supervisor serves on."""
    with Supervised(fake_plan()) as run:
        run.reach(State.READY)
        assert (run.claim.folder / "control.sock").stat().st_mode & 0o777 == 0o600
        for line in NONSENSE:
            with short_path(run.claim.folder, "control.sock") as path, socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                with contextlib.suppress(BrokenPipeError):  # it need not read all of a line that is too long
                    client.sendall(line)
                    client.shutdown(socket.SHUT_WR)
                answer = json.loads(client.makefile("rb").readline())
            assert (answer["event"], answer["ok"]) == ("done", False)
            assert answer["error"]["code"] in ("bad_request", "bad_plan")
        assert run.supervisor.record.state is State.READY


def test_supervisor_with_gateway_is_small() -> None:
    """Supervisor and the guards of an engine and the gateway together hold under 80 MB."""
    plan = gateway_plan()
    claim = state.claim(plan.name)
    state.write_private(claim.plan, json.dumps(plan_to_dict(plan)))
    behind = detach(claim, ["--behind"])
    behind.wait_ready(print)
    tree = [behind.process.pid, *descendants(behind.process.pid)]
    ours = [p for p in tree if p == behind.process.pid or b"guard.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    try:
        assert len(ours) == 3
        assert sum(map(_rss_kib, ours)) < 80 * 1024
    finally:
        behind.stop()


def _rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
