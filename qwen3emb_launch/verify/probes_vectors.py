"""Checks of the vectors themselves: finite, unit length, distinct, cut right, in order, the same in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from qwen3emb_launch.catalog import MIN_DIMS
from qwen3emb_launch.vectors import distance, dot, finite, has_direction, largest_difference, norm, normalised, sliced
from qwen3emb_launch.verify.contact import Misanswer
from qwen3emb_launch.verify.noise import let_noise_pass
from qwen3emb_launch.verify.recognition import serves_demo
from qwen3emb_launch.verify.report import Outcome, broken, held, skipped
from qwen3emb_launch.verify.session import FEW, Probe, Session, Vector
from qwen3emb_launch.verify.texts import BASE, DOCUMENTS, GOLDEN, INSTRUCTED, OVERFLOWING, QUERIES
from qwen3emb_launch.verify.tolerance import GOLDEN_SCORE

OVERFLOW = (
    "float16 does that on Qwen3-Embedding (QwenLM/Qwen3-Embedding#164), SGLang 0.5.11 to 0.5.13.post1 under a "
    "piecewise CUDA graph; serve in bfloat16"
)
BY_LENGTH = "texts of one length get one vector: a cache or a batch that tells texts apart by their length"
PADDED = 0.9  # vectors that are zero in more than the last tenth were cut, then filled up
NEARBY = 0.02  # 1 - cosine of a coarse copy of a vector; any of the faults in computing it moves it further
ENOUGH = 64  # components, to tell a byte's storage by how few values there are
FEW_VALUES = 16
BATCH = (*BASE, BASE[0])  # one twice: what removes duplicates answers too few
SAME = 1e-6  # 1 - cosine under which two vectors are one: far below what another text does


def quoted(text: str, length: int = 32) -> str:
    """A text as it appears in a table cell."""
    short = text if len(text) <= length else text[: length - 1] + "…"
    return repr(short)


def probe_finite(session: Session) -> Outcome:
    expected = "every component is a number"
    session.vector(BASE[0])
    for text in OVERFLOWING:
        try:
            session.vector(text)
        except Misanswer:
            try:  # a second time, so that a rare fault is not taken for one of these texts
                session.vector(text)
            except Misanswer as exc:
                return broken(expected, f"{quoted(text)}: {exc.message}", f"{exc.cause}; {OVERFLOW}")
    bad = [text for text, vector in zip(BASE, session.base, strict=True) if not finite(vector)]
    if not bad:
        return held(expected, f"{len(BASE)} texts of {session.width} numbers")
    return broken(
        expected,
        f"NaN, null or infinity for {len(bad)} of {len(BASE)} texts, the first {quoted(bad[0])}",
        "every vector is NaN: a broken kernel or checkpoint"
        if len(bad) == len(BASE)
        else f"overflow on some texts: {OVERFLOW}",
        texts=bad,
    )


def probe_norm(session: Session) -> Outcome:
    allowed = session.precision.norm
    expected = f"length 1 ± {allowed:.2g}"
    lengths = [norm(v) for v in session.base if finite(v)]
    if not lengths:
        return skipped("no finite vector to measure")
    low, high = min(lengths), max(lengths)
    worst = max(high - 1, 1 - low)
    seen = f"{low:.5f} to {high:.5f}"
    if worst <= allowed:
        return held(expected, seen, worst=worst)
    if low == 0:
        cause = "a zero vector: overflow, or the pooled position is empty"
    elif worst < 0.1:
        cause = "the vectors were normalised, then changed: noise, quantised storage, or slicing without renormalising"
    else:
        cause = "no L2 normalisation"
    return broken(expected, seen, cause, worst=worst)


def probe_width(session: Session) -> Outcome:
    catalog = session.identity.catalog
    expected = f"{catalog.shape.hidden_size} dims" if catalog else "one width for all texts"
    widths = sorted({len(v) for v in session.base})
    seen = f"{', '.join(map(str, widths))} dims"
    if len(widths) > 1:
        return broken(expected, seen, "some texts get vectors of another width")
    if catalog and widths[0] != catalog.shape.hidden_size:
        return broken(expected, seen, f"this is not {catalog.hub_id}, or its vectors are cut by default")
    used = max((i + 1 for v in session.base for i, x in enumerate(v) if x), default=0)
    if 0 < used <= PADDED * widths[0]:
        return broken(expected, f"{seen}, zero from {used} on", "vectors of fewer dims, filled up with zeros")
    return held(expected, seen)


def probe_signs(session: Session) -> Outcome:
    expected = "components above and below zero"
    usable = [v for v in session.base if has_direction(v)]
    if not usable:
        return skipped(NO_DIRECTION)
    below = sum(x < 0 for v in usable for x in v) / sum(map(len, usable))
    seen = f"{below:.0%} below zero"
    if 0 < below < 1:
        return held(expected, seen)
    return broken(expected, seen, "the signs of the components are lost: unsigned storage, or absolute values")


def probe_steps(session: Session) -> Outcome:
    """Storage of a byte a component shows in how few values there are, long before it shows in a cosine."""
    expected = "components as fine as the number format"
    vectors = [v for v in session.base if has_direction(v)]
    if not vectors or session.width < ENOUGH:
        return skipped(f"fewer than {ENOUGH} components" if vectors else NO_DIRECTION)
    stored = [byte_storage(v) for v in vectors]
    if not all(stored):
        return held(expected, f"{len({*vectors[0]})} values in a vector")
    return broken(
        expected,
        f"{len({*vectors[0]})} values in a vector of {session.width}: {stored[0]}",
        "the vectors were stored in a byte a component (int8 or float8), or rounded to few digits",
    )


def byte_storage(vector: Sequence[float]) -> str:
    """How the components of a vector of ENOUGH or more are seen to have been stored in a byte each; empty if not.

    Of that many numbers in any finer format some lie nearer to each other than a 300th of their range, and their
    mantissas are more than 16: e4m3 has eight, e5m2 four.
    """
    values = sorted({*vector})
    gap = min((b - a for a, b in pairwise(values)), default=0.0)
    if len(values) > FEW_VALUES and gap > (values[-1] - values[0]) / 300:
        return "all of them multiples of one step"
    mantissas = {round(math.frexp(abs(x))[0], 4) for x in vector if x}
    return f"{len(mantissas)} mantissas" if FEW_VALUES > len(mantissas) > 1 else ""


def probe_distinct(session: Session) -> Outcome:
    expected = "other texts get other vectors"
    vectors = session.base
    pairs = [  # a query beside itself with its instruction is the next check's business
        (i, j) for i in range(len(BASE)) for j in range(i) if not BASE[j].endswith(BASE[i])
    ]
    equal = [(BASE[i], BASE[j]) for i, j in pairs if distance(vectors[i], vectors[j]) < SAME]
    everything = len(pairs)
    if not equal:
        return held(expected, f"{len(BASE)} texts, no two alike")
    cause = (
        "a constant: the text does not reach the model"
        if len(equal) == everything
        else BY_LENGTH
        if all(len(x) == len(y) for x, y in equal)
        else "texts are confused, or cut to nothing before they are embedded"
    )
    a, b = equal[0]
    return broken(expected, f"{len(equal)} of {everything} pairs are one vector: {quoted(a)} = {quoted(b)}", cause)


def one_for_all(session: Session) -> bool:
    """Whether even two unlike documents get one vector: then finer comparisons have nothing to say."""
    first, second = (session.vector(t) for t in DOCUMENTS)
    return distance(first, second) < SAME


NO_DIRECTION = "some vectors are not finite, or zero: nothing to compare"
ONE_FOR_ALL = "all texts get one vector: nothing to tell apart"


def probe_instruction(session: Session) -> Outcome:
    expected = "a query's instruction changes its vector"
    if one_for_all(session):
        return skipped(ONE_FOR_ALL)
    far = [distance(session.vector(a), session.vector(b)) for a, b in zip(INSTRUCTED, QUERIES, strict=True)]
    if min(far) < SAME:
        return broken(
            expected,
            "the instructed query has the bare query's vector",
            "the instruction is stripped, or everything before `Query:` is dropped",
        )
    return held(expected, f"moved by 1 - cosine {min(far):.3f} or more", moved=far)


def probe_ranking(session: Session) -> Outcome:
    expected = "each query finds its own document"
    scores = golden_scores(session)
    right = scores[0][0] > scores[0][1] and scores[1][1] > scores[1][0]
    if serves_demo(session):
        return skipped("the demo checkpoint has random weights: its ranking means nothing")
    if right:
        return held(expected, _matrix(scores))
    known = session.identity.catalog is not None
    return broken(
        expected,
        _matrix(scores),
        "a passage is not found by its own question: wrong pooling, EOS, instruction or checkpoint",
        advisory=not known,
    )


def golden_scores(session: Session) -> list[list[float]]:
    """Instructed queries x documents: inner products of the endpoint's vectors, normalised first."""
    queries = [normalised(session.vector(t)) for t in INSTRUCTED]
    documents = [normalised(session.vector(t)) for t in DOCUMENTS]
    return [[dot(q, d) if len(q) == len(d) else math.nan for d in documents] for q in queries]


