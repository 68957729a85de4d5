"""An instance for one run: whatever way the run ends, what it started ends too. `up` is a script here."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from supervised import gone, until

from qwen3emb_launch import state
from qwen3emb_launch.cli import temporary
from qwen3emb_launch.cli.app import run as cli
from qwen3emb_launch.doctor import engine
from qwen3emb_launch.errors import (
    CheckFailedError,
    EngineFailedError,
    InterruptedByUser,
    InvalidInputError,
    LaunchError,
    UnfitError,
)
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.paths import paths
from qwen3emb_launch.state import passing

READY = {"ok": True, "result": {"name": "x", "base_url": "http://127.0.0.1:1/v1"}}
HEAD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(os.environ["FAKE_UP"])
(folder / "pid").write_text(str(os.getpid()))
(folder / "argv").write_text(json.dumps(sys.argv[1:]))
signals = []
def note(number, frame):
    signals.append(number)
    (folder / "signals").write_text(str(len(signals)))
    if len(signals) >= int(os.environ.get("FAKE_PATIENCE", 1)):
        sys.exit(0)
signal.signal(signal.SIGTERM, note)
"""
SERVE = f"print(json.dumps({READY!r}), flush=True)\nwhile True: time.sleep(60)\n"


def nobody(text: str) -> None:
    """Listens."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes `up` the given body of Python; gives the folder where it leaves its traces."""

    def make(body: str, patience: int = 1) -> Path:
        script = tmp_path / "up.py"
        script.write_text(HEAD + textwrap.dedent(body))
        monkeypatch.setattr(temporary, "COMMAND", (sys.executable, str(script)))
        monkeypatch.setenv("FAKE_UP", str(tmp_path))
        monkeypatch.setenv("FAKE_PATIENCE", str(patience))
        return tmp_path

    return make


def pid(folder: Path) -> int:
    return int(until(lambda: (folder / "pid").exists() and (folder / "pid").read_text(), "the child's pid"))


def test_it_serves_for_the_block_and_ends_with_it(fake) -> None:
    """The words go to `up`, its answer comes back, and nothing of it is left afterwards."""
    folder = fake(SERVE)
    with temporary.serving("x", ["--profile", "demo"], 20, say=nobody) as run:
        assert run.answer == READY["result"]
        assert not gone(pid(folder))
    assert gone(pid(folder))
    assert json.loads((folder / "argv").read_text()) == ["--name", "x", "--profile", "demo", "--json"]
    assert (folder / "signals").read_text() == "1"


def test_without_drain_it_ends_at_once(fake) -> None:
    """A second SIGTERM follows: an `up` that would wait for requests does not."""
    folder = fake(SERVE, patience=2)
    with temporary.serving("x", [], 20, drain=False, say=nobody):
        pass
    assert gone(pid(folder))
    assert (folder / "signals").read_text() == "2"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_ends_whatever_leaves_the_block(fake, error: type[BaseException]) -> None:
    """Ctrl-C and a defect end it as the block's end does."""
    folder = fake(SERVE)
    with pytest.raises(error), temporary.serving("x", [], 20, say=nobody):
        raise error
    assert gone(pid(folder))


def test_the_error_that_up_reports_is_raised(fake) -> None:
    """Code, message, hint and last lines as `up` said them; the exit status decides the kind."""
    failed = {"ok": False, "error": {"code": "vram", "message": "too small", "hint": "smaller", "details": {"a": 1}}}
    fake(f"print(json.dumps({failed!r})); sys.exit(3)")
    with pytest.raises(UnfitError) as found, temporary.serving("x", ["--set", "tp=1"], 20, say=nobody):
        pass
    assert (found.value.code, found.value.hint, found.value.details) == ("vram", "smaller", {"a": 1})
    assert "too small" in found.value.message


@pytest.mark.parametrize("body", ["sys.exit(7)", "print('no JSON'); sys.exit(7)", "os.kill(os.getpid(), 9)"])
def test_an_up_that_dies_without_a_word_is_an_error(fake, body: str) -> None:
    """Its exit status is what there is to tell."""
    fake(body)
    with pytest.raises(EngineFailedError) as found, temporary.serving("x", [], 20, say=nobody):
        pass
    assert found.value.code == "start_failed"
    assert "exit status" in found.value.message


def test_one_that_never_serves_is_ended_in_time(fake) -> None:
    """The deadline is the caller's."""
    folder = fake("while True: time.sleep(60)")
    with pytest.raises(LaunchError) as found, temporary.serving("x", [], 0.5, say=nobody):
        pass
    assert found.value.code == "out_of_time"
    assert gone(pid(folder))


def test_it_does_not_outlive_a_killed_command(fake) -> None:
    """SIGKILL of the command that started it: the kernel sends it SIGTERM."""
    folder = fake(SERVE)
    script = f"""
import sys
from qwen3emb_launch.cli import temporary
temporary.COMMAND = {temporary.COMMAND!r}
with temporary.serving("x", [], 20, say=print):
    print("serving", flush=True)
    sys.stdin.read()
"""
    command = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert command.stdout is not None
        assert command.stdout.readline() == b"serving\n"
        command.send_signal(signal.SIGKILL)
        until(lambda: gone(pid(folder)), "the child's end")
    finally:
        command.kill()
        command.wait()
        command.stdout.close()
        command.stdin.close()


# ---- what is left of it -------------------------------------------------------------------------------------------

