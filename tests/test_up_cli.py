"""up, status, logs and down as commands: what they print, what they refuse, how they exit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import free_port
from supervised import fake_plan, gateway_plan, gone, until

from qwen3emb_launch import gpu, planning, recorded_flags, state
from qwen3emb_launch.cli import launching
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.console import Console
from qwen3emb_launch.engine_process.ports import check_free
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import GpuFacts, LaunchPlan
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.paths import paths
from qwen3emb_launch.planning import plan_text
from qwen3emb_launch.up.detached import command

OUTER = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: no GPU."""
    monkeypatch.setattr(gpu, "inventory", lambda *_: [])


@pytest.fixture(autouse=True)
def default_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `--port` is not given: the profile's 30000 may be served by whoever runs these tests."""
    monkeypatch.setenv("QWEN3EMB_SET_SERVER__PORT", str(free_port()))


def envelope(capsys: OUTER, *args: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the one JSON envelope on stdout."""
    status = run([*args, "--json"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return status, json.loads(out)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `up` plan the fake engine, whatever profile it was asked for."""

    def use(behaviour: dict[str, Any] | None = None) -> LaunchPlan:
        plan = fake_plan(behaviour, name="demo")
        monkeypatch.setattr("qwen3emb_launch.cli.up.make_plan", lambda *_: plan)
        return plan

    return use


def test_up_detached_status_logs_down(capsys: OUTER, planned: Any) -> None:
    """The daily round: up behind the shell, seen by status, read by logs, ended by down."""
    plan = planned()
    status, up = envelope(capsys, "up", "--profile", "demo", "--detach", "--port", str(plan.port))
    assert status == 0, up
    assert up["command"] == "up"
    assert up["result"]["base_url"] == plan.base_url
    status, seen = envelope(capsys, "status")
    row = seen["result"]["instances"][0]
    assert (status, row["name"], row["state"], row["pid"]) == (0, "demo", "ready", up["result"]["pid"])
    status, logs = envelope(capsys, "logs", "-n", "1")
    assert (status, logs["result"]["lines"]) == (0, ["The server is fired up and ready to roll!"])
    status, down = envelope(capsys, "down")
    assert (status, down["result"]["stopped"][0]["killed"]) == (0, False)
    assert gone(row["engine_pids"][0])
    status, seen = envelope(capsys, "status", "demo")
    assert (status, seen["result"]["instances"][0]["state"]) == (0, "stopped")


def test_the_gateway_and_several_engines_as_commands(capsys: OUTER, monkeypatch: pytest.MonkeyPatch) -> None:
    """up with two engines behind the gateway: status shows each part with its memory, logs each part's output, restart
    makes new engines of both, down ends all."""
    plan = gateway_plan(name="demo", replicas=2)
    monkeypatch.setattr("qwen3emb_launch.cli.up.make_plan", lambda *_: plan)
    status, up = envelope(capsys, "up", "--profile", "demo", "-d", "--no-verify", "--port", str(plan.port))
    assert status == 0, up
    assert (up["result"]["base_url"], up["result"]["gateway"]) == (plan.base_url, True)
    assert len(up["result"]["engine_pids"]) == 2

    _, seen = envelope(capsys, "status", "demo")
    units = {unit["name"]: unit for unit in seen["result"]["instances"][0]["units"]}
    assert list(units) == ["engine", "engine-2", "gateway"]
    assert all(u["state"] == "ready" and u["memory_bytes"] > 1e6 and u["pid"] for u in units.values())
    assert run(["status", "demo"]) == 0
    assert f"engine-2\tready\t{units['engine-2']['url']}" in capsys.readouterr().out

    status, logs = envelope(capsys, "logs", "--part", "gateway")
    assert status == 0
    assert any(plan.base_url in line for line in logs["result"]["lines"])
    _, logs = envelope(capsys, "logs", "--part", "engine-2", "-n", "1")
    assert logs["result"]["lines"] == ["The server is fired up and ready to roll!"]
    assert envelope(capsys, "logs", "--part", "../x")[1]["error"]["code"] == "no_log"

    status, done = envelope(capsys, "restart", "--in-place", "--no-verify")
    assert status == 0, done
    assert [(r["unit"], r["how"]) for r in done["result"]["replaced"]] == [
        ("engine", "in_place"), ("engine-2", "in_place")
    ]  # fmt: skip
    assert all(gone(pid) for pid in up["result"]["engine_pids"])
    assert run(["restart", "--beside", "--in-place"]) == 2
    capsys.readouterr()
    assert envelope(capsys, "down")[0] == 0
    assert gone(units["gateway"]["pid"])
    assert envelope(capsys, "restart", "demo")[1]["error"]["code"] == "not_running"


def test_up_says_where_and_how(capsys: OUTER, planned: Any) -> None:
    """For people the endpoint and a snippet are on stdout, talk is on stderr."""
    plan = planned()
    assert run(["up", "--profile", "demo", "-d"]) == 0
    out, err = capsys.readouterr()
    assert plan.base_url in out
    assert "from openai import OpenAI" in out
    assert "curl" in out
    assert "qwen3emb down demo" in err
    assert run(["status"]) == 0
    assert "demo\tready" in capsys.readouterr().out
    assert run(["down", "--all"]) == 0
    assert "demo stopped" in capsys.readouterr().out


@pytest.mark.parametrize("exempt", ["", "localhost,127.0.0.1"])
def test_a_proxy_that_would_catch_the_users_requests_is_warned_of(
    capsys: OUTER, monkeypatch: pytest.MonkeyPatch, planned: Any, exempt: str
) -> None:
    """The endpoint is proven without it; a client in the same shell would ask the proxy for this machine."""
    planned()
    monkeypatch.setenv("http_proxy", "http://me:hunter2@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", exempt)
    assert run(["up", "--profile", "demo", "-d"]) == 0
    err = capsys.readouterr().err
    assert run(["down"]) == 0
    assert ("export NO_PROXY=" in err) is not bool(exempt)
    assert "hunter2" not in err


def test_an_endpoint_is_shown_in_a_locale_without_its_letters() -> None:
    """A model's name may have letters that the terminal's encoding lacks: they are escaped, and it serves."""
    plan = fake_plan(name="demo", served_model_name="模型")
    claim = state.claim("demo")
    state.write_private(claim.plan, plan_text(plan))
    with subprocess.Popen(
        command(claim, ["--no-verify"]),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        pass_fds=(claim.lock_fd,),
    ) as supervisor:
        claim.release()
        assert supervisor.stdout is not None
        assert b"demo serves \\u6a21\\u578b" in supervisor.stdout.readline()
        supervisor.terminate()
        supervisor.stdout.read()
    assert supervisor.returncode == 0


def test_failed_up_shows_the_reason_once(capsys: OUTER, planned: Any) -> None:
    """A failing engine: exit 4, its last words before the error, the same envelope with --json."""
    planned({"last_words": "RuntimeError: Not enough memory. Please try"})
    assert run(["up", "--profile", "demo", "-d"]) == 4
    err = capsys.readouterr().err
    assert err.index("last lines of") < err.index("error: ")
    assert err.count("error: ") == 1
    status, body = envelope(capsys, "up", "--profile", "demo", "-d")
    assert (status, body["ok"], body["error"]["code"]) == (4, False, "engine_oom_pool")


def test_logs_without_a_name_are_of_what_failed_last(capsys: OUTER, planned: Any) -> None:
    """What a failure tells to do next, `qwen3emb logs`, shows the failed start although nothing runs."""
    status, body = envelope(capsys, "logs")
    assert (status, body["error"]["code"]) == (3, "not_running")
    planned({"last_words": "RuntimeError: no such thing"})
    for name in ("older", "demo"):
        assert run(["up", "--profile", "demo", "--name", name, "-d"]) == 4
    capsys.readouterr()
    status, body = envelope(capsys, "logs", "-n", "1")
    assert (status, "/demo/" in body["result"]["path"]) == (0, True)
    assert body["result"]["lines"] == ["RuntimeError: no such thing"]


def test_a_supervisor_that_could_not_write_its_record_keeps_its_exit_status(
    capsys: OUTER, monkeypatch: pytest.MonkeyPatch, planned: Any
) -> None:
    """A full disk: the record does not tell why it ended, its exit status and last line do."""
    planned()
    said = "import sys; print('No space left on device'); sys.exit(3)"
    monkeypatch.setattr("qwen3emb_launch.up.detached.command", lambda *_: [sys.executable, "-c", said])
    status, body = envelope(capsys, "up", "--profile", "demo", "-d")
    assert (status, body["error"]["code"]) == (3, "supervisor_died")
    assert "No space left on device" in body["error"]["message"]


def test_a_failed_smoke_test_shows_its_table(capsys: OUTER, planned: Any) -> None:
    """`up --detach` that fails its check: exit 4, the whole table for people, the report in the envelope."""
    planned({"ignore_dimensions": True})
    assert run(["up", "--profile", "demo", "-d"]) == 4
    out, err = capsys.readouterr()
    assert "fewer dims\tFAIL\t" in out
    assert "unit length\tPASS\t" in out
    assert "`dimensions` is ignored" in err
    status, body = envelope(capsys, "up", "--profile", "demo", "-d")
    assert (status, body["error"]["code"]) == (4, "smoke_test_failed")
    assert {c["id"]: c["verdict"] for c in body["result"]["checks"]}["dims"] == "fail"


def test_dry_run_prints_the_command_and_starts_nothing(capsys: OUTER, planned: Any) -> None:
    """--dry-run shows environment and command, ready to paste; no instance is made."""
    plan = planned()
    assert run(["up", "--profile", "demo", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"--port {plan.port}" in out
    assert "FAKE_ENGINE=" in out
    status, body = envelope(capsys, "up", "--profile", "demo", "--dry-run")
    assert (status, body["result"]["argv"]) == (0, list(plan.argv))
    assert state.instances() == []


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("command", ["up", "tune"])
def test_without_a_gpu_the_hint_is_the_same_command_on_a_cpu(capsys: OUTER, command: str, dry: list[str]) -> None:
    """And for a profile that was asked for, how to see what it launches; not how to start another one."""
    again = " ".join(["qwen3emb", command, *dry, "--profile demo"])
    _, body = envelope(capsys, command, *dry, "--profile", "h100:fp8")
    look = "what it launches: qwen3emb profiles explain h100:fp8"
    assert body["error"]["hint"] == f"{look}; without a GPU: {again}, or --profile cpu; else: qwen3emb doctor"
    assert run(["profiles", "explain", "h100:fp8"]) == 0
    capsys.readouterr()
    _, body = envelope(capsys, command, *dry)
    assert body["error"]["hint"] == f"without a GPU: {again}, or --profile cpu; else: qwen3emb doctor"


@pytest.mark.parametrize("command", ["up", "tune"])
def test_a_dry_run_fetches_nothing(capsys: OUTER, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A model or an engine that is missing is named with the command that gets it: these are gigabytes."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run fetches")

    monkeypatch.setattr("qwen3emb_launch.hub.downloading.download", never)
    monkeypatch.setattr("qwen3emb_launch.engines.install", never)
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(paths().state / "nothing"))
    status, body = envelope(capsys, command, "--dry-run", "--profile", "cpu")
    assert (status, body["error"]["hint"]) == (3, "qwen3emb engine install cpu")
    engine = recorded_flags.engine("0.5.15.post1", "cpu")
    monkeypatch.setattr("qwen3emb_launch.engines.find", lambda *_: engine)
    monkeypatch.setenv("HF_HOME", str(paths().state / "nothing"))
    status, body = envelope(capsys, command, "--dry-run", "--profile", "cpu")
    assert (status, body["error"]["hint"]) == (3, "qwen3emb download 0.6b")


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("--profile", "rtx4091"), 2, "unknown_profile"),
        (("--profile", "demo", "--name", "a/b"), 2, "bad_name"),
        (("--profile", "demo", "--set", "nonsense"), 2, "bad_setting"),
        (("--profile", "demo", "--port", "70000"), 2, "bad_port"),
        (("--profile", "demo", "--port", "0"), 2, "bad_port"),
        (("--profile", "demo", "--host", "256.1.1.1"), 2, "bad_host"),
        (("--profile", "demo", "--host", "192.0.2.1"), 2, "bad_host"),
        (("--model", "4bb"), 2, "unknown_model"),
        (("--profile", "rtx4090"), 3, "no_gpu"),
        ((), 3, "no_gpu"),
        (("--frobnicate",), 2, "usage"),
        (("--profile", "demo", "--port", "many"), 2, "usage"),
    ],
)
def test_bad_input_starts_nothing(capsys: OUTER, args: tuple[str, ...], status: int, code: str) -> None:
    """Each mistake has its code, its exit status and a next step; nothing is started."""
    seen, body = envelope(capsys, "up", *args)
    assert (seen, body["error"]["code"]) == (status, code)
    assert body["error"]["hint"]
    assert not any(i.running for i in state.instances())


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("--host", "0.0.0.0"), 3, "no_api_keys"),
        (("--api-keys", "/nowhere/keys"), 2, "bad_keys"),
        (("--set", "gateway.tasks=/etc/passwd"), 2, "bad_tasks"),
        (("--set", "server.port=70000"), 2, "bad_setting"),
        (("--replicas", "0"), 2, "usage"),
        (("--no-gateway", "--set", "gateway.enabled=true"), 2, "bad_setting"),
    ],
)
def test_a_front_that_cannot_be_is_refused_first(
    capsys: OUTER, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], status: int, code: str
) -> None:
    """What is wrong with address, keys or gateway is said before an engine is installed or a model fetched."""
    monkeypatch.setattr("qwen3emb_launch.cli.launching._engine_here", lambda *_: pytest.fail("too late"))
    seen, body = envelope(capsys, "up", "--profile", "demo", *args)
    assert (seen, body["error"]["code"]) == (status, code)


