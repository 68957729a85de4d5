"""The engine plugin's wheel, as `engine install` gets it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel
from qwen3emb_launch.errors import UnfitError


def test_pip_installs_it_and_the_entry_point_is_found(tmp_path: Path) -> None:
    """The wheel passes pip, needs nothing else, and importlib sees the plugin under SGLang's group."""
    wheel = build_plugin_wheel(tmp_path)
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
        timeout=120,
    )
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlib.metadata import entry_points, version\n"
            "print([p.value for p in entry_points(group='sglang.srt.plugins')], version('qwen3emb-engine-plugin'))",
        ],
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.split() == ["['qwen3emb_engine_plugin:register']", wheel.name.split("-")[1]]


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    """A rebuilt wheel is no new plugin: environments are not touched for it."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert build_plugin_wheel(tmp_path / "a").read_bytes() == build_plugin_wheel(tmp_path / "b").read_bytes()


def test_nothing_but_sources_and_metadata_is_packed(tmp_path: Path) -> None:
    """No caches, no tests; every file is in RECORD."""
    with zipfile.ZipFile(build_plugin_wheel(tmp_path)) as archive:
        names = archive.namelist()
        record = archive.read(next(n for n in names if n.endswith("RECORD"))).decode()
    assert all(name.endswith(".py") or ".dist-info/" in name for name in names)
    assert sorted(line.split(",")[0] for line in record.splitlines()) == sorted(names)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The error names the file and the folder to look at."""
    with pytest.raises(UnfitError, match="cannot write") as caught:
        build_plugin_wheel(tmp_path / "missing")
    assert caught.value.code == "folder_unwritable"
    assert str(tmp_path) in caught.value.hint