FAILED = {"ok": False, "error": {"code": "engine_died", "message": "it died", "hint": "qwen3emb logs"}}
# What a supervisor leaves: STATE, RESTARTS and how often this name was started are in the environment.
LEAVES = """
from qwen3emb_launch import state
from test_state import record
def leave(ends=state.records.State.STOPPED, restarts=0):
    name = sys.argv[sys.argv.index("--name") + 1]
    claim = state.claim(name)
    claim.plan.write_text("{}")
    for kind in ("engine", "gateway"):
        claim.new_log("20260101-000000", kind).write_text(f"{kind} of {sys.argv[-2]}\\n")
    claim.write(record(name, state=ends, restarts=restarts, supervisor=None))
    claim.release()
"""
SERVES, DIES = "leave()\n" + SERVE, f"leave(state.records.State.FAILED)\nprint(json.dumps({FAILED!r})); sys.exit(4)"


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli(["status", "--json"]) == 0
    return [row["name"] for row in json.loads(capsys.readouterr().out)["result"]["instances"]]


def logged(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli(["logs", name, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["result"]["lines"]


@pytest.fixture
def leaving(fake, monkeypatch: pytest.MonkeyPatch):
    """As `fake`, of an `up` that leaves an instance's folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    return lambda body: fake(textwrap.dedent(LEAVES) + body)


def test_a_run_that_went_well_leaves_nothing(leaving, capsys) -> None:
    """Also one that the user ended or asked for what there is not, or whose answers were right and too slow."""
    leaving(SERVES)
    said: list[str] = []
    with temporary.serving("x", [], 20, say=said.append):
        assert (paths().instances / "x" / "logs").exists()
    late, wide = CheckFailedError("slo_missed", "p95", ""), InvalidInputError("bad_load", "so many dims", "")
    for error in (KeyboardInterrupt(), InterruptedByUser("the user did"), late, wide):
        with pytest.raises(type(error)), temporary.serving("x", [], 20, say=said.append):
            raise error
    assert not list(paths().instances.iterdir())
    assert not said


def test_the_logs_of_a_failed_start_stay_and_are_named(leaving, capsys) -> None:
    """By `logs` and by the error. `status` does not list them, and `doctor` finds no fault of this machine in them."""
    leaving(DIES)
    said: list[str] = []
    with pytest.raises(EngineFailedError) as found, temporary.serving("x", ["words"], 20, say=said.append):
        pass
    assert found.value.details["log"] == str(paths().instances / "x/logs/engine-20260101-000000.log")
    assert said == ["x: its logs are kept: qwen3emb logs x"]
    assert logged("x", capsys) == ["engine of words"]
    assert state.find("x").state is State.FAILED
    assert listed(capsys) == []
    assert not [c for c in engine.checks("cpu", None) if "instance" in c.name]


@pytest.mark.parametrize("how", ["error", "wrong answers", "restart"])
def test_the_logs_of_a_run_that_failed_while_it_served_stay(leaving, capsys, how: str) -> None:
    """Also where no error tells of it: wrong answers, or an engine that died and was started again."""
    leaving("leave(restarts=1)\n" + SERVE if how == "restart" else SERVES)
    with contextlib.suppress(LaunchError), temporary.serving("x", ["words"], 20, say=nobody) as run:
        run.failed = how == "wrong answers"
        if how == "error":
            raise CheckFailedError("no_right_answer", "not one", "qwen3emb verify")
    assert logged("x", capsys) == ["engine of words"]


def test_a_later_run_that_goes_well_takes_its_own_logs_along_and_no_others(leaving, capsys) -> None:
    """tune starts trial after trial under one name: what one died of is not lost when the next one serves."""
    leaving(DIES)
    with pytest.raises(EngineFailedError), temporary.serving("x", ["first"], 20, say=nobody):
        pass
    leaving(SERVES)
    with temporary.serving("x", ["second"], 20, say=nobody):
        pass
    assert sorted(p.name for p in (paths().instances / "x" / "logs").iterdir()) == [
        "engine-20260101-000000.log", "gateway-20260101-000000.log"
    ]  # fmt: skip
    assert logged("x", capsys) == ["engine of first"]
    assert listed(capsys) == []


def test_what_is_kept_is_bounded() -> None:
    """Of all failed runs the last instances, whatever they were called; nothing is taken from one that runs."""
    passing.begin("running")
    held = state.claim("running")
    os.utime(held.folder / "temporary", (0, 0))
    for number in range(passing.KEEP + 2):
        run = passing.begin(f"x{number}")
        claim = state.claim(run.name)
        claim.new_log("20260101-000000").touch()
        claim.release()
        os.utime(claim.folder / "temporary", (1 + number, 1 + number))
        assert run.end(failed=True)
    kept = {folder.name for folder in paths().instances.iterdir()}
    held.release()
    assert kept == {"running", *(f"x{number}" for number in range(2, passing.KEEP + 2))}


def test_an_instance_of_the_users_own_is_left_as_it_is(leaving, capsys) -> None:
    """Somebody may have called theirs as a run calls its own."""
    leaving(SERVES)
    claim = state.claim("x")
    claim.plan.write_text("{}")
    claim.release()
    with temporary.serving("x", [], 20, say=nobody):
        pass
    assert listed(capsys) == ["x"]
    assert logged("x", capsys) == ["engine of x"]


def test_a_name_is_taken_again_whose_folder_went_away_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock was opened before its folder was removed: holding it would mean nothing."""
    real, taken = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if not taken:
            taken.append(fd)
            shutil.rmtree(paths().instances / "x")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    claim = state.claim("x")
    assert state.lock_holder(claim.folder) == state.identify(os.getpid())
    claim.release()