@pytest.fixture
def new_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An RTX 4090, no engine, no model; to install or to download either fails the test."""
    from qwen3emb_launch import engines
    from qwen3emb_launch.hub import downloading

    card = GpuFacts(0, "NVIDIA GeForce RTX 4090", "b", 24 * 2**30, 23 * 2**30, (8, 9))
    monkeypatch.setattr(gpu, "inventory", lambda *_: [card])
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(engines, "install", lambda *_, **__: pytest.fail("installed"))
    monkeypatch.setattr(downloading, "download", lambda *_, **__: pytest.fail("downloaded"))


@pytest.mark.usefixtures("new_machine")
@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("--model", "/nowhere"), 2, "not_a_model"),
        (("--model", "8b", "--set", "mem_fraction_static=0.5"), 3, "vram"),
        (("--set", "mem_fraction_sttic=0.8"), 2, "unknown_setting"),
        (("--set", "enable-prompt-trust-remote-code=true"), 2, "unknown_setting"),
        (("--set", "kv_cache_dtype=fp9"), 2, "bad_setting"),
        (("--set", "context_length=99999"), 2, "context_too_long"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_it_is_fetched(
    capsys: OUTER, args: tuple[str, ...], status: int, code: str
) -> None:
    """On a new machine no gigabyte is fetched for a plan that engine and model, once here, would not save."""
    seen, body = envelope(capsys, "up", *args)
    assert (seen, body["error"]["code"]) == (status, code)


@pytest.mark.usefixtures("new_machine")
@pytest.mark.parametrize("profile", ["rtx4090", "rtx4090:lean", "rtx4090:fp8"])
def test_what_can_be_launched_is_fetched(monkeypatch: pytest.MonkeyPatch, profile: str) -> None:
    """What is known beforehand refuses nothing that would be served."""

    class FetchedError(Exception):
        pass

    def fetch(*_: object, **__: object) -> None:
        raise FetchedError

    monkeypatch.setattr("qwen3emb_launch.engines.install", fetch)
    options = launching.LaunchOptions(profile=profile)
    console = Console("up")
    with pytest.raises(FetchedError):
        launching.make_plan(options, launching.choose(options, console), console)


def test_a_port_given_as_a_setting_is_the_one_that_is_looked_at(capsys: OUTER, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--set server.port` and QWEN3EMB_SET_SERVER__PORT name the port whose holder is told."""
    monkeypatch.setattr("qwen3emb_launch.cli.up.make_plan", lambda *_: pytest.fail("too late"))
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        _, body = envelope(capsys, "up", "--profile", "demo", "--set", f"server.port={port}")
    assert (body["error"]["code"], body["error"]["details"]["port"]) == ("port_in_use", port)


