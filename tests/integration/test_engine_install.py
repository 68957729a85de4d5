"""The real cpu engine environment, as `qwen3emb engine install cpu` built it."""

from __future__ import annotations

import time

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


def test_find_does_not_start_python() -> None:
    """Finding the environment costs milliseconds: under 50, best of five."""

    def once() -> float:
        started = time.perf_counter()
        engines.find("cpu")
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.05


def test_check_starts_it_and_finds_it_whole() -> None:
    """Every file is there, and the real server imports."""
    report = engines.check("cpu")
    assert report.ok, report
    assert report.damage == ()
    assert len(report.flags) > 300
    assert report.device["cuda_available"] is False or report.device["gpus"]


def test_installing_again_returns_at_once() -> None:
    """`make test` calls it each time: a complete environment takes under a second, best of three."""

    def once() -> float:
        started = time.perf_counter()
        assert engines.install("cpu").did == "nothing"
        return time.perf_counter() - started

    assert min(once() for _ in range(3)) < 1.0
