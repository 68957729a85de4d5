"""The check at the end of a test run, itself run on a small one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEST = """
import os
from pathlib import Path
def test_that_passes():
    Path(os.environ["QWEN3EMB_DATA_DIR"], {place!r}).mkdir(parents=True, exist_ok=True)
"""


@pytest.mark.parametrize(("place", "status"), [("engines/cpu/env-1", 1), ("elsewhere", 0), ("engines/there", 0)])
def test_a_run_that_leaves_an_environment_behind_fails(tmp_path: Path, place: str, status: int) -> None:
    """Every test passes, and the run does not: it names what is new in the user's data folder."""
    (tmp_path / "test_small.py").write_text(TEST.format(place=place))
    (tmp_path / "data" / "engines" / "there").mkdir(parents=True)
    done = small_run(tmp_path)
    assert (done.returncode, "1 passed" in done.stdout) == (status, True), done.stdout + done.stderr
    assert (str(tmp_path / "data" / place) in done.stdout) == bool(status)


PROCESS = """
import subprocess
import sys
def test_that_passes():
    program = "import sys; open(sys.argv[1], 'w').write('up'); sys.stdin.read()"
    left = subprocess.Popen([sys.executable, "-c", program, {pid!r}, "qwen3emb_launch"], stdin={stdin}, stdout=-3)
    open({pid!r} + ".pid", "w").write(str(left.pid))
"""


def test_a_run_that_leaves_a_process_behind_fails(tmp_path: Path) -> None:
    """A supervisor that nobody took down is named; those of other runs beside this one are not."""
    reading, writing = os.pipe()
    try:
        (tmp_path / "test_small.py").write_text(PROCESS.format(pid=str(tmp_path / "up"), stdin=reading))
        done = small_run(tmp_path, pass_fds=(reading,))
    finally:
        os.close(writing)  # ends it
        os.close(reading)
    assert (done.returncode, "1 passed" in done.stdout) == (1, True), done.stdout + done.stderr
    assert f"process {(tmp_path / 'up.pid').read_text()}: " in done.stdout


def small_run(folder: Path, pass_fds: tuple[int, ...] = ()) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "QWEN3EMB_DATA_DIR": str(folder / "data"), "PYTHONPATH": str(Path(__file__).parent)}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of this installation have nothing to do with it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "left_behind", "-p", "no:cacheprovider", "test_small.py"]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120, pass_fds=pass_fds
    )
