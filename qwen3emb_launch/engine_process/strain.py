"""What a machine kept from a process and its descendants for a while: processor, memory, this process's own timers.

Evidence for telling a starved engine from a hung one; what it means is decided elsewhere. Read from /proc, nothing is
asked of the engine. What this kernel does not tell stays None.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwen3emb_launch.engine_process.guard import descendants

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
SETTLE = 1.0  # seconds before the first look: most questions are answered by then, and none is taken


@dataclass(frozen=True)
class Strain:
    """What happened in `window` seconds. `late` is by how much the supervisor's own timers were late.

    `waited` and `ran` are of the one thread that waited longest for a processor; `faults` are pages that had to be read
    from a disk before the processes could go on; `memory` is how long some process of the engine's control group (or of
    the machine, where there is none) stood still for want of memory; `stolen` is the share of the processors that the
    host of a virtual machine gave to others.
    """

    window: float
    late: float = 0.0
    waited: float | None = None
    ran: float | None = None
    faults: int | None = None
    memory: float | None = None
    stolen: float | None = None


@dataclass(frozen=True)
class Thread:
    """Seconds on a processor and waiting for one, so far. `runnable`: it wants one now."""

    ran: float
    waited: float
    runnable: bool


UNBORN = Thread(0.0, 0.0, False)


@dataclass(frozen=True)
class Sample:
    """Counters at one moment (monotonic seconds). They only grow; a thread that ended is not in the later one."""

    at: float
    threads: Mapping[int, Thread] = field(default_factory=dict)
    faults: Mapping[int, int] = field(default_factory=dict)  # of each process
    memory: float | None = None
    stolen: float | None = None
    processors: int = 1


def between(before: Sample, after: Sample, late: float) -> Strain:
    """What two looks tell."""
    window = after.at - before.at
    longest = (0.0, 0.0)
    counted = any(thread.ran or thread.waited for thread in after.threads.values())  # else this kernel does not
    for tid, now in after.threads.items():
        then = before.threads.get(tid, UNBORN)
        waited, ran = now.waited - then.waited, now.ran - then.ran
        if now.runnable and waited == ran == 0:
            waited = window  # the kernel adds a wait to the sum when it ends
        longest = max(longest, (min(waited, window), ran))
    stolen = _grown(before.stolen, after.stolen)
    known = [pid for pid in after.faults if pid in before.faults]
    return Strain(
        window=window,
        late=late,
        waited=longest[0] if counted else None,
        ran=longest[1] if counted else None,
        faults=sum(after.faults[pid] - before.faults[pid] for pid in known) if known else None,
        memory=_grown(before.memory, after.memory),
        stolen=stolen / after.processors / window if stolen is not None and window > 0 else None,
    )


def _grown(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


class Watch:
    """Looks at a process tree while a question to it is not answered: first after SETTLE seconds, then at `end`."""

    def __init__(self, root: int, timeout: float) -> None:
        self._root, self._timeout = root, timeout
        self._begun = time.monotonic()
        self._due = min(SETTLE, timeout / 4)
        self._first: Sample | None = None
        self._blind = False  # the first look failed: nothing can be compared
        self._timer = threading.Timer(self._due, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        try:
            self._first = sample(self._root)
        except OSError:
            self._blind = True

    def end(self, *, slow: bool) -> Strain | None:
        """The question has its answer, or its time is up (`slow`): then what the machine had to do with that.

        Raises OSError when /proc cannot be read.
        """
        self._timer.cancel()
        if not slow or self._blind:
            return None
        now = time.monotonic()
        first = self._first
        late = max(0.0, now - self._begun - self._timeout)
        if first is None:  # not even the timer came to run
            return Strain(window=now - self._begun, late=max(late, now - self._begun - self._due))
        late = max(late, first.at - self._begun - self._due)
        return between(first, sample(self._root), late)


def sample(root: int, proc: Path = PROC, groups: Path = CGROUPS) -> Sample:
    """One look at a process, its descendants and the machine."""
    at = time.monotonic()
    threads: dict[int, Thread] = {}
    faults: dict[int, int] = {}
    for pid in (root, *descendants(root)):
        try:
            faults[pid] = int(_stat(proc / str(pid))[9])
            tids = [int(entry.name) for entry in (proc / str(pid) / "task").iterdir()]
        except (OSError, IndexError, ValueError):
            continue  # it ended meanwhile
        for tid in tids:
            thread = _thread(proc / str(pid) / "task" / str(tid))
            if thread:
                threads[tid] = thread
    return Sample(at, threads, faults, _stalled(root, proc, groups), _stolen(proc), os.cpu_count() or 1)


def _thread(folder: Path) -> Thread | None:
    try:
        ran, waited, _ = map(int, (folder / "schedstat").read_text().split())
        return Thread(ran / 1e9, waited / 1e9, _stat(folder)[0] == "R")
    except (OSError, ValueError, IndexError):
        return None


def _stat(folder: Path) -> list[str]:
    """The fields after the name: state, parent, ..."""
    return (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()


def _stalled(root: int, proc: Path, groups: Path) -> float | None:
    """Seconds so far in which some process stood still for want of memory: of root's control group, else of all."""
    try:
        lines = (proc / str(root) / "cgroup").read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    except OSError:
        own = "/"
    for path in (groups / own.lstrip("/") / "memory.pressure", proc / "pressure" / "memory"):
        try:
            return int(path.read_text().partition("total=")[2].split()[0]) / 1e6
        except (OSError, ValueError, IndexError):
            continue
    return None


def _stolen(proc: Path) -> float | None:
    """Processor seconds so far that the host of a virtual machine gave to others."""
    try:
        fields = (proc / "stat").read_text().split("\n", 1)[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
