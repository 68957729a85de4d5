"""Which of several workers has hung: each notes in shared memory when its event loop last came round.

A hung worker keeps its part of the connections: the kernel deals new ones to its socket as before. The parent ends it,
and starts another one on that socket; the others do not notice. A worker that waits for a processor is not hung, and
neither is one whose parent was stopped as well.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, MutableSequence
from pathlib import Path

BEAT = 0.5  # seconds
PROOF = 2.0  # seconds over which a busy one is looked at: does it compute, or wait for a processor?
TICKS = os.sysconf("SC_CLK_TCK")
BUSY = 0.5  # of that time, from which on it computes


async def beat(pulse: MutableSequence[float], number: int) -> None:
    """In a worker, for as long as its loop runs."""
    while True:
        pulse[number] = time.monotonic()
        await asyncio.sleep(BEAT)


class Watch:
    """The parent's view. `limit` is the silence in seconds after which a worker is looked at."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._looked = self._since = clock()
        self._busy: dict[int, tuple[float, float]] = {}  # when it was first found silent and busy, its seconds then

    def hung(self, pid: int, last: float) -> bool:
        """Whether a process that came round at `last` (0: not yet) is of no use any more. To be asked often."""
        now = self._clock()
        if now - self._looked > self._limit / 2:  # this process was kept from running: perhaps the other one was too
            self._since = now
        self._looked = now
        if not last or now - max(last, self._since) < self._limit:
            self._busy.pop(pid, None)
            return False
        state, used = process_state(pid)
        if state != "R":
            return state in ("S", "T", "t")  # D waits for a disk, and nothing ends it
        since, before = self._busy.setdefault(pid, (now, used))
        return now - since >= PROOF and used - before >= BUSY * (now - since)


def process_state(pid: int) -> tuple[str, float]:
    """The kernel's letter for a process, and its seconds of processor time; ("", 0.0) for one that is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return words[0], (int(words[11]) + int(words[12])) / TICKS
