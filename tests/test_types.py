"""Types, checked beside the other tests: on a clean checkout mypy takes as long as the longest of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_types_are_strict() -> None:
    """mypy, as pyproject.toml sets it up, has nothing to say."""
    command = [sys.executable, "-m", "mypy"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
