"""Latency histograms of bounded relative error (three significant digits), kept in records and merged over rounds.

The format and the code are HdrHistogram's, so that its own tools read what a record holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LOWEST, HIGHEST, DIGITS = 1, 3_600_000_000, 3  # microseconds: up to an hour


class LatencyHistogram:
    """Latencies in, percentiles out. Seconds at the surface, microseconds inside."""

    def __init__(self, encoded: str | None = None) -> None:
        from hdrh.histogram import HdrHistogram

        self._h: Any = HdrHistogram(LOWEST, HIGHEST, DIGITS)
        if encoded is not None:
            self._h.decode_and_add(encoded.encode("ascii"))

    def record_all(self, latencies: Iterable[float]) -> None:
        """Add latencies in seconds; above an hour counts as an hour."""
        record = self._h.record_value
        for latency in latencies:
            record(min(max(int(latency * 1e6 + 0.5), LOWEST), HIGHEST))

    def merge(self, other: LatencyHistogram) -> None:
        """Add another's counts."""
        self._h.add(other._h)

    @property
    def count(self) -> int:
        """How many latencies are in it."""
        return int(self._h.get_total_count())

    def at(self, percent: float) -> float | None:
        """The latency in seconds that `percent` (0 to 100) of them do not pass; None when empty."""
        return self._h.get_value_at_percentile(percent) / 1e6 if self.count else None

    def mean(self) -> float | None:
        """Mean latency in seconds."""
        return self._h.get_mean_value() / 1e6 if self.count else None

    def curve(self) -> list[tuple[float, float]]:
        """(percent, seconds) points for a plot, denser towards 100."""
        if not self.count:
            return []
        points = [*range(0, 90, 2), *(90 + i / 2 for i in range(18)), *(99 + i / 10 for i in range(10)), 99.95, 99.99]
        kept = [p for p in points if p <= 100 * (1 - 1 / (2 * self.count))]
        return [(float(p), self._h.get_value_at_percentile(p) / 1e6) for p in kept] + [(100.0, self.at(100) or 0.0)]

    def encode(self) -> str:
        """HdrHistogram's compressed V2 form, base64."""
        return str(self._h.encode().decode("ascii"))
