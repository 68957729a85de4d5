"""The short fault run: whatever is broken on purpose, nothing is left over, nothing is wrong, nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).resolve().parents[1] / "benchmarks" / "chaos.py"


def test_short_fault_run() -> None:
    """Engine, guard, gateway and supervisor killed or stopped, memory, port and disk gone, state files cut, names
    fought for: behind the gateway no request fails for an engine's fault, and every row keeps its promise. How fast is
    not judged here: other tests run beside it."""
    command = [sys.executable, str(CHAOS), "--short", "--gateway", "with", "--any-speed", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["misses"] == [], done.stderr
    assert len(found["rows"]) >= 14
    assert sum(row["sent"] for row in found["rows"]) > 50