def test_port_in_use_names_its_holder(capsys: OUTER) -> None:
    """A taken port is refused before anything is fetched, with the holder's pid and a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        status, body = envelope(capsys, "up", "--profile", "demo", "--port", str(port))
    assert (status, body["error"]["code"]) == (3, "port_in_use")
    assert f"pid {os.getpid()}" in body["error"]["message"]
    assert "--port" in body["error"]["hint"]


def test_high_port_in_use_is_told_too(capsys: OUTER) -> None:
    """Above what an engine could take a gateway may listen: who holds such a port is said, and a lower one offered."""
    with contextlib.ExitStack() as held:
        # Asked for any port, the kernel gives the upper ones only after some ten thousand others.
        for port in range(65535, 55535, -1):
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                break
        status, body = envelope(capsys, "up", "--profile", "demo", "--port", str(port))
    assert (status, body["error"]["code"]) == (3, "port_in_use")
    assert 30000 <= int(body["error"]["hint"].rsplit(" ", 1)[1]) <= 55535


def test_port_held_by_an_instance_is_told_by_its_name(capsys: OUTER, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that one of our own holds, itself or a process below it: its name, and the command that stops it."""
    above = state.identify(os.getpid())
    record = SimpleNamespace(supervisor=above)
    monkeypatch.setattr(state, "instances", lambda: [SimpleNamespace(name="mine", running=True, record=record)])
    code = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); sys.stdin.read()"
    below = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with below, pytest.raises(UnfitError) as caught:
        check_free("127.0.0.1", int(below.stdout.readline()))
    assert f"the instance mine, pid {below.pid}" in caught.value.message
    assert caught.value.hint.startswith("qwen3emb down mine, or: qwen3emb up --port ")


