"""Comparison with vectors computed elsewhere, and the fault's name when they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from qwen3emb_launch.vectors import distance, has_direction, normalised
from qwen3emb_launch.verify.probes_vectors import NEARBY, SAME
from qwen3emb_launch.verify.recognition import demo_precision, same_angles, serves_demo
from qwen3emb_launch.verify.reference import DEMO_SET, ReferenceSet, Transformers, load
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import Probe, Session, Vector
from qwen3emb_launch.verify.yardstick import QUANTISED, Yardstick, yardstick

DIAGNOSED = 6  # so many texts are computed the wrong ways, to name a fault

# The wrong ways of the reference script, in words.
CAUSES = {
    "mean_pooling": "mean pooling instead of the last token",
    "mean_pooling_no_eos": "mean pooling instead of the last token, and <|endoftext|> is not appended",
    "first_token": "the first token is pooled (CLS) instead of the last",
    "max_pooling": "max pooling instead of the last token",
    "no_eos": "the server does not append <|endoftext|>: the last word is pooled instead",
    "weighted_mean": "mean pooling weighted by position instead of the last token",
    "last_two_mean": "the mean of the last two tokens is pooled instead of the last",
    "second_last_token": "the token before <|endoftext|> is pooled instead of <|endoftext|>",
    "double_eos": "<|endoftext|> is appended twice",
    "bos": "a token is put before the text: <|endoftext|> as a BOS, which this model has not",
    "im_end": "<|im_end|> is appended instead of <|endoftext|> (the config's eos is not the pooled token)",
    "right_padding": "padding on the wrong side: the pooled position is a padding token",
    "left_padding_unmasked": "padding is not masked: the text attends to padding tokens",
    "truncated": "long texts are truncated",
    "truncated_no_eos": "long texts are truncated and lose their <|endoftext|>",
    "instruction_stripped": "the instruction is stripped from queries",
    "space_after_query": "the query template is rewritten with a space after `Query:`",
    "lower_cased": "texts are lower-cased",
    "white_space_stripped": "white space around texts is stripped",
    "white_space_collapsed": "runs of white space are collapsed",
    "line_breaks_replaced": "line breaks are replaced by spaces",
    "ascii_only": "characters outside ASCII are dropped",
    "bidirectional": "attention is not causal: tokens see those behind them",
    "rotary_base": "the rotary base is 10,000 instead of the checkpoint's own (rope_theta is not read)",
    "no_final_norm": "the final norm of the model is left out",
    "second_last_layer": "the layer before the last is pooled",
    "instruction_added": "an instruction is added to documents",
}

Compute = Callable[[Sequence[str], str | None], Transformers]
Alternatives = Callable[[Sequence[str]], Mapping[str, Mapping[str, Vector]]]


def compare(
    session: Session,
    reference: ReferenceSet,
    allowed: float | Mapping[str, float],
    alternatives: Alternatives | None = None,
    figures: Mapping[str, Any] | None = None,
) -> Outcome:
    """The endpoint's vectors, each text asked alone, against a set; `allowed` is one distance, or one a text."""
    bound = allowed if isinstance(allowed, Mapping) else dict.fromkeys(reference.vectors, allowed)
    largest = max(bound.values())
    expected = f"1 - cosine ≤ {_range(bound.values())} to {reference.origin} ({reference.dtype})"
    seen = session.fitting(list(reference.vectors))
    texts = list(seen)
    if reference.width != session.width:
        return broken(
            expected,
            f"{session.width} dims, the reference has {reference.width}",
            "another model, or vectors cut by default",
        )
    apart = {t: distance(v, reference.vectors[t]) for t, v in seen.items()}
    worst = max(apart.values())
    numbers: dict[str, Any] = {
        **(figures or {}),
        "texts": len(texts),
        "min_cosine": 1 - worst,
        "mean_cosine": 1 - fmean(apart.values()),
        "allowed": largest,
    }
    wrong = [t for t in texts if apart[t] > bound[t]]
    if not wrong:
        return held(
            expected,
            f"cosine {1 - worst:.6f} at least, {numbers['mean_cosine']:.6f} on average, {len(texts)} texts",
            **numbers,
        )
    said = f"{len(wrong)} of {len(texts)} texts differ, cosine down to {1 - worst:.4f}"
    return broken(expected, said, _cause(seen, reference, wrong, largest, alternatives), **numbers)


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.1e}", f"{ordered[-1]:.1e}"
    return low if low == high else f"{low} to {high}, by text,"


