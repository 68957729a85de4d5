"""The most load that holds: rising levels until the objective is missed or more brings no more, then halfway back."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from qwen3emb_launch.tune.trials import Measurement

GAIN = 1.05  # a step up that brings less has passed the knee
CLOSE = 1.25  # levels nearer than that are not told apart in a few seconds
LOWEST = 0.05  # requests a second; below it nothing is measured in seconds
MOST = 6  # measurements


def search(
    measure: Callable[[float], Measurement],
    meets: Callable[[Measurement], bool],
    start: float,
    *,
    whole: bool,
    step: float = 2.0,
    most: int = MOST,
) -> list[Measurement]:
    """Measure levels from `start` on, `most` at most; the caller picks the best of those that hold.

    `whole` for clients, which come in ones. Up by `step` while the load holds and the rate grows, down by it while the
    load does not hold, then the geometric middle between what holds and what does not.
    """
    found: dict[float, Measurement] = {}

    def look(level: float) -> Measurement | None:
        level = max(1.0, float(round(level))) if whole else max(LOWEST, round(level, 3))
        if level in found or len(found) >= most:
            return None
        found[level] = measure(level)
        return found[level]

    here = look(start)
    up = here is not None and meets(here)
    while here is not None and meets(here) is up:
        after = look(here.level * step if up else here.level / step)
        if after is None or (up and meets(after) and after.requests_per_s < here.requests_per_s * GAIN):
            break
        here = after
    while True:
        holding = [m for m in found.values() if meets(m)]
        if not holding:
            break
        low = max(holding, key=lambda m: m.level)
        high = min((m for m in found.values() if m.level > low.level and not meets(m)), key=_level, default=None)
        if high is None or high.level < low.level * CLOSE or high.requests_per_s < low.requests_per_s * GAIN:
            break
        if look(sqrt(low.level * high.level)) is None:
            break
    return sorted(found.values(), key=_level)


def _level(measured: Measurement) -> float:
    return measured.level
