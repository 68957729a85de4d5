"""The outcome of a run as data and as rows: what won, against what, and which trials nothing else dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch.results import plain
from qwen3emb_launch.statistics import Ratio, number
from qwen3emb_launch.tune.contest import Verdict, words
from qwen3emb_launch.tune.objective import Goal, Objective
from qwen3emb_launch.tune.trials import SET_ASIDE, Measurement, Moves, Status, Trial, label


@dataclass(frozen=True)
class Finalist:
    """One configuration of the final. `ratio` is its score over the baseline's, None for the baseline."""

    moves: Moves
    typical: Measurement
    ratio: Ratio | None
    meets: bool

    def to_dict(self) -> dict[str, Any]:
        """With the name that people read."""
        return {
            "settings": dict(self.moves),
            "label": label(self.moves),
            "typical": self.typical,
            "ratio": self.ratio,
            "meets": self.meets,
        }


@dataclass(frozen=True)
class Outcome:
    """The command's result. `winner` holds the settings that differ from the baseline; None: nothing held."""

    goal: str
    unit: str
    slo: str | None
    winner: Mapping[str, str] | None
    sentence: str
    confirmed: bool
    facts: Mapping[str, Any]
    load: Mapping[str, Any]
    trials: tuple[Trial, ...]
    final: tuple[Finalist, ...]
    front: tuple[int, ...]
    nearest: Mapping[str, Any] | None
    space: Mapping[str, Any]
    untried: tuple[str, ...]
    notes: tuple[str, ...]
    partial: bool
    seconds: float
    journal: Path
    tool: Mapping[str, Any]
    profile: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; a trial's settings as a mapping."""
        from dataclasses import fields

        data = {f.name: getattr(self, f.name) for f in fields(self)}
        trials = [{**plain(t), "moves": dict(t.moves), "label": t.label} for t in self.trials]
        return {**data, "trials": trials}


def finalists(verdict: Verdict, objective: Objective) -> tuple[Finalist, ...]:
    """The final's configurations, the baseline first."""
    return tuple(
        Finalist(moves, measured, verdict.ratios.get(moves), objective.meets(measured))
        for moves, measured in sorted(verdict.typical.items(), key=lambda pair: len(pair[0]))
    )


def nearest(trials: Sequence[Trial], objective: Objective) -> dict[str, Any] | None:
    """The load that came closest, where nothing met the objective."""
    if any(objective.best(t) for t in trials):
        return None
    found = objective.nearest(trials)
    if found is None:
        return None
    trial, measured = found
    return {"settings": dict(trial.moves), "label": trial.label, "level": measured.level, "misses": measured.misses}


def front(trials: Sequence[Trial], objective: Objective) -> tuple[int, ...]:
    """Numbers of the trials that no other beats in one of throughput, p95 and memory without losing in another."""
    seen = [(t.number, m) for t in trials if t.status is Status.OK and (m := objective.best(t))]
    return tuple(n for n, m in seen if not any(_dominates(other, m) for k, other in seen if k != n))


def _dominates(a: Measurement, b: Measurement) -> bool:
    """At least as good in everything known of both, and better in something."""
    pairs = [
        (a.texts_per_s, b.texts_per_s),
        (_less(a.p95), _less(b.p95)),
        (_less(a.memory_bytes), _less(b.memory_bytes)),
    ]
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return all(x >= y for x, y in known) and any(x > y for x, y in known)


def _less(value: float | None) -> float | None:
    return None if value is None else -value


def columns(objective: Objective) -> tuple[str, ...]:
    """Of the table of trials."""
    cost = (objective.unit,) if objective.costs else ()
    return ("", "settings", "load", "texts/s", "p95 ms", "memory GiB", *cost, "score", "ready s", "result")


def rows(trials: Sequence[Trial], objective: Objective, open_loop: bool) -> list[tuple[str, ...]]:
    """One row a trial that was started; `*` marks the front, the score is over the baseline's."""
    marked = front(trials, objective)
    base = next((t for t in trials if not t.moves), None)
    scale = objective.best(base) if base else None
    found = []
    for trial in trials:
        if trial.status in SET_ASIDE:
            continue
        best = objective.best(trial)
        near = objective.nearest([trial])
        shown = best or (near[1] if near else None)
        mine = objective.score(best) if best else None
        theirs = objective.score(scale) if scale else None
        cost = (number(objective.per_million(shown) if shown else None),) if objective.costs else ()
        found.append(
            (
                "*" if trial.number in marked else "",
                trial.label,
                load_words(shown.level, open_loop) if shown else "-",
                number(shown.texts_per_s if shown else None),
                number(shown.p95 if shown else None),
                number(shown.memory_bytes / 2**30 if shown and shown.memory_bytes else None),
                *cost,
                f"{mine / theirs:.3f}" if mine and theirs else "-",
                number(trial.ready_s),
                result(trial, shown),
            )
        )
    return found


def set_aside(trials: Sequence[Trial]) -> tuple[str, ...]:
    """A line for each configuration that took no start: refused by the planner, or known by another name."""
    return tuple(f"{t.label}: {t.status}: {t.reason}" for t in trials if t.status in SET_ASIDE)


def result(trial: Trial, shown: Measurement | None) -> str:
    """A trial's end in words."""
    if trial.status is not Status.OK:
        return f"{trial.status}: {trial.reason}".removesuffix(": ")
    if shown and shown.misses:
        return "misses: " + ", ".join(shown.misses)
    return trial.reason or "ok"


def final_rows(outcome: Outcome, objective: Objective) -> list[tuple[str, ...]]:
    """One row a finalist."""
    return [
        (
            label(f.moves),
            *(() if _shown_anyway(objective) else (number(objective.value(f.typical)),)),
            number(f.typical.texts_per_s),
            number(f.typical.p95),
            words(f.ratio) if f.ratio else "-",
            "yes" if f.meets else ", ".join(f.typical.misses),
        )
        for f in outcome.final
    ]


def _shown_anyway(objective: Objective) -> bool:
    """Whether the goal's figure is a column that every table has."""
    return objective.goal is Goal.THROUGHPUT or (objective.goal is Goal.LATENCY and objective.percentile == 95)


def final_columns(objective: Objective) -> tuple[str, ...]:
    """Of the final's table."""
    own = () if _shown_anyway(objective) else (objective.unit,)
    return ("final", *own, "texts/s", "p95 ms", "score over the baseline", "meets")


def load_words(level: float, open_loop: bool) -> str:
    """`16 clients`, `1 client`, or `120 requests/s`."""
    return f"{level:g} " + ("requests/s" if open_loop else "client" if level == 1 else "clients")
