"""What a test run must not leave on the machine: names that are new where the user's own installation lives.

Engine environments are shared with the user on purpose (they weigh gigabytes), so a test that writes there spoils what
the next run, or the user, finds. The whole run fails then, and says which names. A plugin of pytest: conftest takes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3emb_launch.paths import paths

# Packages of the clients that test_gateway_compat.py runs: fetched once, like the engine.
KEPT = "compat"
FOUND = pytest.StashKey[set[str]]()


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


def pytest_sessionstart(session: pytest.Session) -> None:
    """Remember what there is; the workers of a parallel run leave that to the one that starts them."""
    if not hasattr(session.config, "workerinput"):
        session.config.stash[FOUND] = names()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when there is more."""
    if FOUND not in session.config.stash:
        return
    new = sorted(names() - session.config.stash[FOUND])
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if new:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if new and reporter:
        reporter.write_sep("=", "the tests left something behind", red=True)
        reporter.write_line("\n".join(new))