def probe_golden(session: Session) -> Outcome:
    identity = session.identity
    key = identity.catalog.key if identity.catalog else None
    golden = GOLDEN.get(key or "")
    if golden is None:
        return skipped("no published scores for this model; `--level full` compares with transformers")
    allowed = GOLDEN_SCORE if not session.precision.quantised else 3 * GOLDEN_SCORE
    scores = golden_scores(session)
    worst = max(
        (abs(s - g) if math.isfinite(s) else math.inf) for row, want in zip(scores, golden, strict=True)
        for s, g in zip(row, want, strict=True)
    )  # fmt: skip
    expected = f"{_matrix(golden)} ± {allowed}"
    if worst <= allowed:
        return held(expected, f"{_matrix(scores)}, {worst:.4f} off at most", worst=worst)
    return broken(
        expected,
        f"{_matrix(scores)}, {worst:.3f} off",
        f"these are not the vectors of {key}: pooling, EOS (<|endoftext|>), padding or instruction is wrong, or the "
        "checkpoint is another; `--level full` beside the checkpoint names which",
        worst=worst,
    )


def _matrix(scores: object) -> str:
    assert isinstance(scores, (list, tuple))  # noqa: S101 - rows of floats
    return "[" + ", ".join("[" + ", ".join(f"{s:.4f}" for s in row) + "]" for row in scores) + "]"


