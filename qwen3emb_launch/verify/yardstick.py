"""What an endpoint's vectors are held to where transformers computed the same checkpoint.

**Float32, within a tolerance**, as long as that tolerance sees every known fault: those move a vector by 0.05 to 1,
so CAP is 0.05. Beside the number format's own distance, twice what quantising costs the checkpoint is allowed, since
two implementations of one quantisation round apart.

**transformers' own quantised vectors, text by text**, where that would be above the cap: the checkpoint quantises
badly, and how far a right engine's vectors lie from float32 says nothing. Such an engine rounds the same weights to
the same numbers, and only its activations round apart. With errors w of the weights and x of the activations,
1 - cosine from float32 is (w^2 + x^2) / 2, and between two implementations (x^2 + y^2) / 2: half of the former where
much of x is shared, as much where nothing of it is (w and x are roundings to the same format, so alike in size), and
twice only where the weights differ too. What quantising costs a text is allowed to it, and never less than it costs
on average: a text that loses little in one implementation need not in the other. A fault of size d adds about d to
that distance (cosines multiply), so it shows where a right engine stays less than d under its bound. Seen were right
engines at half of their bound; so faults of 0.05 show up to a cost of 0.1 on average. Beyond that nothing is proven,
and the comparison says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from qwen3emb_launch.vectors import distance
from qwen3emb_launch.verify.reference import ReferenceSet
from qwen3emb_launch.verify.tolerance import Precision

CAP = 0.05  # 1 - cosine; the smallest known fault moves a vector so far
BLIND = 0.1  # what quantising may cost on average, until a fault of 0.05 hides in it
EXACT = ("float32", "bfloat16")  # what to hold an endpoint to, the best first
QUANTISED = "fp8"  # the one quantisation that the reference script emulates


@dataclass(frozen=True)
class Yardstick:
    """The set that an endpoint is held to, and the 1 - cosine allowed to each text.

    `exact` is the unquantised set, `own` what the number format alone explains; `reference` is `exact` unless the
    checkpoint quantises badly. `errors` are the largest distances of transformers' own coarser formats from float32,
    `costs` those of quantising by text.
    """

    exact: ReferenceSet
    own: float
    reference: ReferenceSet
    allowed: Mapping[str, float]
    errors: Mapping[str, float]
    costs: Mapping[str, float]

    @property
    def quantises_badly(self) -> bool:
        """Whether the quantised vectors are what the endpoint is held to."""
        return self.reference is not self.exact

    @property
    def blind(self) -> bool:
        """Whether quantising costs so much that a fault could hide in it."""
        return self.quantises_badly and fmean(self.costs.values()) > BLIND

    @property
    def unquantised(self) -> Yardstick:
        """The same without anything allowed for quantisation."""
        return replace(self, reference=self.exact, allowed=dict.fromkeys(self.allowed, self.own))


def yardstick(precision: Precision, sets: Mapping[str, ReferenceSet], texts: Sequence[str]) -> Yardstick | None:
    """What to hold an endpoint of this precision to; None when neither float32 nor bfloat16 was computed.

    Where memory was short for float32, bfloat16 takes its place with twice the number format's distance.
    """
    name = next((n for n in EXACT if n in sets), None)
    if name is None:
        return None
    exact = sets[name]
    apart = {
        other: {t: distance(exact.vectors[t], found.vectors[t]) for t in texts}
        for other, found in sets.items()
        if other != name
    }
    errors = {other: max(found.values()) for other, found in apart.items()}
    costs = apart.get(QUANTISED, {}) if precision.quantised else {}
    unquantised = replace(precision, quantised=None) if costs else precision
    own = number_format(unquantised, errors.get("bfloat16")) * (1 if name == "float32" else 2)
    if not costs:
        return Yardstick(exact, own, exact, dict.fromkeys(texts, own), errors, costs)
    together = own + 2 * max(costs.values())
    if together <= CAP:
        return Yardstick(exact, own, exact, dict.fromkeys(texts, together), errors, costs)
    return Yardstick(exact, own, sets[QUANTISED], bounds(own, costs), errors, costs)


def number_format(precision: Precision, own_error: float | None) -> float:
    """1 - cosine that the number format explains.

    The derived bound, widened where the checkpoint's own bfloat16 error (its bfloat16 vectors against its float32
    ones) says that it amplifies rounding: four times that, and never above 0.01.
    """
    measured = 4 * own_error if own_error is not None and precision.dtype != "float32" else 0.0
    return max(precision.distance, min(measured, 0.01))


def bounds(own: float, costs: Mapping[str, float]) -> dict[str, float]:
    """1 - cosine allowed between two implementations of one quantisation, by text."""
    usual = fmean(costs.values())
    return {text: own + max(cost, usual) for text, cost in costs.items()}
