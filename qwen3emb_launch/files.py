"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomic(target: Path, text: str, *, mode: int = 0o600, folder_mode: int = 0o700) -> None:
    """Write `text` beside `target`, flush it to the disk, then put it in place. Missing folders are made.

    Raises OSError; the old file, if any, is then untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True, mode=folder_mode)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        Path(partial).chmod(mode)
        Path(partial).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise
