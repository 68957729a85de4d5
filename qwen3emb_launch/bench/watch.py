"""What the machine did meanwhile: GPU by NVML, memory of local engine processes; a thread that samples."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from qwen3emb_launch.bench.figures import GpuFigures

if TYPE_CHECKING:
    from qwen3emb_launch.gpu import GpuSample

LOOKS = 5  # samples between two questions for the processes
NEAR = 2.0  # seconds from a span within which a sample still tells of it: a busy machine leaves a brief one without
EVERY = 0.2  # seconds between samples: NVML's own utilisation window is 1/6 to 1 s


@dataclass(frozen=True)
class Moment:
    """One sample. `at` is monotonic seconds, `rss` bytes of the watched processes (None: none left to watch)."""

    at: float
    gpu: GpuSample | None
    rss: int | None


class Watch:
    """Samples until closed. `gpu` is an NVML index or None, `pids` tells the engine's processes of the moment."""

    def __init__(self, gpu: int | None, pids: Callable[[], Sequence[int]] | None = None) -> None:
        self.moments: list[Moment] = []
        self._gpu = gpu
        self._pids = pids
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if gpu is not None or pids is not None:
            self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        from qwen3emb_launch import gpu

        with gpu.sampler(self._gpu) if self._gpu is not None else contextlib.nullcontext() as sample:
            for number in count():
                if number % LOOKS == 0:
                    pids = self._pids() if self._pids else ()
                seen = sample() if sample else None
                self.moments.append(Moment(time.monotonic(), seen, resident(pids)))
                if self._closing.wait(EVERY):
                    return

    def between(self, began: float, ended: float) -> Iterator[Moment]:
        """The samples of a span of monotonic seconds."""
        return (m for m in self.moments if began <= m.at <= ended)

    def gpu_figures(self, began: float, ended: float, tokens_per_s: float | None) -> GpuFigures | None:
        """GPU figures of a span, None without a GPU that answers."""
        seen = [(m.at, m.gpu) for m in self.between(began, ended) if m.gpu]
        if not seen:
            return None
        busy = [g.busy for _, g in seen if g.busy is not None]
        memory = [g.memory_bytes for _, g in seen if g.memory_bytes is not None]
        watts = _watts([(at, g) for at, g in seen])
        per_million = watts * 1e6 / tokens_per_s / 3600 if watts is not None and tokens_per_s else None
        return GpuFigures(
            busy=sum(busy) / len(busy) if busy else None,
            memory_bytes=max(memory) if memory else None,
            watts=watts,
            watt_hours_per_million_tokens=per_million,
        )

    def peak_rss(self, began: float, ended: float) -> int | None:
        """Most resident bytes of the watched processes in a span; of a moment close by where none was sampled in it."""
        inside = list(self.between(began, ended))
        if inside:
            return max((m.rss for m in inside if m.rss is not None), default=None)
        beside = [m for m in self.between(began - NEAR, ended + NEAR) if m.rss is not None]
        return min(beside, key=lambda m: max(began - m.at, m.at - ended)).rss if beside else None


def _watts(seen: list[tuple[float, GpuSample]]) -> float | None:
    """Mean power: from the card's own energy counter where it has one, else the mean of its readings."""
    counted = [(at, g.joules) for at, g in seen if g.joules is not None]
    if len(counted) >= 2 and counted[-1][0] - counted[0][0] >= 1:
        return (counted[-1][1] - counted[0][1]) / (counted[-1][0] - counted[0][0])
    watts = [g.watts for _, g in seen if g.watts is not None]
    return sum(watts) / len(watts) if watts else None


def resident(pids: Sequence[int]) -> int | None:
    """Resident bytes of processes and all their children, None when none of them lives."""
    import psutil

    total: int | None = None
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            top = psutil.Process(pid)
            for process in (top, *top.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total = (total or 0) + process.memory_info().rss
    return total
