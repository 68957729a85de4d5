"""Float8 noise: how far one text's vectors may lie apart where the checkpoint amplifies what float8 rounds.

A text alone and the same text in a batch differ in a last bit somewhere, and each such bit flips roundings to float8 in
the layers behind it. Where it begins is not known: not in the float8 products, which give a row the same numbers beside
any number of rows (benchmarks/gpu/fp8_rows.py on an H200, 2026-12-01). How much of it reaches the vector is the
checkpoint's own: with random weights in the official shapes an H200 moved vectors by 1 - cosine 1.7e-3 (0.6B), 1.3e-2
(4B) and 3.7e-2 (8B, SGLang's own layer as much as ours; 2026-11-30); trained ones are expected to be steadier.
`Precision.distance` (2.0e-2) is what the official checkpoints are held to, and the demo's.

A checkpoint that nobody knows may be one that amplifies, and an engine that computes right must serve it. Up to
FP8_NOISE, twice the largest seen, such a difference is a warning. It is a fault all the same where a vector lies nearer
to another text's than to its own: noise has a direction of its own and leads to no other text, while swapped, repeated
and mixed-up vectors do, however near the texts lie (two of the demo's lie 0.005 apart). Other faults of batches and
load that these checks are for (a cut text, a lost EOS, another replica's model) move a vector by 0.1 to 1, mostly;
what moves it less, as padding of a shallow model may, is no more than warned of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qwen3emb_launch.vectors import Vector, distance
from qwen3emb_launch.verify.recognition import serves_demo
from qwen3emb_launch.verify.report import Check, Outcome, Verdict
from qwen3emb_launch.verify.session import Session
from qwen3emb_launch.verify.texts import BASE
from qwen3emb_launch.verify.tolerance import FP8_DISTANCE, Precision
from qwen3emb_launch.verify.yardstick import QUANTISED

FP8_NOISE = 4 * FP8_DISTANCE
FIGURE = "float8_noise"  # of a check: the 1 - cosine that was let pass


@dataclass(frozen=True)
class Again:
    """A vector of a text that was asked before: 1 - cosine to the first one, and to the nearest of another text."""

    own: float
    other: float


def explains(precision: Precision, known: bool, apart: Sequence[Again]) -> bool:
    """Whether float8 noise may be all that moved these vectors; never of a checkpoint that is `known` to be steady."""
    if precision.quantised != QUANTISED or known:
        return False
    return all(seen.own <= FP8_NOISE and seen.own < seen.other for seen in apart)


def let_noise_pass(
    session: Session, found: Outcome, again: Sequence[tuple[str, Vector]], *, fewer_dims: bool = False
) -> Outcome:
    """A check that does not hold, as a warning where noise explains it. `again`: the texts and what they got.

    `fewer_dims`: some were asked for, and came. Otherwise a vector of another width is a fault.
    """
    if found.holds is not False or session.precision.quantised != QUANTISED or not again:
        return found
    texts = {*BASE, *(t for t, _ in again)}
    apart = [_apart(session, t, v, texts, len(v) if fewer_dims else session.width) for t, v in again]
    if not explains(session.precision, _known(session), apart):
        return found
    worst = max(seen.own for seen in apart)
    cause = (
        "float8 noise that this checkpoint amplifies: one text alone and in a batch gets vectors 1 - cosine "
        f"{worst:.2g} apart; serve bfloat16, or accept it; `verify --level full` compares with transformers' own "
        f"{QUANTISED}"
    )
    return replace(found, advisory=True, cause=cause, figures={**found.figures, FIGURE: worst})


def warnings(checks: Iterable[Check]) -> list[str]:
    """What `up` says of it: one sentence, by the check that saw most, since all of them see the same."""
    seen = [c for c in checks if c.verdict is Verdict.WARN and FIGURE in c.figures]
    return [f"{c.title}: {c.seen}: {c.cause}" for c in sorted(seen, key=lambda c: -c.figures[FIGURE])[:1]]


def _known(session: Session) -> bool:
    """Whether this is an official checkpoint or the demo: trained, or shallow, and steady."""
    return session.identity.catalog is not None or serves_demo(session)


def _apart(session: Session, text: str, vector: Vector, texts: Iterable[str], dims: int) -> Again:
    """Fewer dims average the errors over less: there the distances count by as much less."""

    def to(other: str) -> float:
        return distance(vector, session.vector(other)[:dims]) * dims / session.width

    return Again(to(text), min(to(other) for other in texts if other != text))
