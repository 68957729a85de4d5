"""What is kept of an environment on disk, and who may change it.

engines/<name>/engine.json    the record, written last: without it the environment does not exist for anybody
engines/<name>/env-<key>/     the virtual environment; another key (another lock) is built beside it, then swapped in
engines/<name>/wanted         flavour and version asked for, for the hints about an unfinished one
engines/<name>/install.log    pip's output, the last install's
engines/.<name>.lock          held (flock) by whoever changes the above, pip included
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import EngineFlag, Flavour
from qwen3emb_launch.paths import paths
from qwen3emb_launch.progress import Progress

SCHEMA = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Inspection:
    """What the environment's own python said about itself.

    `dist_info` is sglang's metadata folder and `stamp` its mtime in ns: they change when another sglang is put there.
    `device` holds cuda_available, cuda_build (torch's CUDA version or None) and the GPUs' names;
    `plugins` the engine plugins it would load, with versions.
    """

    flavour: Flavour
    version: str
    python_version: str
    dist_info: str
    stamp: int
    packages: Mapping[str, str]
    flags: Mapping[str, EngineFlag]
    device: Mapping[str, Any]
    plugins: Mapping[str, str | None]

    @property
    def site_packages(self) -> Path:
        """The folder that sglang is installed in."""
        return Path(self.dist_info).parent


@dataclass(frozen=True)
class Record:
    """One environment that was built or adopted to the end. `broken` says what a later check found."""

    name: str
    flavour: Flavour
    python: Path
    adopted: bool
    key: str  # of what it was built from (releases.Build.key); empty for an adopted one
    installed_at: float  # seconds since the epoch
    size_bytes: int | None
    inspection: Inspection
    plugin: str | None = None
    plugin_mark: str = ""  # version and content of the plugin's wheel
    plugin_path: Path | None = None  # where an adopted environment finds the plugin: it is not written into
    broken: str | None = None
    schema: int = field(default=SCHEMA)

    def with_(self, **changes: Any) -> Record:
        """A changed copy."""
        return replace(self, **changes)


def folder(name: str) -> Path:
    """Where the environment of this name lives."""
    return paths().engines / name


def going(name: str) -> str:
    """How the folder of an environment that is being removed begins; its process id follows."""
    return f".{name}.removing-"


def check_name(name: str) -> str:
    """The name, or InvalidInputError (`bad_name`): it becomes a folder."""
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            "bad_name", f"{name!r} cannot name an environment", "small letters, digits, `-`, `_` and `.`: cuda-test"
        )
    return name


def names() -> list[str]:
    """Every environment's name, complete or not."""
    try:
        return sorted(p.name for p in paths().engines.iterdir() if p.is_dir() and not p.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def load(name: str) -> Record | None:
    """The record, or None when there is none that this version understands: then the environment is not complete."""
    try:
        raw = json.loads((folder(name) / "engine.json").read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            return None
        seen = raw["inspection"]
        flags = {n: EngineFlag(n, f["takes_value"], tuple(f["choices"])) for n, f in seen["flags"].items()}
        return Record(
            **raw
            | {
                "python": Path(raw["python"]),
                "plugin_path": Path(raw["plugin_path"]) if raw["plugin_path"] else None,
                "inspection": Inspection(**seen | {"flags": flags}),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def save(record: Record) -> None:
    """Write the record: whole or not at all. The inspection's flags are the bulk of it, about 50 kB."""
    raw = asdict(record)
    for flag in raw["inspection"]["flags"].values():
        del flag["name"]
    target = folder(record.name) / "engine.json"
    with translated(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".engine.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(raw, file, default=str)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def write_note(name: str, flavour: Flavour, version: str) -> None:
    """Leave beside an unfinished environment what it was to become, so that a hint can name the command."""
    with translated(folder(name)):
        folder(name).mkdir(parents=True, exist_ok=True)
        (folder(name) / "wanted").write_text(f"{flavour} {version}\n", encoding="utf-8")


def read_note(name: str) -> tuple[str, str] | None:
    """The flavour and version of that note."""
    try:
        flavour, version = (folder(name) / "wanted").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return flavour, version


@contextlib.contextmanager
def locked(name: str, progress: Progress, wait: float) -> Iterator[int]:
    """Hold the environment's lock; the descriptor, for a child that must hold it too.

    Waits up to `wait` seconds for another install of the same name, then raises UnfitError (`engine_busy`).
    """
    path = paths().engines / f".{name}.lock"
    with translated(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _acquire(handle, name, progress, wait)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _acquire(handle: int, name: str, progress: Progress, wait: float) -> None:
    deadline = time.monotonic() + wait
    told = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode(errors="replace") or "?"
            if time.monotonic() >= deadline:
                raise UnfitError(
                    "engine_busy",
                    f"environment {name!r} is being changed by another qwen3emb (pid {holder})",
                    "wait for it to end, then try again",
                ) from None
            if not told:
                progress.step(f"waiting for another install of {name!r} (pid {holder})")
                told = True
            time.sleep(0.2)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """File trouble under `path` as our own errors."""
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, path) from exc
