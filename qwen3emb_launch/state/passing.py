"""Instances that live for one run of another command. A run that went well leaves nothing of its own.

What a failed run wrote stays in its instance's folder, where `qwen3emb logs NAME` finds it: of one name the last
KEEP_LOGS starts (claim.py), and of all such instances the KEEP last. An instance of the user's own of that name is left
as it is.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.paths import paths
from qwen3emb_launch.state.claim import claim
from qwen3emb_launch.state.records import MARK, check_name, load, unusable

KEEP = 5  # instances with logs of failed runs


@dataclass
class Passing:
    """One run. `earlier` are the logs of failed runs before it; None where the instance is the user's own."""

    name: str
    earlier: frozenset[Path] | None

    def end(self, *, failed: bool) -> Path | None:
        """The run is over and nothing of it runs. Gives the engine's last log if it is kept: where the run failed, or
        the instance did meanwhile."""
        kept = None
        with _held(self.name) as folder:
            if folder and self.earlier is not None:
                logs = _logs(folder) - self.earlier
                if logs and (failed or self._went_wrong()):
                    kept = max((p for p in logs if p.name.startswith("engine-")), default=max(logs))
                else:
                    _remove(folder, logs, whole=not self.earlier)
        _forget()
        return kept

    def _went_wrong(self) -> bool:
        found = load(self.name)
        record = found.record if found else None
        return record is not None and (record.state is State.FAILED or record.error is not None or record.restarts > 0)


def begin(name: str) -> Passing:
    """Before the instance is started. Raises UnfitError `state_unwritable`, InvalidInputError `bad_name`."""
    folder = paths().instances / check_name(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            if not (folder / MARK).exists():
                return Passing(name, None)
        (folder / MARK).touch(mode=0o600)
        return Passing(name, frozenset(_logs(folder)))
    except OSError as error:
        raise unusable(folder, error) from error


def _forget() -> None:
    """Only the last ones are kept, and those that run."""
    found = []
    for mark in paths().instances.glob(f"*/{MARK}"):
        with contextlib.suppress(OSError):
            found.append((mark.stat().st_mtime, mark.parent.name))
    for _, name in sorted(found, reverse=True)[KEEP:]:
        with _held(name) as folder:
            if folder:
                _remove(folder, _logs(folder), whole=True)


@contextmanager
def _held(name: str) -> Iterator[Path | None]:
    """The folder while nobody else may use it; None where somebody does."""
    try:
        taken = claim(name)
    except UnfitError:
        yield None
        return
    try:
        yield taken.folder
    finally:
        taken.release()


def _logs(folder: Path) -> set[Path]:
    return set((folder / "logs").glob("*.log*"))


def _remove(folder: Path, logs: set[Path], *, whole: bool) -> None:
    """The record first: a folder without one is no instance. Without `whole`, other logs than these stay."""
    for path in (folder / "instance.json", folder / "plan.json", *logs):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    if whole:
        shutil.rmtree(folder, ignore_errors=True)
