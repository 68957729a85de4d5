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
    environ = {**os.environ, "QWEN3EMB_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(Path(__file__).parent)}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of this installation have nothing to do with it
    command = [sys.executable, "-m", "pytest", "-q", "-p", "left_behind", "-p", "no:cacheprovider", "test_small.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "1 passed" in done.stdout) == (status, True), done.stdout + done.stderr
    assert (str(tmp_path / "data" / place) in done.stdout) == bool(status)
