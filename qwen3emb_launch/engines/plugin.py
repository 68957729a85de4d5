"""The engine plugin: a small wheel that this launcher carries, kept the same in every environment it starts."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.engines.record import translated


@dataclass(frozen=True)
class PluginWheel:
    """The wheel, on disk as long as the `with` lasts. `mark` is its version and content: another one is installed."""

    path: Path
    version: str
    mark: str


@contextmanager
def plugin_wheel() -> Iterator[PluginWheel | None]:
    """Build the wheel from what the launcher carries; nothing is fetched."""
    try:
        from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel
    except ImportError:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="qwen3emb-plugin-") as scratch:
        path = build_plugin_wheel(Path(scratch))
        version = path.name.split("-")[1]
        yield PluginWheel(path, version, f"{version}+{_content(path)}")


def unpack(wheel: PluginWheel, folder: Path) -> Path:
    """Lay the plugin beside an adopted environment, which is not written into; put it on PYTHONPATH."""
    target = folder / f"plugin-{wheel.mark}"
    if target.is_dir():
        return target
    with translated(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".plugin-") as scratch:
        with zipfile.ZipFile(wheel.path) as archive:
            archive.extractall(scratch)
        shutil.copytree(scratch, target)
    return target


def _content(path: Path) -> str:
    """Eight hex digits over names and bytes, whatever the archive's times."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            digest.update(name.encode() + b"\0" + archive.read(name))
    return digest.hexdigest()[:8]
