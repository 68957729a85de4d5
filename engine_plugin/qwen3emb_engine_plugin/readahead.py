"""The weights read into the page cache while the engine is imported.

SGLang opens them when all is imported, and then waits for the disk. A process forked before the import reads what is
not in memory yet, on a machine with cores to spare, and only where all of it fits into half of the free memory: what is
read ahead must still be there when it is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ENOUGH_CORES = 4
CHUNK = 16 << 20
STREAMS = 4  # a network disk gives each little
PR_SET_PDEATHSIG = 1
MEMORY = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
TITLE = "sglang::readahead"


def cores_to_spare() -> bool:
    """Whether reading costs the import nothing."""
    return usable_cores() >= ENOUGH_CORES


def usable_cores() -> int:
    """Cores that this process may run on, as many of them as its control group's quota pays for."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(cores, int(quota) // int(period))
    except (OSError, ValueError):  # a control group of the older kind, or no quota: "max"
        return cores


def start(folder: Path) -> int | None:
    """Fork a process that reads the weights of `folder`; its id, or None where there is nothing to read ahead."""
    main = os.getpid()
    try:
        import setproctitle
    except ImportError:  # it would go by this process's own command line, and pass for a second server
        return None
    try:
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        if not size or size > free_memory() // 2:
            return None
        pid = os.fork()
    except OSError:
        return None
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            setproctitle.setproctitle(TITLE)
            if os.getppid() == main:
                read(files)
        finally:
            os._exit(0)
    return pid


def reap(pid: int) -> None:
    """Take note of its end, whenever that is. Starts a thread: nothing may be forked from here any more."""
    threading.Thread(target=_wait, args=(pid,), daemon=True, name="readahead").start()


def stop(pid: int) -> None:
    """End it now, and take note of that."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _wait(pid)


def _wait(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return  # somebody else has


def read(files: Iterable[Path]) -> int:
    """Read what is not in memory, in several streams; how many bytes that were. A file that fails is left."""
    sizes = {file: file.stat().st_size for file in files}
    places = [(file, at, min(CHUNK, size - at)) for file, size in sizes.items() for at in range(0, size, CHUNK)]
    with ThreadPoolExecutor(STREAMS) as pool:
        return sum(pool.map(_read_chunk, places))


def _read_chunk(place: tuple[Path, int, int]) -> int:
    file, offset, length = place
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            # Its end: the kernel reads beyond what is asked for, and so knows the beginning of the next one.
            return 0 if in_memory(descriptor, offset + length - 1) else len(os.pread(descriptor, length, offset))
        finally:
            os.close(descriptor)
    except OSError:
        return 0


def in_memory(descriptor: int, offset: int) -> bool:
    """Whether the byte there can be had without waiting; False where the file system cannot say."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def free_memory() -> int:
    """Bytes that can be used without anything being pushed out, in this machine and in this control group."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMORY.read_text())
    free = int(found.group(1)) << 10 if found else 0
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) if limit != "max" else free
    except (OSError, ValueError):
        return free  # no control group of its own, or one of the older kind
