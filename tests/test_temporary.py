"""An instance for one run: whatever way the run ends, what it started ends too. `up` is a script here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from supervised import gone, until

from qwen3emb_launch.cli import temporary
from qwen3emb_launch.errors import EngineFailedError, LaunchError, UnfitError

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
    with temporary.serving(["--profile", "demo"], 20) as answer:
        assert answer == READY["result"]
        assert not gone(pid(folder))
    assert gone(pid(folder))
    assert json.loads((folder / "argv").read_text()) == ["--profile", "demo", "--json"]
    assert (folder / "signals").read_text() == "1"


def test_without_drain_it_ends_at_once(fake) -> None:
    """A second SIGTERM follows: an `up` that would wait for requests does not."""
    folder = fake(SERVE, patience=2)
    with temporary.serving([], 20, drain=False):
        pass
    assert gone(pid(folder))
    assert (folder / "signals").read_text() == "2"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_it_ends_whatever_leaves_the_block(fake, error: type[BaseException]) -> None:
    """Ctrl-C and a defect end it as the block's end does."""
    folder = fake(SERVE)
    with pytest.raises(error), temporary.serving([], 20):
        raise error
    assert gone(pid(folder))


def test_the_error_that_up_reports_is_raised(fake) -> None:
    """Code, message, hint and last lines as `up` said them; the exit status decides the kind."""
    failed = {"ok": False, "error": {"code": "vram", "message": "too small", "hint": "smaller", "details": {"a": 1}}}
    fake(f"print(json.dumps({failed!r})); sys.exit(3)")
    with pytest.raises(UnfitError) as found, temporary.serving(["--set", "tp=1"], 20):
        pass
    assert (found.value.code, found.value.hint, found.value.details) == ("vram", "smaller", {"a": 1})
    assert "too small" in found.value.message


@pytest.mark.parametrize("body", ["sys.exit(7)", "print('no JSON'); sys.exit(7)", "os.kill(os.getpid(), 9)"])
def test_an_up_that_dies_without_a_word_is_an_error(fake, body: str) -> None:
    """Its exit status is what there is to tell."""
    fake(body)
    with pytest.raises(EngineFailedError) as found, temporary.serving([], 20):
        pass
    assert found.value.code == "start_failed"
    assert "exit status" in found.value.message


def test_one_that_never_serves_is_ended_in_time(fake) -> None:
    """The deadline is the caller's."""
    folder = fake("while True: time.sleep(60)")
    with pytest.raises(LaunchError) as found, temporary.serving([], 0.5):
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
with temporary.serving([], 20):
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