def _cause(
    seen: Mapping[str, Vector],
    reference: ReferenceSet,
    wrong: Sequence[str],
    allowed: float,
    alternatives: Alternatives | None,
) -> str:
    """The fault's name: what all (or most) of the wrong vectors are instead."""
    if not any(has_direction(v) for v in seen.values()):
        return "no vector has a direction: all NaN or zero"
    if not all(has_direction(seen[t]) for t in wrong):
        return "NaN, infinite or zero on some texts: overflow, float16 instead of bfloat16"
    first = next(iter(seen.values()))
    if all(distance(first, v) < SAME for v in seen.values()):
        return "a constant: every text gets one vector"
    named = diagnose(seen, wrong, allowed, alternatives(sample(wrong)) if alternatives else {})
    if named:
        return named
    if all(text.startswith("Instruct: ") for text in wrong):
        return "only instructed queries differ: the instruction is stripped or rewritten"
    others = [
        t for t in wrong if any(distance(seen[t], v) <= allowed for o, v in reference.vectors.items() if o != t)
    ]  # fmt: skip
    if len(others) == len(wrong) and len(wrong) > 1:
        return "these are vectors of other texts of the set: texts are mixed up"
    far = max(distance(seen[t], reference.vectors[t]) for t in wrong)
    if far < max(NEARBY, 2 * allowed) and len(wrong) > len(seen) // 2:
        return "noise or a coarser number format: close to the right vectors, further than the precision explains"
    if len(wrong) == len(seen):
        moved = _moved(seen, reference, allowed)
        if moved:
            return moved
    if len(wrong) == len(seen):
        return "another checkpoint, or a pooling, EOS or padding that none of the known faults explains"
    return f"{len(wrong)} texts are embedded as something else: truncated, rewritten or padded"


def _moved(seen: Mapping[str, Vector], reference: ReferenceSet, allowed: float) -> str:
    """What was done to the components of right vectors, the same for all texts; empty when it was nothing of this."""
    right = {t: reference.vectors[t] for t in seen}
    if all(distance(v, [abs(x) for x in right[t]]) <= allowed for t, v in seen.items()):
        return "the signs of the components are lost: unsigned storage, or absolute values"
    if not same_angles(seen, right, allowed, reference.width):
        return ""
    if all(distance(sorted(v), sorted(right[t])) <= allowed for t, v in seen.items()):
        return "the right vectors with their components in another order: searches agree, an index of both does not"
    return "the right vectors in another basis: signs flipped or rotated; searches agree, an index of both does not"


def sample(wrong: Sequence[str]) -> list[str]:
    """The texts to compute the wrong ways: the shortest few and the longest."""
    by_length = sorted(wrong, key=len)
    return by_length if len(by_length) <= DIAGNOSED else [*by_length[: DIAGNOSED - 1], by_length[-1]]


def diagnose(
    seen: Mapping[str, Vector],
    wrong: Sequence[str],
    allowed: float,
    alternatives: Mapping[str, Mapping[str, Vector]],
) -> str:
    """The wrong way whose vectors the endpoint's are, by vote over the texts; empty when none matches half of them."""
    votes: Counter[str] = Counter()
    for text in sample(wrong):
        near = {
            name: distance(seen[text], normalised(vectors[text]))
            for name, vectors in alternatives.items()
            if text in vectors
        }
        if not near:
            continue
        best = min(near.values())
        if best <= allowed:
            votes.update({_family(name) for name, d in near.items() if d <= max(2 * best, allowed / 4)})
    if not votes:
        return ""
    family, count = max(votes.items(), key=lambda item: (item[1], -list(CAUSES).index(item[0])))
    return CAUSES[family] if 2 * count >= len(sample(wrong)) else ""


def _family(name: str) -> str:
    """`right_padding_to_128` -> `right_padding`."""
    return name.rstrip("0123456789").removesuffix("_").removesuffix("_to")


def saved_probe(reference: ReferenceSet) -> Probe:
    """The check against a saved set. Both sides may be off by the precision."""

    def run(session: Session) -> Outcome:
        return compare(session, reference, 2 * session.precision.distance)

    return Probe("saved_reference", "saved reference set", run)


