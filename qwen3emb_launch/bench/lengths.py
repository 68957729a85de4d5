"""Text lengths as a distribution, in tokens: `33`, `32-512`, `normal:300:100`, `lognormal:120:0.8`. Standard library.

Each form takes an optional range at its end, `lognormal:120:0.8@16-2048`, into which draws are clamped.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

FORMS = "33, 32-512, normal:MEAN:DEVIATION, lognormal:MEDIAN:SIGMA, each with @LOW-HIGH to bound it"
LONGEST = 1_000_000
_TAIL = 8192  # where an unbounded distribution stops


@dataclass(frozen=True)
class Lengths:
    """A parsed distribution. `low` and `high` bound every draw, in tokens."""

    kind: str
    a: float
    b: float
    low: int
    high: int

    def draw(self, source: random.Random) -> int:
        """One length."""
        if self.low == self.high:
            return self.low
        if self.kind == "uniform":
            value: float = source.randint(int(self.a), int(self.b))
        elif self.kind == "normal":
            value = source.gauss(self.a, self.b)
        else:
            value = source.lognormvariate(math.log(self.a), self.b)
        return min(max(round(value), self.low), self.high)


def parse(text: str) -> Lengths:
    """Read one of the forms above. Raises ValueError with what is wrong."""
    body, _, bounds = text.strip().lower().partition("@")
    low, high = _range(bounds) if bounds else (1, _TAIL)
    listed = re.fullmatch(r"(\d+)(?:-(\d+))?", body)
    if listed:
        least, most = _range(f"{listed[1]}-{listed[2] or listed[1]}")
        if not bounds:
            low, high = least, most
        low, high = (min(max(value, low), high) for value in (least, most))
        return Lengths("uniform", least, most, low, high)
    match = re.fullmatch(r"(normal|lognormal):(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", body)
    if not match:
        raise ValueError(f"no length distribution {text!r}: give {FORMS}")
    a, b = float(match[2]), float(match[3])
    if a <= 0:
        raise ValueError(f"{text!r}: the middle of the distribution must be above 0")
    return Lengths(match[1], a, b, low, high)


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match:
        raise ValueError(f"no range {text!r}: give LOW-HIGH")
    low, high = int(match[1]), int(match[2])
    if not 1 <= low <= high <= LONGEST:
        raise ValueError(f"{text!r}: lengths go from 1 to {LONGEST}, the smaller first")
    return low, high
