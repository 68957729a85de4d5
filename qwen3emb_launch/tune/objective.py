"""What better means: the goal, the latency objective that bounds it, and prices where cost is the goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from qwen3emb_launch.cost import Costs, Load, cost
from qwen3emb_launch.statistics import Slo
from qwen3emb_launch.tune.trials import Measurement, Trial

DEFAULT_PERCENTILE = 95.0

WRONG = 0.01  # share of failures that no load may have


class Goal(StrEnum):
    """What is tuned for."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    MEMORY = "memory"
    COST = "cost"


# What is searched for the load that pays: the others are measured at the load given.
SEARCHED = frozenset({Goal.THROUGHPUT, Goal.COST})


@dataclass(frozen=True)
class Objective:
    """The goal and its bounds. `costs` holds the prices given; power is measured.

    A score is positive and higher is better, whatever the goal, so that two can be divided.
    """

    goal: Goal
    slo: Slo | None = None
    costs: Costs | None = None
    texts_per_request: int = 1

    @property
    def percentile(self) -> float:
        """The latency percentile that counts: the highest of the objective's."""
        return max(self.slo.limits) if self.slo and self.slo.limits else DEFAULT_PERCENTILE

    def meets(self, measured: Measurement) -> bool:
        """Whether the load was answered within the objective, and answered at all."""
        return not measured.misses and measured.requests_per_s > 0

    def value(self, measured: Measurement) -> float | None:
        """The figure that the goal is about, in `unit`; None where it is unknown."""
        if self.goal is Goal.THROUGHPUT:
            return measured.texts_per_s
        if self.goal is Goal.LATENCY:
            return measured.objective_ms
        if self.goal is Goal.MEMORY:
            return None if measured.memory_bytes is None else measured.memory_bytes / 2**30
        return self.per_million(measured)

    def score(self, measured: Measurement) -> float | None:
        """Higher is better; None where the figure is unknown."""
        value = self.value(measured)
        if value is None or value <= 0:
            return None
        return value if self.goal is Goal.THROUGHPUT else 1 / value

    @property
    def unit(self) -> str:
        """Of `value`."""
        if self.goal is Goal.THROUGHPUT:
            return "texts/s"
        if self.goal is Goal.LATENCY:
            return f"ms p{self.percentile:g}"
        if self.goal is Goal.MEMORY:
            return "GiB"
        return f"{self.costs.currency if self.costs else '?'} per 1M tokens"

    def per_million(self, measured: Measurement) -> float | None:
        """Cost of a million tokens when busy all day, None without prices or a token count."""
        if not self.costs or not measured.tokens_per_s or not measured.requests_per_s:
            return None
        costs = replace(self.costs, watts=measured.watts)
        load = Load(
            capacity=measured.requests_per_s,
            utilisation=1.0,
            tokens_per_call=measured.tokens_per_s / measured.requests_per_s,
            texts_per_call=self.texts_per_request,
        )
        return cost(costs, load).per_1m_tokens

    def best(self, trial: Trial) -> Measurement | None:
        """The load at which a trial is judged: the best score within the objective, None when no load is within."""
        meeting = [m for m in trial.measurements if self.meets(m) and self.score(m) is not None]
        return max(meeting, key=lambda m: self.score(m) or 0.0, default=None)

    def nearest(self, trials: Sequence[Trial]) -> tuple[Trial, Measurement] | None:
        """Of loads that miss the objective, the one that comes closest to the limits."""
        missed = [(t, m) for t in trials for m in t.measurements if m.misses]
        return min(missed, key=lambda pair: self._excess(pair[1]), default=None)

    def _excess(self, measured: Measurement) -> float:
        """How many times the limit the highest percentile is; failures make it worse than any latency."""
        limit = self.slo.strictest if self.slo else None
        seen = measured.objective_ms
        over = seen / 1000 / limit if limit and seen is not None else 1.0
        wrong = measured.error_rate > (self.slo.errors if self.slo and self.slo.errors is not None else WRONG)
        return over + (1e6 if wrong or not measured.requests_per_s else 0.0)
