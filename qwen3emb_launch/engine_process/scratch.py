"""A folder for an engine's temporary files: sockets between its processes, and what it never removes.

It is this user's alone and goes with the engine (the guard removes it). What is to be kept between starts and would
lie there by default goes to the cache folder: torch's compiled code, CUTLASS's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

KEPT = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "CUTE_DSL_CACHE_DIR": "cute_dsl"}
# A socket's path has 107 bytes at most, and Python's own end in /pymp-12345678/listener-12345678.
LONGEST = 107 - 32


class Scratch:
    """One folder at a time."""

    def __init__(self, cache: Path) -> None:
        self.folder: Path | None = None
        self._cache = cache

    def fresh(self) -> dict[str, str]:
        """What the environment of the next start says; nothing where no such folder can be made."""
        self.close()
        try:
            folder = Path(tempfile.mkdtemp(prefix="qwen3emb-")).absolute()  # engine and guard are in folders of theirs
        except OSError:  # the disk is full, or there is no such place: the engine does as it always did
            return {}
        if len(os.fsencode(folder)) > LONGEST:
            folder.rmdir()
            return {}
        self.folder = folder
        return {"TMPDIR": str(folder), **self._kept()}

    def _kept(self) -> dict[str, str]:
        """Folders outside it that outlive it, but for those that the user has chosen."""
        found = {}
        for name, below in KEPT.items():
            folder = self._cache / below
            if name not in os.environ:
                with contextlib.suppress(OSError):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                    if os.access(folder, os.W_OK | os.X_OK):  # else root's, of an earlier start, or on a read-only disk
                        found[name] = str(folder)
        return found

    def close(self) -> None:
        """Remove what a guard that was killed has left."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