def shipped_probe(reference: ReferenceSet, compute: Compute | None) -> Probe:
    """The check of the demo checkpoint against its shipped float32 vectors; `compute` only names a fault."""

    def wrong_ways(some: Sequence[str]) -> Mapping[str, Mapping[str, Vector]]:
        return compute(some, "float32").alternatives if compute else {}

    def run(session: Session) -> Outcome:
        return compare(session, reference, session.precision.distance, wrong_ways)

    return Probe("demo_reference", "demo checkpoint's vectors", run)


def recognised_probe() -> Probe:
    """The same for an endpoint that does not say what it serves, where its vectors tell that they are the demo's."""

    def run(session: Session) -> Outcome:
        if not serves_demo(session):
            return skipped("not the demo checkpoint")
        return compare(session, load(DEMO_SET), demo_precision(session).distance)

    return Probe("demo_reference", "demo checkpoint's vectors", run, quiet=True)


def transformers_probe(compute: Compute, texts: Sequence[str]) -> Probe:
    """The check against transformers in the engine environment.

    `compute(texts, dtype)` runs the script; with a dtype it computes the wrong ways in that.
    """

    def run(session: Session) -> Outcome:
        main = compute(texts, None)
        stick = yardstick(session.precision, main.sets, texts)
        if stick is None:
            return skipped("; ".join(f"{k}: {v}" for k, v in main.skipped.items()))
        seen = session.fitting(texts)
        cosines = {
            name: [1 - distance(v, found.vectors[t]) for t, v in seen.items()] for name, found in main.sets.items()
        }
        if 1 - min(cosines[stick.exact.dtype]) <= stick.own:
            stick = stick.unquantised  # nothing was lost, whatever the endpoint says of its weights
        wrong_in = QUANTISED if stick.quantises_badly else "float32"

        def wrong_ways(some: Sequence[str]) -> Mapping[str, Mapping[str, Vector]]:
            return compute(some, wrong_in).alternatives

        figures: dict[str, Any] = {"judged_by": stick.reference.dtype}
        for name, error in stick.errors.items():
            figures[f"{name}_reference_min_cosine"] = 1 - error
            figures[f"min_cosine_to_{name}"] = min(cosines[name])
        found = compare(session, stick.reference, stick.allowed, wrong_ways, figures)
        return _of_bad_quantisation(found, stick, cosines) if stick.quantises_badly else found

    return Probe("transformers", "transformers' vectors", run, level="full")


def _of_bad_quantisation(found: Outcome, stick: Yardstick, cosines: Mapping[str, Sequence[float]]) -> Outcome:
    """What agreeing with transformers' own quantised vectors means: right, of vectors that quantising has moved far."""
    exact, own = cosines[stick.exact.dtype], cosines[QUANTISED]
    cost = max(stick.costs.values())
    figures = {
        **found.figures,
        "min_cosine": min(exact),
        "mean_cosine": fmean(exact),
        f"mean_cosine_to_{QUANTISED}": fmean(own),
        f"{QUANTISED}_reference_mean_cosine": 1 - fmean(stick.costs.values()),
    }
    if not found.holds:
        return replace(found, figures=figures)
    seen = (
        f"cosine {min(own):.4f} at least, {fmean(own):.4f} on average, {len(own)} texts; to {stick.exact.dtype} "
        f"{min(exact):.4f} and {fmean(exact):.4f}, as transformers' own {QUANTISED} {1 - cost:.4f} and "
        f"{1 - fmean(stick.costs.values()):.4f}"
    )
    if stick.blind:
        cause = (
            f"{QUANTISED} moves this checkpoint's vectors by 1 - cosine {cost:.2g}: a lost EOS or a cut text could "
            "hide in that, so nothing is proven; serve bfloat16, or verify the same launch without quantisation"
        )
        return Outcome(None, found.expected, seen, cause, figures)
    cause = (
        f"computed right, but {QUANTISED} costs this checkpoint 1 - cosine {cost:.2g} at most, "
        f"{fmean(stick.costs.values()):.2g} on average: `qwen3emb diff` with the bfloat16 endpoint or its saved set "
        "before both share an index, or serve bfloat16"
    )
    return replace(found, holds=False, advisory=True, seen=seen, cause=cause, figures=figures)
