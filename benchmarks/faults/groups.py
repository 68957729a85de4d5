"""Control groups made for one fault: too little memory, too little processor time. Version 1 or 2, where root may."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")  # version 2; version 1 has a folder in it for each resource
MEMORY = ("memory.limit_in_bytes", "memory.max")
PERIOD = 1_000_000  # microseconds


class Group:
    """A fresh group with one limited resource. `close` moves its processes back and removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, pids: Iterable[int]) -> None:
        """Move processes in; those that ended meanwhile are left out."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.folder / "cgroup.procs").write_text(str(pid))

    def limit_memory(self, size: int) -> None:
        """So many bytes; what a process has already is charged elsewhere, its next pages are not."""
        next(self.folder / name for name in MEMORY if (self.folder / name).exists()).write_text(str(size))

    def limit_processor(self, share: float) -> None:
        """That share of one processor, for all of them together."""
        quota = max(1000, int(share * PERIOD))
        if (self.folder / "cpu.max").exists():
            (self.folder / "cpu.max").write_text(f"{quota} {PERIOD}")
        else:
            (self.folder / "cpu.cfs_period_us").write_text(str(PERIOD))
            (self.folder / "cpu.cfs_quota_us").write_text(str(quota))

    def close(self) -> None:
        """Its processes go back to where the group hangs."""
        for _ in range(100):  # threads may be born meanwhile
            left = (self.folder / "cgroup.procs").read_text().split() if self.folder.exists() else []
            for pid in left:
                with contextlib.suppress(OSError):
                    (self.folder.parent / "cgroup.procs").write_text(pid)
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.01)


def make(resource: str) -> Group | None:
    """A group for `memory` or `cpu`; None where this user may not make one."""
    wanted = MEMORY if resource == "memory" else ("cpu.cfs_quota_us", "cpu.max")
    for root in (ROOT / resource, ROOT):
        folder = root / f"qwen3emb-chaos-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if any((folder / name).exists() for name in wanted):
            return Group(folder)
        folder.rmdir()
    return None
