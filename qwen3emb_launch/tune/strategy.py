"""What to try next: a pure function of what has been tried, so that a resumed run goes on where it was.

Baseline; then one setting at a time, the most promising first; then winners together; then, while there is time, one
setting more or less than the best so far. Later stages measure for longer, the final (contest.py) longest: many
configurations briefly, few of them well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen3emb_launch.tune.objective import Objective
from qwen3emb_launch.tune.space import Factor, in_order
from qwen3emb_launch.tune.trials import Measurement, Moves, Stage, Status, Trial, moves

BETTER = 1.03  # a score that is not at least that much higher is taken for noise when winners are combined
FINALISTS = 2  # beside the baseline
COMBINATIONS = 3
HARMLESS = 0.95  # a setting that by itself scored less is not added to the best
# Share of the measured time (`--duration`) that one load of a stage gets.
SHARE = {Stage.BASELINE: 0.25, Stage.MOVE: 0.25, Stage.COMBINATION: 0.5, Stage.REFINEMENT: 0.5}


@dataclass(frozen=True)
class Step:
    """A configuration to try."""

    stage: Stage
    moves: Moves


def steps(factors: Sequence[Factor], trials: Sequence[Trial], objective: Objective) -> Iterator[Step]:
    """What is left to try, in order, as far as it is known now. Look at the first only, then ask again."""
    done = {t.moves for t in trials if t.status is not Status.INTERRUPTED}
    if () not in done:
        yield Step(Stage.BASELINE, ())
    for factor, value in in_order(factors):
        single = moves({factor.key: value})
        if single not in done:
            yield Step(Stage.MOVE, single)
    for together in combinations(factors, trials, objective):
        if together not in done:
            yield Step(Stage.COMBINATION, together)
    for near in refinements(factors, trials, objective):
        if near not in done:
            yield Step(Stage.REFINEMENT, near)


def combinations(factors: Sequence[Factor], trials: Sequence[Trial], objective: Objective) -> list[Moves]:
    """All winners together, then the best two, then the best three; a winner is a setting that was better alone."""
    winners = [key_and_value for _, key_and_value in _winners(factors, trials, objective)]
    sizes = dict.fromkeys((len(winners), 2, 3))
    return [moves(dict(winners[:n])) for n in sizes if 2 <= n <= len(winners)][:COMBINATIONS]


def refinements(factors: Sequence[Factor], trials: Sequence[Trial], objective: Objective) -> list[Moves]:
    """The best so far without one of its settings, then with another value or setting that did no harm by itself."""
    scored = [(s, t.moves) for t in trials if (s := score(t, objective)) is not None]
    best = max(scored, default=(0.0, ()))[1]
    if not best:
        return []
    by = {t.moves: score(t, objective) for t in trials}
    base = by.get(()) or 0.0
    fewer = [moves(dict(pair for pair in best if pair != left_out)) for left_out in best]
    singles = [(by.get(moves({f.key: v})), f.key, v) for f in factors for v in f.values if (f.key, v) not in best]
    harmless = sorted(((s, key, v) for s, key, v in singles if s is not None and s >= base * HARMLESS), reverse=True)
    return [m for m in fewer if m] + [moves({**dict(best), key: value}) for _, key, value in harmless]


def _winners(
    factors: Sequence[Factor], trials: Sequence[Trial], objective: Objective
) -> list[tuple[float, tuple[str, str]]]:
    """The best value of each factor that beat the baseline, best first."""
    by = {t.moves: t for t in trials}
    base = score(by.get(()), objective)
    found = []
    for factor in factors:
        scored = [(score(by.get(moves({factor.key: v})), objective), v) for v in factor.values]
        known = [(s, v) for s, v in scored if s is not None]
        if known and (base is None or max(known)[0] >= base * BETTER):
            best, value = max(known)
            found.append((best, (factor.key, value)))
    return sorted(found, key=lambda pair: -pair[0])


def score(trial: Trial | None, objective: Objective) -> float | None:
    """A trial's best score within the objective, None where it has none."""
    best = judged(trial, objective)
    return objective.score(best) if best else None


def judged(trial: Trial | None, objective: Objective) -> Measurement | None:
    """The measurement that a trial stands for."""
    return objective.best(trial) if trial and trial.status is Status.OK else None


def measured(trials: Sequence[Trial], wanted: Moves, objective: Objective) -> Measurement | None:
    """What a configuration came to in its own trial, None where it has not held the objective there."""
    return judged(next((t for t in trials if t.moves == wanted and t.status is Status.OK), None), objective)


def finalists(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """The best trials that look better than the baseline, best first."""
    base = score(next((t for t in trials if not t.moves), None), objective)
    scored = [(s, t) for t in trials if t.moves and (s := score(t, objective)) is not None]
    better = [(s, t) for s, t in scored if base is None or s > base]
    return [t for _, t in sorted(better, key=lambda pair: -pair[0])][:FINALISTS]
