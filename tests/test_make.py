"""`make up` and its end: Ctrl-C is none of make's errors, everything else stays what it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="no make on this machine")

LAUNCHER = """\
#!{python}
import signal, sys, time

def stop(number, _):
    print("stopping", flush=True)
    time.sleep(0.3)
    print("nothing of it is left", flush=True)
    sys.exit(130 if number == signal.SIGINT else 0)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("serves", *sys.argv[1:], flush=True)
{then}
"""


@pytest.fixture
def make_up(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Starts `make up` with a launcher that, once it serves, does what it is told; in a process group of its own."""

    def start(then: str) -> subprocess.Popen[str]:
        place = tmp_path / "bin"
        place.mkdir()
        (place / "python").symlink_to(sys.executable)
        (place / "qwen3emb").write_text(LAUNCHER.format(python=sys.executable, then=then))
        (place / "qwen3emb").chmod(0o755)
        (tmp_path / ".launcher").touch()
        words = [str(MAKE), "up", f"VENV={tmp_path}", f"--old-file={tmp_path}/.launcher"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ,
            start_new_session=True,
        )  # fmt: skip

    return start


def until_it_serves(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("serves"):
            return line
    pytest.fail("it never served")


def test_ctrl_c_ends_it_quietly(make_up: Callable[[str], subprocess.Popen[str]]) -> None:
    """The whole group hears it, as from a terminal; the launcher has its time, and make no error to tell."""
    with make_up("time.sleep(60)") as process:
        assert until_it_serves(process) == "serves up --profile demo\n"
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=30)
    assert said == "stopping\nnothing of it is left\n"


def test_a_make_that_is_ended_ends_the_launcher(make_up: Callable[[str], subprocess.Popen[str]]) -> None:
    """SIGTERM to make alone, as from a service manager, reaches what serves, and is waited for."""
    with make_up("time.sleep(60)") as process:
        until_it_serves(process)
        process.terminate()
        said, _ = process.communicate(timeout=30)
    assert said.startswith("stopping\nnothing of it is left\n")


@pytest.mark.parametrize(
    ("then", "status", "word"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(4)", 2, "Error 4"),
        ("sys.exit(1)", 2, "Error 1"),
        ("signal.raise_signal(signal.SIGKILL)", 2, "Error 137"),
    ],
)
def test_failures_stay_failures(
    make_up: Callable[[str], subprocess.Popen[str]], then: str, status: int, word: str
) -> None:
    """An engine that died, a refusal, a kill: make says it and fails."""
    with make_up(then) as process:
        until_it_serves(process)
        said, _ = process.communicate(timeout=30)
    assert (process.returncode, word in said) == (status, True)
    assert bool(said) == bool(word)
