"""What a test run must not leave on the machine: names that are new where the user's own installation lives, processes.

Engine environments are shared with the user on purpose (they weigh gigabytes), so a test that writes there spoils what
the next run, or the user, finds. A supervisor behind the shell outlives its test by design. The whole run fails then,
and says which. A plugin of pytest: conftest takes it.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

import psutil
import pytest

from qwen3emb_launch.paths import paths

# Packages of the clients that test_gateway_compat.py runs: fetched once, like the engine.
KEPT = "compat"
FOUND = pytest.StashKey[set[str]]()
RUN = "QWEN3EMB_TEST_RUN"


def names() -> set[str]:
    """Environments, instances, settings and units that are there, with what lies in them."""
    user = paths()
    roots = (user.engines, user.state, user.config, user.cache, Path("/var/lib/qwen3emb"))
    found = {
        str(path)
        for root in roots
        for depth in ("*", "*/*")
        for path in root.glob(depth)
        if path.relative_to(root).parts[0] != KEPT
    }
    return found | {str(path) for path in Path("/etc/systemd/system").glob("*qwen3emb*")}


def processes() -> set[str]:
    """The launcher's and the tests' programs that this run has started, told by what it put into its environment."""
    here = str(Path(__file__).parent)
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        ours = any("qwen3emb_launch" in word or word.startswith(here) for word in words[1:])
        if not ours or "pytest" in words:
            continue
        with contextlib.suppress(psutil.Error):
            if process.environ().get(RUN) == os.environ[RUN]:
                found.add(f"process {process.pid}: {' '.join(words[1:])[:160]}")
    return found


def left(before: set[str], seconds: float = 3) -> list[str]:
    """Names there are more than `before`, and processes; one that is about to end gets `seconds` for it."""
    end = time.monotonic() + seconds
    while (running := processes()) and time.monotonic() < end:
        time.sleep(0.2)
    return sorted(names() - before | running)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember what there is; the workers of a parallel run leave that to the one that starts them."""
    if not hasattr(session.config, "workerinput"):
        os.environ[RUN] = str(uuid.uuid4())
        session.config.stash[FOUND] = names()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when there is more."""
    if FOUND not in session.config.stash:
        return
    new = left(session.config.stash[FOUND])
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if new:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if new and reporter:
        reporter.write_sep("=", "the tests left something behind", red=True)
        reporter.write_line("\n".join(new))
