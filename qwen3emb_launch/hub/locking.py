"""One download of a repository at a time, over processes. The lock dies with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.progress import Progress

DEADLINE = 6 * 3600.0  # seconds: the largest model at 1 MB/s, and half as long again


@contextlib.contextmanager
def exclusive(
    lock: Path,
    what: str,
    progress: Progress,
    *,
    deadline: float = DEADLINE,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Hold `lock` while the block runs. A second process waits, says so, and then finds everything done.

    Raises UnfitError: `download_busy` after `deadline` seconds, or what the disk says.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(error, lock) from error
    try:
        until = clock() + deadline
        told = False
        while not _take(handle):
            if clock() > until:
                raise UnfitError(
                    "download_busy",
                    f"another process has been downloading {what} for {deadline / 3600:.0f} h (lock {lock})",
                    f"who it is: fuser -v {lock}",
                )
            if not told:
                progress.step(f"waiting for another process that is downloading {what}")
                told = True
            sleep(0.5)
        yield
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
