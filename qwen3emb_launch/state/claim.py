"""The write side: the claim on an instance, held by its supervisor alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.lifecycle import Transition
from qwen3emb_launch.paths import paths
from qwen3emb_launch.state.records import InstanceRecord, ProcessId, check_name, identify, unusable

EVENTS_LIMIT = 1 << 20  # bytes of events.jsonl before it becomes events.jsonl.1
KEEP_LOGS = 10  # engine starts whose logs are kept


@dataclass
class Claim:
    """The right to be an instance: its folder and its lock. Held by exactly one process, and passed on by its fd."""

    name: str
    folder: Path
    lock_fd: int

    @property
    def logs(self) -> Path:
        """The folder of the engine's logs."""
        return self.folder / "logs"

    @property
    def keys(self) -> Path:
        """The 0600 file that the engine reads with `--config`."""
        return self.folder / "engine.yaml"

    @property
    def plan(self) -> Path:
        """The launch plan, JSON."""
        return self.folder / "plan.json"

    def write(self, record: InstanceRecord) -> None:
        """Replace instance.json. Raises UnfitError `state_unwritable`."""
        from qwen3emb_launch.results import plain

        write_private(self.folder / "instance.json", json.dumps(plain(record), ensure_ascii=False))

    def append(self, transition: Transition) -> None:
        """Add one event; a full file is set aside once. Raises UnfitError `state_unwritable`."""
        path = self.folder / "events.jsonl"
        line = json.dumps(transition.to_dict(), ensure_ascii=False).encode() + b"\n"
        try:
            if path.exists() and path.stat().st_size > EVENTS_LIMIT:
                path.replace(path.with_name(path.name + ".1"))
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _write_whole(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            raise unusable(path, error) from error

    def new_log(self, stamp: str, kind: str = "engine") -> Path:
        """The path of the next start's log; the oldest starts' files of that kind are removed.

        `stamp` begins with a date of eight digits, which tells engine-20261122-… from engine-2-20261122-….
        """
        starts = sorted(self.logs.glob(f"{kind}-{'[0-9]' * 8}*.log"))
        for old in starts[: max(0, len(starts) - KEEP_LOGS + 1)]:
            for piece in self.logs.glob(old.name + "*"):
                piece.unlink(missing_ok=True)
        path = self.logs / f"{kind}-{stamp}.log"
        number = 1
        while path.exists():
            number += 1
            path = self.logs / f"{kind}-{stamp}-{number}.log"
        return path

    def release(self) -> None:
        """Give the lock back."""
        os.close(self.lock_fd)


def claim(name: str) -> Claim:
    """Take an instance's lock, making its folder.

    Raises UnfitError `already_running` (names the holder) or `state_unwritable`, InvalidInputError `bad_name`.
    """
    folder = paths().instances / check_name(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for private in (folder, folder / "logs"):
            private.mkdir(exist_ok=True, mode=0o700)
            private.chmod(0o700)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(fd)
        os.close(fd)
        raise UnfitError(
            "already_running",
            f"instance {name!r} is already held by another `up`" + (f" (pid {holder})" if holder else ""),
            f"qwen3emb down {name}, or give this one another --name and --port",
            {"pid": holder},
        ) from error
    if not _lies_at(folder / "lock", fd):  # its last holder has removed the folder
        os.close(fd)
        return claim(name)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except OSError as error:
        os.close(fd)
        raise unusable(folder / "lock", error) from error
    return Claim(name, folder, fd)


def _lies_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False


def adopt(name: str, lock_fd: int) -> Claim:
    """Take over a claim whose descriptor was inherited; from now on the lock is this process's."""
    os.set_inheritable(lock_fd, False)
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, str(os.getpid()).encode(), 0)
    return Claim(name, paths().instances / name, lock_fd)


def lock_holder(folder: Path) -> ProcessId | None:
    """The process that holds an instance's lock, or None. Needs no record: a broken one hides nobody."""
    try:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _holder(fd)
        return identify(pid) if pid else None
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _holder(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).decode("ascii", errors="replace")
    return int(text) if text.isdigit() else None


def _write_whole(fd: int, line: bytes) -> None:
    """Append all of `line` or none of it: a disk that fills up takes the first half. Raises OSError."""
    before = os.fstat(fd).st_size
    try:
        if os.write(fd, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(fd, before)
        raise


def write_private(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a power cut, sees the old text or the new one. Mode 0600.

    One writer a file: the holder of the claim. Raises UnfitError `state_unwritable`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            data = memoryview(text.encode())
            while data:
                data = data[os.write(fd, data) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unusable(path, error) from error
