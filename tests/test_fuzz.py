"""Files that others wrote, or a broken disk: whatever lies there is read or refused in words, never a crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_targets import TARGETS, samples, survives
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

DEEP = b"[" * 100_000
MUTATION = st.tuples(st.integers(0, 1 << 16), st.integers(0, 64), st.binary(max_size=12))


@pytest.fixture(autouse=True)
def no_engine_of_the_users(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One target writes an engine environment's record, which lies in the data folder that tests share."""
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(own_folders / "data"))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200), mutations=st.lists(MUTATION, max_size=6), which=st.integers(0, 3))
@example(noise=DEEP, mutations=[], which=0)
@example(noise=b'{"schema": {"a": ' * 5000, mutations=[], which=0)
@example(noise=b"- " * 5000, mutations=[], which=0)
@example(noise=b"1" * 5000, mutations=[], which=0)  # an integer that Python refuses to read
@example(noise=b'"a word"\n{}\n', mutations=[], which=0)  # JSON, and no object
@example(noise=b"\x00\xff\xfe", mutations=[], which=0)
def test_whatever_lies_there_is_read_or_refused(
    name: str, tmp_path: Path, noise: bytes, mutations: list[tuple[int, int, bytes]], which: int
) -> None:
    """Noise, and good files with pieces cut out and put in, raise our own error or none."""
    assert survives(name, tmp_path, noise)
    good = samples(name)
    data = good[which % len(good)]
    for at, cut, put in mutations:
        at %= len(data) + 1
        data = data[:at] + put + data[at + cut :]
    assert survives(name, tmp_path, data)


@pytest.mark.parametrize("name", TARGETS)
def test_every_cut_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """A good file that ends too early, at some forty places."""
    for data in samples(name):
        for end in range(0, len(data), max(1, len(data) // 40)):
            assert survives(name, tmp_path, data[:end])