def probe_batch(session: Session) -> Outcome:
    allowed = session.precision.distance
    expected = f"a batch's vectors are those of its texts asked alone, 1 - cosine ≤ {allowed:.1e}"
    singles = session.vectors(BATCH)
    vectors = session.together(BATCH)
    apart = [distance(a, b) for a, b in zip(vectors, singles, strict=True)]
    if max(apart) <= allowed:
        parts = f" in requests of {FEW}, more are refused" if session.few else ""
        return held(expected, f"{len(BATCH)} texts{parts}, {max(apart):.1e} at most", worst=max(apart))
    if not all(map(has_direction, session.base)):
        return skipped(NO_DIRECTION)
    wrong = [i for i, d in enumerate(apart) if d > allowed]
    found = broken(
        expected,
        f"{len(wrong)} of {len(BATCH)} differ, up to {max(apart):.2g}",
        _batch_cause(session, vectors, wrong),
        worst=max(apart),
        wrong=wrong,
    )
    return let_noise_pass(session, found, [(BATCH[i], vectors[i]) for i in wrong])


def _batch_cause(session: Session, batch: tuple[Vector, ...], wrong: list[int]) -> str:
    allowed = session.precision.distance
    singles = session.vectors(BATCH)

    def others(i: int, vectors: Sequence[Vector]) -> list[Vector]:
        return [v for text, v in zip(BATCH, vectors, strict=True) if text != BATCH[i]]

    kinds = sum(all(distance(batch[i], batch[j]) >= SAME for j in range(i)) for i in range(len(batch)))
    if kinds < len(BASE):
        return "a vector of the batch is repeated: texts get that of another one"
    if all(any(distance(batch[i], v) <= allowed for v in others(i, singles)) for i in wrong):
        return "the batch's order is swapped: each of these vectors belongs to another text of the batch"
    if len(wrong) <= len(BATCH) // 2 and _wavers(session, wrong):
        return "an intermittent fault: the same text asked again, alone, gets another vector"
    longest = max(range(len(BATCH)), key=lambda i: session.tokens.get(BATCH[i]) or len(BATCH[i].encode()))
    if longest not in wrong and len(wrong) > len(BATCH) // 2:
        return (
            "padding on the wrong side: only the longest text of the batch keeps its vector, the pooled position of "
            "the others is padding"
        )
    if len(wrong) == len(BATCH):
        return "noise, or another computation in batches than alone"
    return "some texts of a batch get vectors of their own: padding, truncation or noise"


def _wavers(session: Session, wrong: list[int]) -> bool:
    """Whether these texts differ from themselves, batch or not."""
    texts = [BATCH[i] for i in wrong[:4]]
    again = [session.contact.embed(text).vectors[0] for text in texts]
    right = session.vectors(texts)
    return any(distance(a, b) > session.precision.distance for a, b in zip(again, right, strict=True))


