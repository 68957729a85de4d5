"""The time for everything: what is left of it, and what the next step will take by what the last ones took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from qwen3emb_launch.statistics import FEWEST_PAIRS
from qwen3emb_launch.tune import strategy
from qwen3emb_launch.tune.trials import Stage, Trial

SAFETY = 1.15  # on estimates of time
STOPPING = 4.0  # seconds to end an engine
LATEST = 3  # trials that an estimate looks at
SETTLING = 2  # loads that a finalist takes before its first round
BRIEF = 0.5  # share of a final's load where there is no time for whole ones


class OutOfTimeError(Exception):
    """The budget is over."""


@dataclass
class Budget:
    """Seconds from its making on. `seconds` and `warmup` are those of a load in the final.

    `apart` is a final whose engines are started for each turn.
    """

    total: float
    clock: Callable[[], float]
    seconds: float
    warmup: float
    apart: bool = False
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

    def check(self, seconds: float, engines: int = 1) -> None:
        """Raise OutOfTimeError unless a load of so many seconds fits, and the end of the engines that run."""
        if self.left < (seconds + self.warmup) * SAFETY + STOPPING * engines:
            raise OutOfTimeError

    def start_time(self, trials: Sequence[Trial]) -> float:
        """Seconds that a start with its proof and its end takes.

        The middle one of the last, the less of two: one that compiled kernels, as a first start does, says nothing of
        the next. Where that was too hopeful, the deadline of each start and load still holds.
        """
        spent = [t.seconds - sum(m.seconds for m in t.measurements) for t in _started(trials)]
        return median_low(spent) * SAFETY if spent else 0.0

    def trial_time(self, stage: Stage, trials: Sequence[Trial]) -> float:
        """Seconds that one more trial takes."""
        loads = max((len(t.measurements) for t in _started(trials)), default=1)
        return self.start_time(trials) + loads * (self.seconds * strategy.SHARE[stage] + self.warmup) * SAFETY

    def final_time(self, entries: int, rounds: int, trials: Sequence[Trial], share: float = 1.0) -> float:
        """Seconds of a final from the first start on, each load `share` of a whole one."""
        loads = entries * (SETTLING + rounds) * (self.seconds * share + self.warmup) * SAFETY
        return loads + entries * (rounds if self.apart else 1) * self.start_time(trials)


@dataclass(frozen=True)
class Estimates:
    """Seconds left, and what a single setting, a combination and the least final would take of them.

    `brief` is a final of shorter loads; both finals are 0 where none is asked for. `candidate` tells whether something
    tried did better than the baseline: what a final would be held for.
    """

    left: float
    single: float
    combination: float
    final: float
    brief: float
    candidate: bool

    def of(self, step: strategy.Step) -> float:
        """Of a step by itself."""
        return self.single if step.stage is Stage.MOVE else self.combination


def estimates(budget: Budget, trials: Sequence[Trial], rounds: int, candidate: bool) -> Estimates:
    """As of now."""
    final, brief = (budget.final_time(2, FEWEST_PAIRS, trials, share) if rounds else 0.0 for share in (1.0, BRIEF))
    single, together = (budget.trial_time(stage, trials) for stage in (Stage.MOVE, Stage.COMBINATION))
    return Estimates(budget.left, single, together, final, brief, candidate)


def next_step(steps: Sequence[strategy.Step], seen: Estimates) -> strategy.Step | None:
    """The step to spend time on, None to hold the final or to end.

    The first one, as long as its final fits after it, and a combination too while single settings are tried. In less
    time: winners together before one more setting; that setting, with its final; the final, if there is a candidate
    for it; that setting with a brief final; and last, since time left over is worth nothing, whatever fits by itself.
    """

    def fits(step: strategy.Step, beside: float) -> bool:
        return seen.of(step) + beside <= seen.left

    first = steps[0]
    if fits(first, seen.final + (seen.combination if first.stage is Stage.MOVE else 0.0)):
        return first
    together = next((s for s in steps if s.stage is Stage.COMBINATION), None)
    if together and fits(together, seen.final):
        return together
    if fits(first, seen.final):
        return first
    if seen.candidate and 0 < seen.brief <= seen.left:
        return None
    return next((s for beside in (seen.brief, 0.0) for s in steps if fits(s, beside)), None)


def _started(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.ready_s is not None][-LATEST:]
