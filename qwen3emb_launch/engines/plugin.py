"""The engine plugin: a small wheel that this launcher carries, kept the same in every environment it starts."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel
from qwen3emb_launch.engines.record import translated


@dataclass(frozen=True)
class PluginWheel:
    """The wheel, on disk as long as the `with` lasts. `mark` is its version and content: another one gets installed."""

    path: Path
    version: str
    mark: str


@contextmanager
def plugin_wheel() -> Iterator[PluginWheel]:
    """Build the wheel from what the launcher carries; nothing is fetched."""
    with tempfile.TemporaryDirectory(prefix="qwen3emb-plugin-") as scratch:
        path = build_plugin_wheel(Path(scratch))
        version = path.name.split("-")[1]
        yield PluginWheel(path, version, f"{version}+{sha256(path.read_bytes()).hexdigest()[:8]}")


def unpack(wheel: PluginWheel, folder: Path) -> Path:
    """Lay the plugin beside an adopted environment, which is not written into; put it on PYTHONPATH."""
    target = folder / f"plugin-{wheel.mark}"
    if target.is_dir():
        return target
    with translated(folder):
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".plugin-"))
        try:
            with zipfile.ZipFile(wheel.path) as archive:
                archive.extractall(scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target
