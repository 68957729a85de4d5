"""The real cpu engine environment, as `qwen3emb engine install cpu` built it."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from qwen3emb_launch import engines
from qwen3emb_launch.engines import releases

pytestmark = pytest.mark.engine


def test_the_cpu_environment_knows_what_a_launch_needs() -> None:
    """Its facts hold the pinned version, the variable the CPU engine needs, and the flags of the real server."""
    facts = engines.find("cpu")
    assert facts.version == releases.CPU_VERSION
    assert facts.environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert facts.flags["--is-embedding"].takes_value is False
    assert facts.flags["--model-path"].takes_value is True
    assert "bfloat16" in facts.flags["--dtype"].choices
    assert "--enable-prompt-trust-remote-code" not in facts.flags
    assert facts.packages["torch"].startswith("2.14.1")
    assert facts.packages["transformers"] == "5.12.1"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is started meanwhile: a Python takes a tenth of a second, one that imports the engine six."""
    seen: list[object] = []

    class Popen(subprocess.Popen):
        def __init__(self, words: Any, *more: Any, **options: Any) -> None:
            seen.append(words)
            super().__init__(words, *more, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return seen


def test_find_does_not_start_python(started: list[object]) -> None:
    """Finding the environment reads a few files: 3 ms here."""
    assert engines.find("cpu").version == releases.CPU_VERSION
    assert not started


def test_check_starts_it_and_finds_it_whole() -> None:
    """Every file is there, and the real server imports."""
    report = engines.check("cpu")
    assert report.ok, report
    assert report.damage == ()
    assert len(report.flags) > 300
    assert report.device["cuda_available"] is False or report.device["gpus"]


def test_installing_again_returns_at_once(started: list[object]) -> None:
    """`make test` calls it each time: a complete environment is looked at, in 6 ms here, and nothing is started. But
    for the plugin, where another tree has put its own there; not three times in a row."""
    counts = []
    for _ in range(3):
        assert engines.install("cpu").did == "nothing"
        counts.append(len(started))
        started.clear()
    assert min(counts) == 0
