"""Percentiles, trends, confidence intervals of ratios, and latency objectives: pure functions on numbers."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from qwen3emb_launch.errors import InvalidInputError

RESAMPLES = 10_000
FEWEST_PAIRS = 3  # that a ratio has an interval from
SLOPE_PAIRS = 100_000  # pairs a slope is taken from at most


def percentile(values: Sequence[float], percent: float) -> float:
    """The value at `percent` (0 to 100) of unsorted values, linear between neighbours. Raises ValueError when empty."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Ratio:
    """A ratio b/a from `pairs` interleaved rounds: geometric mean, and the interval that holds it at `confidence`.

    `low` and `high` are None with fewer than FEWEST_PAIRS: there is no honest interval then.
    """

    value: float
    low: float | None
    high: float | None
    pairs: int
    confidence: float = 0.95

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95, seed: int = 1) -> Ratio:
    """b over a, paired by round, by percentile bootstrap over the rounds' log ratios (Efron and Tibshirani, ch. 13).

    Pairing removes what changes from round to round for both. Few rounds make the plain bootstrap too narrow: it is
    widened by sqrt(n / (n - 1)), and by Student's t over the normal distribution (Hesterberg 2015, doi
    10.1080/00031305.2015.1089789, section 4.1). Raises ValueError for unpaired or non-positive values.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} rounds cannot be paired")
    if min(*a, *b) <= 0:
        raise ValueError("a ratio needs positive values")
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    centre = sum(logs) / len(logs)
    if len(logs) < FEWEST_PAIRS:
        return Ratio(math.exp(centre), None, None, len(logs), confidence)
    source = random.Random(seed)  # noqa: S311 - resampling
    count = len(logs)
    means = [sum(source.choices(logs, k=count)) / count for _ in range(RESAMPLES)]
    wider = math.sqrt(count / (count - 1)) * _student_over_normal(confidence, count - 1)
    tail = 50 * (1 - confidence)
    low, high = (centre + wider * (percentile(means, p) - centre) for p in (tail, 100 - tail))
    return Ratio(math.exp(centre), math.exp(low), math.exp(high), count, confidence)


def _student_over_normal(confidence: float, freedom: int) -> float:
    """How much wider a t interval is than a normal one (Abramowitz and Stegun, 26.7.5; within 1% from 2 on)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
        (79 * z**8 + 776 * z**6 + 1482 * z**4 - 1920 * z**2 - 945) / 92160,
    )
    return 1.0 + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Trend:
    """The slope of y over x: median of the slopes of all pairs (Theil and Sen), which outliers do not move.

    `rises` and `falls` say that Kendall's test is sure of the direction at about 99%.
    """

    slope: float
    rises: bool
    falls: bool
    points: int


def trend(x: Sequence[float], y: Sequence[float]) -> Trend | None:
    """The trend of a series, None with fewer than ten points: a drift claimed from less is noise."""
    count = len(x)
    if count != len(y):
        raise ValueError(f"{count} and {len(y)} values")
    if count < 10:
        return None
    step = max(1, math.ceil(count * (count - 1) / 2 / SLOPE_PAIRS))
    thin = range(0, count, max(1, math.ceil(math.sqrt(step))))
    xs, ys = [x[i] for i in thin], [y[i] for i in thin]
    slopes, concord, n = [], 0, len(xs)
    for i in range(n):
        for j in range(i + 1, n):
            if xs[j] != xs[i]:
                slope = (ys[j] - ys[i]) / (xs[j] - xs[i])
                slopes.append(slope)
                concord += (slope > 0) - (slope < 0)
    if not slopes:
        return None
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return Trend(median(slopes), concord > 2.58 * deviation, concord < -2.58 * deviation, count)


_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """What a load must meet: percentile -> seconds, and at most this share of wrong or missing answers."""

    limits: Mapping[float, float]
    errors: float | None = None

    @property
    def strictest(self) -> float | None:
        """The limit that goodput is counted under: of the highest percentile. Seconds."""
        return self.limits[max(self.limits)] if self.limits else None

    def misses(self, percentiles: Mapping[float, float], errors: float) -> list[str]:
        """Each objective not met, in words. `percentiles` in seconds; one that is absent counts as missed."""
        found = []
        for at, limit in sorted(self.limits.items()):
            seen = percentiles.get(at)
            if seen is None:
                found.append(f"p{at:g} unknown, limit {limit * 1000:g} ms")
            elif seen > limit:
                found.append(f"p{at:g} {seen * 1000:.4g} ms > {limit * 1000:g} ms")
        if self.errors is not None and errors > self.errors:
            found.append(f"errors {errors:.3%} > {self.errors:.3%}")
        return found

    def __str__(self) -> str:
        parts = [f"p{at:g}={limit * 1000:g}ms" for at, limit in sorted(self.limits.items())]
        return ",".join(parts + ([f"errors={self.errors * 100:g}%"] if self.errors is not None else []))


def parse_slo(text: str) -> Slo:
    """Read `p95=100ms` or `p50=20ms,p99=1s,errors=0.1%`. Raises InvalidInputError (`bad_slo`)."""
    limits: dict[float, float] = {}
    errors: float | None = None
    for part in text.replace(" ", "").lower().split(","):
        time = re.fullmatch(r"p(\d+(?:\.\d+)?)(?:=|<=?)(\d+(?:\.\d+)?)(us|ms|s)", part)
        share = re.fullmatch(r"errors(?:=|<=?)(\d+(?:\.\d+)?)%", part)
        if time and 0 < float(time[1]) < 100 and float(time[2]) > 0:
            limits[float(time[1])] = float(time[2]) * _UNITS[time[3]]
        elif share and float(share[1]) <= 100:
            errors = float(share[1]) / 100
        else:
            raise InvalidInputError(
                "bad_slo",
                f"no objective {part!r} in {text!r}",
                "for example --slo p95=100ms, or p50=20ms,p99=1s,errors=0.1%",
            )
    return Slo(limits, errors)


def number(value: float | None) -> str:
    """Three significant digits, whole from a thousand on; `-` for unknown."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
