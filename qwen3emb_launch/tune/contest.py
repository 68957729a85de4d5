"""The final: the best two and the baseline in turns, so that neither noise nor drift chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from qwen3emb_launch.statistics import FEWEST_PAIRS, Ratio, ratio
from qwen3emb_launch.tune.objective import Objective
from qwen3emb_launch.tune.trials import Measurement, Moves, Round, label

BASELINE: Moves = ()


@dataclass(frozen=True)
class Verdict:
    """What the figures say. `winner` is None when nothing met the objective; () is the baseline.

    `ratios` are scores over the baseline's, `typical` each configuration's medians over the rounds, `confirmed` is
    True when the winner's place follows from a final and not from a single measurement. `undecided` tells of a final
    that ended before it had as many rounds as an interval needs.
    """

    winner: Moves | None
    sentence: str
    ratios: Mapping[Moves, Ratio] = field(default_factory=dict)
    typical: Mapping[Moves, Measurement] = field(default_factory=dict)
    confirmed: bool = False
    undecided: bool = False


def typical(measured: Sequence[Measurement]) -> Measurement:
    """Rounds as one: the median of each figure; the objective is missed if most rounds missed it."""

    def middle(name: str) -> float | None:
        known = [v for m in measured if (v := getattr(m, name)) is not None]
        return median(known) if known else None

    missed = [m for m in measured if m.misses]
    last = measured[-1]
    return replace(
        last,
        seconds=sum(m.seconds for m in measured),
        requests_per_s=median(m.requests_per_s for m in measured),
        texts_per_s=median(m.texts_per_s for m in measured),
        tokens_per_s=middle("tokens_per_s"),
        p50=middle("p50"),
        p95=middle("p95"),
        p99=middle("p99"),
        objective_ms=middle("objective_ms"),
        watts=middle("watts"),
        error_rate=sum(m.error_rate for m in measured) / len(measured),
        misses=missed[-1].misses if 2 * len(missed) > len(measured) else (),
        memory_bytes=max((m.memory_bytes for m in measured if m.memory_bytes is not None), default=None),
    )


def judge(rounds: Sequence[Round], objective: Objective) -> Verdict:
    """The winner of a final. A candidate beats the baseline only if the 95% interval of the ratio leaves 1 out.

    Where the baseline misses the objective the best of the others is taken, unconfirmed after a round or two: a median
    of so few may have missed it by chance.
    """
    by: dict[Moves, list[Measurement]] = {}
    for one in rounds:
        for moves, measured in one.measured.items():
            by.setdefault(moves, []).append(measured)
    middles = {moves: typical(measured) for moves, measured in by.items()}
    holding = [moves for moves in middles if objective.meets(middles[moves])]
    base = by.get(BASELINE)
    ratios = {m: _ratio(base, by[m], objective) for m in by if m != BASELINE and base and len(base) == len(by[m])}
    known = {m: r for m, r in ratios.items() if r is not None}
    candidates = [m for m in holding if m != BASELINE]
    if BASELINE in middles and BASELINE not in holding:
        if not candidates:
            return Verdict(None, "no configuration of the final met the objective", known, middles)
        best = max(candidates, key=lambda m: objective.score(middles[m]) or 0.0)
        held, text = len(rounds), f"{label(best)} meets the objective, the baseline does not"
        if held < FEWEST_PAIRS:
            text += f", in {held} round{'s' * (held > 1)} only: --resume holds more"
        return Verdict(best, text, known, middles, held >= FEWEST_PAIRS)
    winners = [m for m in candidates if m in known and known[m].decided and known[m].value > 1]
    if winners:
        best = _simplest_of_equals(sorted(winners, key=lambda m: -known[m].value), by, objective)
        return Verdict(
            best, f"{label(best)} beats the baseline: {words(known[best])} times its score", known, middles, True
        )
    close = "; ".join(f"{label(m)}: {words(r)}" for m, r in known.items())
    if any(r.pairs < FEWEST_PAIRS for r in known.values()):
        text = f"it takes {FEWEST_PAIRS} rounds to tell a gain from chance ({close})"
        return Verdict(BASELINE, text, known, middles, undecided=True)
    return Verdict(BASELINE, f"nothing beats the baseline beyond chance ({close})", known, middles, True)


def _ratio(base: Sequence[Measurement], other: Sequence[Measurement], objective: Objective) -> Ratio | None:
    pairs = [(objective.score(a), objective.score(b)) for a, b in zip(base, other, strict=True)]
    good = [(a, b) for a, b in pairs if a and b]
    return ratio([a for a, _ in good], [b for _, b in good]) if len(good) == len(pairs) else None


def _simplest_of_equals(
    winners: Sequence[Moves], by: Mapping[Moves, Sequence[Measurement]], objective: Objective
) -> Moves:
    """The best, unless one with fewer changes cannot be told from it."""
    best = winners[0]
    for other in winners[1:]:
        between = _ratio(by[other], by[best], objective)
        if len(other) < len(best) and (between is None or not between.decided):
            best = other
    return best


def words(found: Ratio) -> str:
    """`1.21 (95%: 1.15 to 1.27)` times; without an interval that is said."""
    if found.low is None or found.high is None:
        return f"{found.value:.3g} ({found.pairs} round{'s' * (found.pairs != 1)}: no interval)"
    return f"{found.value:.3g} (95%: {found.low:.3g} to {found.high:.3g})"
