"""May two endpoints' vectors share an index? The same texts at both, their distances, and what a search would find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from qwen3emb_launch.vectors import distance, dot, finite, norm, normalised
from qwen3emb_launch.verify.fingerprint import differences
from qwen3emb_launch.verify.reference import ReferenceSet
from qwen3emb_launch.verify.texts import ALL, CORPUS_QUERIES, INSTRUCTED, QUERIES

TOP = 10
CLOSE_COSINE = 0.98  # at least this for every text, and
CLOSE_OVERLAP = 0.9  # this much of the top ten the same: an index may be shared, ranks near ties move
UNLIKE_LENGTH = 0.01  # of a length: number formats move it by half of that


@dataclass(frozen=True)
class Difference:
    """What `qwen3emb diff` found. `verdict` is `same`, `close` or `other`; the first two may share an index.

    `overlap`: mean share of the top ten that both find; `mixed_overlap`: the same with A's queries on B's documents
    against A alone, which is what a shared index does; `spearman`: mean rank correlation over all documents.
    """

    a: str
    b: str
    verdict: str
    reason: str
    texts: int
    width: tuple[int, int]
    allowed: float
    cosine: Mapping[str, float] = field(default_factory=dict)
    overlap: float | None = None
    mixed_overlap: float | None = None
    top1: float | None = None
    spearman: float | None = None
    furthest: str | None = None
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    fingerprint_differences: Mapping[str, Any] = field(default_factory=dict)

    @property
    def may_share(self) -> bool:
        """Whether vectors of both may lie in one index."""
        return self.verdict != "other"

    def to_dict(self) -> dict[str, Any]:
        """Plain data with `may_share_index`."""
        from dataclasses import fields

        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "may_share_index": self.may_share}


def compare_sets(a: ReferenceSet, b: ReferenceSet, allowed: float) -> Difference:
    """Judge two sets over the texts that both have; `allowed` is 1 - cosine explained by both precisions."""
    texts = [t for t in ALL if t in a.vectors and t in b.vectors] or [t for t in a.vectors if t in b.vectors]
    changed = differences(a.fingerprint, b.fingerprint)
    common: dict[str, Any] = {
        "a": a.origin,
        "b": b.origin,
        "texts": len(texts),
        "width": (a.width, b.width),
        "allowed": allowed,
        "fingerprints": {"a": a.fingerprint.get("id"), "b": b.fingerprint.get("id")},
        "fingerprint_differences": {k: {"a": x, "b": y} for k, (x, y) in changed.items()},
    }
    if not texts:
        return Difference(verdict="other", reason="the two have no text in common", **common)
    if a.width != b.width:
        reason = f"{a.width} and {b.width} dims: an index has one width"
        return Difference(verdict="other", reason=reason, **common)
    left, right = [a.vectors[t] for t in texts], [b.vectors[t] for t in texts]
    bad = [t for t, x, y in zip(texts, left, right, strict=True) if not (finite(x) and finite(y))]
    if bad:
        return Difference(verdict="other", reason=f"NaN or infinity for {bad[0][:40]!r}", **common)
    lengths = [fmean(map(norm, side)) for side in (left, right)]
    if abs(lengths[0] - lengths[1]) > UNLIKE_LENGTH * max(lengths):
        reason = f"vectors of length {lengths[0]:.3f} and {lengths[1]:.3f}: by inner product one side always wins"
        return Difference(verdict="other", reason=reason, **common)
    apart = [distance(x, y) for x, y in zip(left, right, strict=True)]
    ranks = _ranks(texts, left, right)
    worst = max(apart)
    if worst <= allowed:
        verdict, reason = "same", f"every text within 1 - cosine {allowed:.1e}, which the number formats explain"
    elif 1 - worst >= CLOSE_COSINE and ranks["mixed_overlap"] >= CLOSE_OVERLAP:
        verdict = "close"
        reason = f"cosine {1 - worst:.4f} at least and searches agree: near ties may change places"
    else:
        verdict = "other"
        reason = f"cosine down to {1 - worst:.4f}, {ranks['mixed_overlap']:.0%} of the top {TOP} found across the two"
    return Difference(
        verdict=verdict,
        reason=reason,
        cosine={
            "min": 1 - worst,
            "median": 1 - median(apart),
            "mean": 1 - fmean(apart),
            "max": 1 - min(apart),
        },
        furthest=texts[apart.index(worst)][:80],
        overlap=ranks["overlap"],
        mixed_overlap=ranks["mixed_overlap"],
        top1=ranks["top1"],
        spearman=ranks["spearman"],
        **common,
    )


def _ranks(texts: Sequence[str], left: Sequence[Any], right: Sequence[Any]) -> dict[str, float]:
    """How alike searches come out: queries against all other texts of the set."""
    asked = {*CORPUS_QUERIES, *INSTRUCTED, *QUERIES}
    queries = [i for i, t in enumerate(texts) if t in asked]
    documents = [i for i, t in enumerate(texts) if t not in asked]
    a, b = [normalised(v) for v in left], [normalised(v) for v in right]
    top = min(TOP, len(documents))
    rows = [(_order(a[q], a, documents), _order(b[q], b, documents), _order(a[q], b, documents)) for q in queries]
    if not rows or top < 2:
        return {"overlap": 1.0, "mixed_overlap": 1.0, "top1": 1.0, "spearman": 1.0}
    return {
        "overlap": fmean(len({*x[:top]} & {*y[:top]}) / top for x, y, _ in rows),
        "mixed_overlap": fmean(len({*x[:top]} & {*m[:top]}) / top for x, _, m in rows),
        "top1": fmean(float(x[0] == y[0]) for x, y, _ in rows),
        "spearman": fmean(spearman(x, y) for x, y, _ in rows),
    }


def _order(query: Sequence[float], vectors: Sequence[Sequence[float]], documents: Sequence[int]) -> list[int]:
    """The documents by falling score; ties keep their order."""
    return sorted(documents, key=lambda d: -dot(query, vectors[d]))


def spearman(a: Sequence[int], b: Sequence[int]) -> float:
    """Rank correlation of two orders of the same items, -1 to 1 (no ties, at least two items)."""
    place = {item: i for i, item in enumerate(b)}
    n = len(a)
    return 1 - 6 * sum((i - place[item]) ** 2 for i, item in enumerate(a)) / (n * (n * n - 1))
