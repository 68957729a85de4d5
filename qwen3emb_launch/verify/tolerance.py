"""How far right vectors may lie apart, from the number format. Everything that is judged is judged by these.

A number format with a mantissa of m bits (the hidden one counted) rounds with a relative error of at most
u = 2^-m: bfloat16 2^-8 (eps 2^-7 apart, half of that), float16 2^-11, float32 2^-24, float8 e4m3 2^-4.

**Distance (1 - cosine).** A text passes L layers; each rounds about K = 8 times on the way that reaches the residual
stream (two norms, four products, two additions). Rounding errors are as good as independent and uniform: variance
u^2/3 each, so the relative error of the pooled state has variance (u^2/3) K L, and 1 - cosine is half of that. Real
weights enlarge some directions and two runs may differ by two such errors; four times the sum is allowed:

    allowed distance = 4 * (u^2/3) * K * L / 2

That is 2.9e-3 for 36 layers in bfloat16, 1.6e-4 for two. A lost EOS, another pooling or a stripped instruction
moves a vector by 0.05 to 1. float32 has a floor of 1e-5 for other summation orders and accelerated kernels.

**Weights in float8.** Weights and activations are rounded to e4m3 before each product, sums stay wide. Each branch
of a layer adds one L-th of the stream, so its error does not add up over depth: 1 - cosine is about
(u^2/3) * 2 roundings * 4 products in series = 1.0e-2; twice that is allowed.

**Norm.** The norm that divides is itself rounded (u), and so is each quotient (u at worst): 1 +- 2u, 0.0078 at the
very worst in bfloat16; quotient errors average out over the dims, leaving u = 0.0039. Allowed: 0.005.

**One component** of a slice against the slice of the full vector: both are rounded, components lie below 1 in size,
and the two norms are rounded apart: 3u times the largest component, and never under 0.002 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDINGS_PER_LAYER = 8
SAFETY = 4.0
ASSUMED_LAYERS = 36  # of the largest official checkpoint, where nobody says how deep the model is
REPRESENTATION = {"bfloat16": 8, "float16": 11, "float32": 24}
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
FP8_DISTANCE = 2e-2
GOLDEN_SCORE = 0.01  # engines agree on the published scores within 0.0025 (README, vLLM)


@dataclass(frozen=True)
class Precision:
    """The number format of an endpoint's arithmetic and what follows from it.

    `origin` says who told: the user, the instance's plan, the server, the checkpoint, or the assumption.
    """

    dtype: str
    origin: str
    layers: int
    quantised: str | None = None

    @property
    def roundoff(self) -> float:
        """u, the largest relative error of one rounding."""
        return float(2.0 ** -REPRESENTATION[self.dtype])

    @property
    def distance(self) -> float:
        """Allowed 1 - cosine between two right computations of one text's vector."""
        depth = SAFETY * self.roundoff**2 / 3 * ROUNDINGS_PER_LAYER * self.layers / 2
        return max(depth, FP8_DISTANCE if self.quantised else 0.0, 1e-5)

    @property
    def norm(self) -> float:
        """Allowed deviation of a vector's length from 1."""
        return max(1.28 * self.roundoff, 1e-4)

    def component(self, largest: float) -> float:
        """Allowed difference of one component between a right slice and the slice of the full vector."""
        return max(3 * self.roundoff * largest, 0.512 * self.roundoff, 1e-5)

    def __str__(self) -> str:
        quantised = f", {self.quantised} weights" if self.quantised else ""
        return f"{self.dtype}{quantised} ({self.origin}), {self.layers} layers"


def canonical_dtype(name: str | None) -> str | None:
    """`bf16`, `torch.bfloat16`, `bfloat16` -> `bfloat16`; None for what is not one of the three formats."""
    if not name:
        return None
    short = name.removeprefix("torch.").strip().lower()
    short = ALIASES.get(short, short)
    return short if short in REPRESENTATION else None