def probe_order(session: Session) -> Outcome:
    expected = "index counts 0, 1, 2 … and the vectors come in the order of the inputs"
    if one_for_all(session):
        return skipped(ONE_FOR_ALL)
    if not all(map(has_direction, session.base)):
        return skipped(NO_DIRECTION)
    texts = [BASE[i] for i in (8, 2, 0, 3)]
    answer = session.contact.embed(texts, cached=True)
    indices = list(answer.indices)
    nearest = [
        min(range(len(texts)), key=lambda j: distance(v, session.vector(texts[j]))) for v in answer.vectors
    ]  # fmt: skip
    seen = f"index {indices}, vectors of inputs {nearest}"
    right = list(range(len(texts)))
    if nearest != right:
        return broken(expected, seen, "the order of a batch is swapped")
    if indices != right:
        return broken(expected, seen, "the index fields are wrong: clients that sort by them mix texts up")
    return held(expected, seen)


def probe_dims(session: Session) -> Outcome:
    full = session.width
    wanted = [MIN_DIMS, 128]
    if session.options.level == "full":
        wanted = sorted({*wanted, 33, 64, 100, 256, 512, 768, 1024, 2048, full - 1})
    wanted = [*(d for d in wanted if d < full), full]
    expected = "dimensions answers that many: the full vector cut, then length 1 again"
    text = DOCUMENTS[0]
    whole = session.vector(text)
    worst = 0.0
    for dims in wanted:
        vector = session.contact.embed(text, dims=dims).vectors[0]
        if len(vector) != dims:
            cause = "`dimensions` is ignored" if len(vector) == full else "`dimensions` is answered by another number"
            return broken(expected, f"{len(vector)} dims for {dims} asked", cause)
        if not finite(vector) or not finite(whole):
            return broken(expected, f"NaN at {dims} dims", "not finite: see the first check")
        right = sliced(whole, dims)
        off = largest_difference(vector, right)
        allowed = session.precision.component(max(map(abs, right)))
        worst = max(worst, off)
        if off > allowed:
            return broken(
                expected,
                f"at {dims} dims a component is {off:.4f} off, length {norm(vector):.4f}",
                _slice_cause(session, vector, whole),
            )
    others = [BASE[0], text, BASE[-1]]
    widths = sorted({len(v) for v in session.contact.embed(others, dims=MIN_DIMS).vectors})
    if widths != [MIN_DIMS]:
        seen = f"{' and '.join(map(str, widths))} dims for {MIN_DIMS} asked in a batch of {len(others)}"
        return broken(expected, seen, "`dimensions` is ignored in batches")
    after = len(session.contact.embed(text).vectors[0])
    if after != full:
        seen = f"{after} dims where none were asked, after requests that did"
        return broken(expected, seen, "`dimensions` of one request is kept for the next")
    return held(expected, f"{', '.join(map(str, wanted))}: within {worst:.1e} a component", worst=worst)


def _slice_cause(session: Session, vector: Vector, whole: Vector) -> str:
    dims = len(vector)
    if abs(norm(vector) - 1) > session.precision.norm:
        if distance(vector, whole[:dims]) <= session.precision.distance:
            return "the vector is cut but not renormalised"
        return "no L2 normalisation after the cut"
    if distance(vector, whole[-dims:]) <= session.precision.distance:
        return "the last components are answered instead of the first"
    if distance(vector, whole[:dims]) < NEARBY:
        return "close to the right cut, further off than the precision explains: rounded or quantised storage, or noise"
    return "fewer dims are not the first ones of the full vector: projected, reordered, or noise"


PROBES = (
    Probe("finite", "numbers are finite", probe_finite),
    Probe("width", "one width", probe_width),
    Probe("norm", "unit length", probe_norm),
    Probe("signs", "signs of the components", probe_signs),
    Probe("steps", "fine components", probe_steps),
    Probe("distinct", "texts tell apart", probe_distinct),
    Probe("instruction", "the instruction counts", probe_instruction),
    Probe("ranking", "the right document ranks first", probe_ranking),
    Probe("golden", "published scores", probe_golden),
    Probe("batch", "batch = single", probe_batch),
    Probe("order", "order of a batch", probe_order),
    Probe("dims", "fewer dims", probe_dims),
)
