"""How `bench` shows itself: a live line with a sparkline while it runs, tables at the end."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from qwen3emb_launch.bench import report
from qwen3emb_launch.bench.load import Batch
from qwen3emb_launch.bench.modes import Listener
from qwen3emb_launch.bench.record import Record, Run, rows_of
from qwen3emb_launch.console import Console
from qwen3emb_launch.statistics import number, percentile

if TYPE_CHECKING:
    from rich.live import Live

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # seconds that the sparkline shows


class Shown(Listener):
    """A line a load in a pipe; on a terminal a live line, replaced by that one. Nothing with `--json`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._title = ""
        self._seconds = 0.0

    def begin(self, title: str, seconds: float) -> None:
        self._close()
        self._title, self._seconds, self._start = title, seconds, time.monotonic()
        self._rates: deque[int] = deque(maxlen=WIDTH)
        self._second, self._count, self._failed = 0, 0, 0
        self._recent: deque[float] = deque(maxlen=2000)
        if self._console.live:
            from rich.live import Live

            self._live = Live(console=self._console.err, transient=True, auto_refresh=False)
            self._live.start()
        else:
            self._console.say(f"bench: {title} ({seconds:g} s)")

    def batch(self, batch: Batch) -> None:
        if not self._live:
            return
        for scheduled, _, done, _, kind in batch.rows():
            if kind:
                self._failed += 1
                continue
            self._recent.append(done - scheduled)
            while int(done) > self._second:
                self._rates.append(self._count)
                self._second, self._count = self._second + 1, 0
            self._count += 1
        self._live.update(self._line(), refresh=True)

    def _line(self) -> str:
        elapsed = time.monotonic() - self._start
        rate = self._rates[-1] if self._rates else 0
        parts = [self._title, f"{elapsed:.0f}/{self._seconds:g} s", sparkline(list(self._rates)), f"{rate} requests/s"]
        if self._recent:
            recent = list(self._recent)
            parts.append(f"p50 {percentile(recent, 50) * 1000:.1f} ms, p95 {percentile(recent, 95) * 1000:.1f} ms")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return "  ".join(parts)

    def end(self, run: Run) -> None:
        self._close()
        figures = run.figures
        self._console.say(
            f"bench: {self._title}, {run.phase}: {number(figures.requests_per_s)} requests/s, "
            f"p50 {number(figures.latency.p50)} ms, p95 {number(figures.latency.p95)} ms"
            + (f", {sum(figures.failed.values())} failed" if figures.failed else "")
        )

    def _close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def sparkline(values: list[int]) -> str:
    """The values as bars, from zero up."""
    top = max(values, default=0)
    return "".join(BARS[round(v / top * (len(BARS) - 1))] if top else BARS[0] for v in values)


def show(console: Console, record: Record) -> None:
    """The record on stdout."""
    console.fields(report.headline(record, whole=False))
    console.text("")
    console.table(report.columns(record), [report.cells(record, r) for r in rows_of(record)])
    tables: list[tuple[tuple[str, ...], list[list[str]]]] = [
        (report.COMPARISON_COLUMNS, report.comparison_rows(record.comparisons)),
        (report.DRIFT_COLUMNS, report.drift_rows(record.drifts)),
        (report.CLAIM_COLUMNS, report.claim_rows(record)),
    ]
    for head, rows in tables:
        if rows:
            console.text("")
            console.table(head, rows)
    for line in (*report.knee_lines(record), *report.slo_lines(record)):
        console.text(line)
    for line in report.failure_lines(record):
        console.say(line)
    for warning in record.warnings:
        console.warn(warning)