@pytest.mark.parametrize("host", ["999.1.1.1", "192.0.2.1", "no such host"])
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_address_of_another_machine_is_refused(capsys: OUTER, host: str, dry: list[str]) -> None:
    """Also by a dry run, before anything is planned."""
    status, body = envelope(capsys, "up", "--profile", "demo", "--host", host, *dry)
    assert (status, body["error"]["code"]) == (2, "bad_host")


def test_privileged_port_is_said(capsys: OUTER, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port below 1024 without the right to it is no traceback."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr("qwen3emb_launch.engine_process.ports.free_port", lambda *_: 30000)
    status, body = envelope(capsys, "up", "--profile", "demo", "--port", "80")
    assert (status, body["error"]["code"]) == (3, "port_privileged")


def test_second_up_of_a_name_is_refused(capsys: OUTER, planned: Any) -> None:
    """While an instance lives its name is taken, and the error says by whom."""
    planned()
    claim = state.claim("demo")
    status, body = envelope(capsys, "up", "--profile", "demo", "-d")
    assert (status, body["error"]["code"]) == (3, "already_running")
    assert f"pid {os.getpid()}" in body["error"]["message"]
    claim.release()


def test_unwritable_state_folder(capsys: OUTER, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A state folder that cannot be used is exit 3, before anything is started."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QWEN3EMB_STATE_DIR", str(tmp_path / "file" / "x"))
    status, body = envelope(capsys, "up", "--profile", "demo", "--port", str(free_port()))
    assert (status, body["error"]["code"]) == (3, "state_unwritable")


def test_offline_installs_nothing(capsys: OUTER, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--offline with no engine environment is exit 3 with the command that installs one."""
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    status, body = envelope(capsys, "up", "--profile", "demo", "--offline", "--port", str(free_port()))
    assert (status, body["error"]["code"]) == (3, "engine_missing")
    assert "engine install cpu" in body["error"]["hint"]


def test_best_card_of_the_profile_is_taken() -> None:
    """Of several GPUs the one that the profile is for wins, then the one with the most free memory."""
    from qwen3emb_launch import profile_files

    gib = 2**30
    cards = [
        GpuFacts(0, "NVIDIA A10", "a", 23 * gib, 23 * gib, (8, 6)),
        GpuFacts(1, "NVIDIA GeForce RTX 4090", "b", 24 * gib, 10 * gib, (8, 9)),
        GpuFacts(2, "NVIDIA GeForce RTX 4090", "c", 24 * gib, 20 * gib, (8, 9)),
    ]
    taken = planning.card_for(profile_files.load("rtx4090"), cards)
    assert taken is not None
    assert taken.index == 2


def test_status_of_nothing(capsys: OUTER) -> None:
    """With no instance status is quiet, exit 0, and says how to begin."""
    assert run(["status"]) == 0
    assert "qwen3emb up" in capsys.readouterr().err
    status, body = envelope(capsys, "status")
    assert (status, body["result"]) == (0, {"instances": []})


def test_status_survives_a_broken_record(capsys: OUTER) -> None:
    """A record that cannot be read is shown as failed, with a warning on stderr."""
    claim = state.claim("broken")
    (claim.folder / "instance.json").write_text('{"schema": 1, "na')
    assert run(["status"]) == 0
    out, err = capsys.readouterr()
    assert "broken\tfailed" in out
    assert "cannot be read" in err


@pytest.mark.parametrize("command", ["status", "logs", "down"])
def test_unknown_instance(capsys: OUTER, command: str) -> None:
    """A name that does not exist is exit 2 everywhere."""
    status, body = envelope(capsys, command, "nobody")
    assert (status, body["error"]["code"]) == (2, "unknown_instance")


def test_down_of_nothing_is_no_error(capsys: OUTER) -> None:
    """Nothing to stop, or an instance that is not running: said, exit 0."""
    assert run(["down"]) == 0
    assert run(["down", "--all"]) == 0
    state.claim("idle").release()
    assert run(["down", "idle"]) == 0
    assert "idle was not running" in capsys.readouterr().out


def test_down_kills_what_does_not_end(capsys: OUTER, planned: Any) -> None:
    """With --timeout 0 running requests are not waited for, and everything is gone all the same."""
    planned({"drain": 600})
    assert run(["up", "--profile", "demo", "-d"]) == 0
    engine = state.running("demo")[1].engines[0].pid
    capsys.readouterr()
    status, body = envelope(capsys, "down", "--timeout", "0")
    assert (status, body["result"]["stopped"][0]["killed"]) == (0, True)
    assert gone(engine)
    assert state.find("demo").state is State.STOPPED


def test_down_ends_an_instance_whose_record_is_broken(planned: Any) -> None:
    """Half a state file hides no supervisor: the lock names it, and nothing of it is left."""
    planned()
    assert run(["up", "--profile", "demo", "-d"]) == 0
    instance, record = state.running("demo")
    (instance.folder / "instance.json").write_text('{"state": "rea')
    assert run(["down", "demo"]) == 0
    assert not record.supervisor.alive
    assert not record.engines[0].alive
    assert state.lock_holder(instance.folder) is None


def test_logs_follow_over_a_restart(planned: Any) -> None:
    """logs -f goes on with the next start's file, and ends with the instance."""
    planned()
    assert run(["up", "--profile", "demo", "-d"]) == 0
    following = subprocess.Popen(
        [sys.executable, "-m", "qwen3emb_launch", "logs", "-f", "demo"], stdout=subprocess.PIPE, text=True
    )
    assert following.stdout is not None
    assert following.stdout.readline().startswith("server_args")
    before = state.running("demo")[1]
    os.kill(before.engines[0].pid, signal.SIGKILL)
    until(lambda: (r := state.running("demo")[1]).restarts == 1 and r.state is State.READY, "the restart")
    assert run(["down", "demo"]) == 0
    rest = following.stdout.read()  # what readline() took beyond its line is in there too
    assert following.wait(20) == 0
    assert rest.count("fired up") == 2


def test_logs_of_a_never_started_instance(capsys: OUTER) -> None:
    """No log yet is said, not an empty answer."""
    state.claim("idle").release()
    status, body = envelope(capsys, "logs", "idle")
    assert (status, body["error"]["code"]) == (2, "no_log")


def test_the_gateways_workers_go_by_this_machine_and_its_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two before a GPU on sixteen cores; one on a CPU engine, and where a key has a limit."""
    from qwen3emb_launch import profile_files

    monkeypatch.setattr("qwen3emb_launch.gateway.host.usable_cores", lambda: 16)
    h100, demo = (launching.Chosen(profile_files.load(name), None, name) for name in ("h100", "demo"))
    keys = tmp_path / "keys"
    keys.write_text("alice sk-alice\n")
    with_keys = launching.LaunchOptions(settings=(f"gateway.api_keys={keys}",))
    assert h100.gateway_workers(launching.LaunchOptions()) == h100.gateway_workers(with_keys) == 2
    assert demo.gateway_workers(launching.LaunchOptions()) == 1
    keys.write_text("alice sk-alice rpm=60\n")
    assert h100.gateway_workers(with_keys) == 1
    variable = {"QWEN3EMB_SET_GATEWAY__API_KEYS": str(keys)}
    assert h100.gateway_workers(launching.LaunchOptions(), variable) == 1
    monkeypatch.setenv(*next(iter(variable.items())))
    assert h100.gateway_workers(launching.LaunchOptions(), {}) == 2, "a service's environment is not this one"
    nowhere = f"gateway.api_keys={tmp_path / 'none'}"
    with pytest.raises(InvalidInputError) as caught:
        h100.gateway_workers(launching.LaunchOptions(settings=(nowhere,)))
    assert caught.value.code == "bad_keys"
    bare = launching.LaunchOptions(settings=(nowhere, "gateway.enabled=false"))
    assert h100.gateway_workers(bare) == 1, "no gateway reads no keys"
