"""The time for everything: what is left of it, and what the next step will take by what the last ones took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qwen3emb_launch.tune import strategy
from qwen3emb_launch.tune.trials import Stage, Trial

SAFETY = 1.15  # on estimates of time
STOPPING = 4.0  # seconds to end an engine
LATEST = 3  # trials that an estimate looks at: a first start may compile kernels
SETTLING = 2  # loads that a finalist takes before its first round


class OutOfTimeError(Exception):
    """The budget is over."""


@dataclass
class Budget:
    """Seconds from its making on. `seconds` and `warmup` are those of a load in the final."""

    total: float
    clock: Callable[[], float]
    seconds: float
    warmup: float
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = self.clock() + self.total

    @property
    def left(self) -> float:
        """Seconds."""
        return self._deadline - self.clock()

    @property
    def for_a_start(self) -> float:
        """Seconds that an engine may take to serve."""
        return max(1.0, self.left - STOPPING)

    def check(self, seconds: float) -> None:
        """Raise OutOfTimeError unless a load of so many seconds fits."""
        if self.left < seconds + self.warmup + STOPPING:
            raise OutOfTimeError

    def start_time(self, trials: Sequence[Trial]) -> float:
        """Seconds that a start with its proof and its end takes."""
        spent = [t.seconds - sum(m.seconds for m in t.measurements) for t in _started(trials)]
        return max(spent, default=0.0) * SAFETY

    def trial_time(self, stage: Stage, trials: Sequence[Trial]) -> float:
        """Seconds that one more trial takes."""
        loads = max((len(t.measurements) for t in _started(trials)), default=1)
        return self.start_time(trials) + loads * (self.seconds * strategy.SHARE[stage] + self.warmup) * SAFETY

    def round_time(self, entries: int) -> float:
        """Seconds of one round of a final whose engines run side by side."""
        return entries * (self.seconds + self.warmup) * SAFETY

    def final_time(self, entries: int, rounds: int, trials: Sequence[Trial]) -> float:
        """Seconds of such a final, from the first start on."""
        return entries * self.start_time(trials) + self.round_time(entries) * (SETTLING + rounds)


def _started(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.ready_s is not None][-LATEST:]
