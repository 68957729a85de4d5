"""Bytes from a hub into a file: resumed where they stopped, hashed on the way, in place only when they are right.

Both hubs share this. Neither client's own downloader does: huggingface_hub 2.x deletes its partial file when a
download ends in any way but success, so a cut connection or a killed process costs the whole shard again;
modelscope_hub's sleeps and prints on its own account.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import LaunchError, NetworkError
from qwen3emb_launch.hub.listing import RemoteFile
from qwen3emb_launch.progress import Progress

WORKERS = 4  # files at a time; the largest model has four shards


class BrokenTransfer(Exception):  # noqa: N818 - never leaves this package: it is retried or becomes a NetworkError
    """A transfer that may be tried again: cut, timed out, or the hub is busy. `wait` is what the hub asked for, s."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class _Stopped(Exception):  # noqa: N818 - another file failed, or Ctrl-C: leave quietly
    pass


@dataclass(frozen=True)
class Body:
    """An answer's bytes from offset `start` on. A hub that ignores ranges starts at 0, whatever was asked."""

    start: int
    chunks: Iterable[bytes]


OpenBody = Callable[[RemoteFile, int], AbstractContextManager[Body]]


@dataclass(frozen=True)
class Retries:
    """How often a transfer is taken up again: `fruitless` times in a row without a byte, `in_all` times a file."""

    fruitless: int = 5
    in_all: int = 100
    first_wait: float = 1.0
    longest_wait: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def pause(self, failures: int, asked: float | None = None) -> None:
        """Wait before the next try: what the hub asked for, else twice as long as the last time."""
        wait = self.first_wait * 2 ** (failures - 1) if asked is None else asked
        self.sleep(min(wait, self.longest_wait))


@dataclass(frozen=True)
class Job:
    """One file to get. `partial` is where it grows, `target` where it goes when whole; both on one disk."""

    file: RemoteFile
    partial: Path
    target: Path


class Meter:
    """Bytes over all files, for one progress line. `fetched` leaves out what earlier runs had already brought."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total = total
        self.done = 0
        self.fetched = 0
        self._progress = progress
        self._lock = threading.Lock()

    def resumed(self, count: int) -> None:
        """`count` bytes were there already; negative when they turned out useless."""
        with self._lock:
            self.done += count
            self._progress.update(self.done, self.total)

    def received(self, count: int) -> None:
        """`count` bytes came over the network."""
        with self._lock:
            self.done += count
            self.fetched += count
            self._progress.update(self.done, self.total)


def fetch_all(jobs: Sequence[Job], open_body: OpenBody, meter: Meter, retries: Retries) -> None:
    """Get every file, a few at a time. The first failure stops the others; what they have stays for the next run.

    The workers are daemon threads, so that Ctrl-C need not wait for a silent connection's time-out.
    Raises LaunchError.
    """
    waiting = deque(sorted(jobs, key=lambda job: -job.file.size))
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                _fetch(job, open_body, meter, retries, stop)
                results.put(None)
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                results.put(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(jobs)))]
    for worker in workers:
        worker.start()
    try:
        for _ in jobs:
            failure = results.get()
            if failure is not None:
                raise failure
    finally:
        stop.set()
        waiting.clear()
        for worker in workers:
            worker.join(1.0)


def _fetch(job: Job, open_body: OpenBody, meter: Meter, retries: Retries, stop: threading.Event) -> None:
    try:
        job.partial.parent.mkdir(parents=True, exist_ok=True)
        with _opened(job.partial) as out:
            found = _receive(job.file, out, open_body, meter, retries, stop)
            out.flush()
            with contextlib.suppress(OSError):  # a disk that cannot sync still holds the bytes
                os.fsync(out.fileno())
        if job.file.expected not in (None, found):
            job.partial.unlink()
            meter.resumed(-job.file.size)
            raise NetworkError(
                "hash_mismatch",
                f"{job.file.path} arrived damaged: the hub lists {job.file.expected}, the content is {found}; "
                "the damaged copy was deleted",
                "run the same command again; if it happens twice, the mirror is broken: choose another --source",
                details={"file": job.file.path, "expected": job.file.expected, "found": found},
            )
        job.target.parent.mkdir(parents=True, exist_ok=True)
        job.partial.replace(job.target)
    except OSError as error:
        raise disk_error(error, job.partial) from error


@contextlib.contextmanager
def _opened(partial: Path) -> Iterator[BinaryIO]:
    """The partial file for reading and writing, made when absent, never cut."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=1 << 20) as out:
        yield out


def _receive(
    file: RemoteFile, out: BinaryIO, open_body: OpenBody, meter: Meter, retries: Retries, stop: threading.Event
) -> str:
    """Fill `out` up to the file's size and return the content's hash."""
    done, digest = _prefix(file, out)
    meter.resumed(done)
    fruitless = tries = 0
    while done < file.size:
        before = done
        try:
            with open_body(file, done) as body:
                if body.start != done:
                    meter.resumed(-done)
                    done, digest = 0, file.hasher()
                    out.seek(0)
                    out.truncate()
                for chunk in body.chunks:
                    if stop.is_set():
                        raise _Stopped
                    if done + len(chunk) > file.size:
                        raise _too_long(file)
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    meter.received(len(chunk))
            if done < file.size:
                raise BrokenTransfer(f"the answer ended after {done} of {file.size} bytes")
        except BrokenTransfer as broken:
            out.flush()
            tries += 1
            fruitless = 1 if done > before else fruitless + 1
            if fruitless >= retries.fruitless or tries >= retries.in_all:
                raise NetworkError(
                    "transfer_broken",
                    f"{file.path}: gave up after {tries} tries, the last: {broken.reason}; "
                    f"{done} of {file.size} bytes are kept",
                    "run the same command again: it goes on where this stopped",
                    details={"file": file.path, "bytes": done, "of": file.size},
                ) from broken
            retries.pause(fruitless, broken.wait)
    return file.found(digest)


def _prefix(file: RemoteFile, out: BinaryIO) -> tuple[int, Any]:
    """How many bytes an earlier run left, and their running hash. More than the file has is no part of it."""
    there = os.fstat(out.fileno()).st_size
    if there > file.size:
        out.truncate(0)
        there = 0
    digest = file.hasher()
    done = 0
    while done < there and (block := out.read(min(1 << 20, there - done))):
        digest.update(block)
        done += len(block)
    return done, digest


def _too_long(file: RemoteFile) -> LaunchError:
    return NetworkError(
        "size_mismatch",
        f"{file.path}: the hub lists {file.size} bytes and sends more",
        "run the same command again; if it happens twice, choose another --source",
    )
