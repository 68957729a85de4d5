# ruff: noqa: ANN001, ANN202, N803 - Triton compiles these functions: their arguments are pointers and constants
"""The float8 kernels of `kernels.py` for fewer instructions a value, and the quantisation of the attention's output.

Off unless QWEN3EMB_PLUGIN_FP8_KERNELS=1: no GPU has timed them yet (docs/benchmarks/notes.md). Those of `kernels.py`
hold a row in a power of two of lanes, in the 4B 40% of them past its end, and take 46 instructions for a gated value:
more than memory leaves time for. Here a row is a tuple of chunks that cover it, two bfloat16 lie in one word until they
are rounded again, and what a compiled kernel takes several instructions for is one of the card's:

- `cvt.rn.bf16x2` and `cvt.rn.satfinite.e4m3x2` round two values at once, to the same numbers; the latter ends the range
  at +-448 by itself.
- `max.xorsign.abs.bf16x2` finds two largest magnitudes at once; maxima are exact in any order.
- `ex2.approx.ftz` and `rcp.approx.ftz` are what `tl.exp` and a division become, without their cases for subnormal and
  huge numbers: `1 + exp(-gate)` is 1 or more, and a row's scale between 2e-13 and 8e35.

So gated rows are those of `kernels.py` to the bit, but for two cases: NaN stays NaN where `kernels.py` writes -448, and
for gates below -87 silu, under 1e-36 there, is 0, which float8 shows beside an `up` of 1e20 alone. Normed rows have
their squares summed in another order. `quantise` does to the bit what SGLang's kernel for Hopper does (sglang-kernel
0.4.5 as compiled: a product by 1/448, an approximate reciprocal), but for NaN, which that one makes 448, and for rows
of zeros in batches below 16 rows a multiprocessor, for which it writes 448 beside a scale of 0.

PLAIN computes the same with Triton's own operations: for its interpreter, which has no card to ask.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qwen3emb_engine_plugin.kernels import FP8, FP8_MAX

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Tiling(NamedTuple):
    """Warps for a row, and words (two values) that a thread takes of each chunk: 4 are the widest load."""

    warps: int
    words: int = 4


# The first whose width, in values, holds the row: by ptxas many warps at once (benchmarks/gpu/fp8_compiled.py), and
# little past the row's end.
GATE_TILINGS = ((3072, Tiling(4)), (1 << 30, Tiling(8)))
NORM_TILINGS = ((1024, Tiling(2)), (2560, Tiling(4, 2)), (1 << 30, Tiling(4)))
QUANTISE_TILINGS = ((2048, Tiling(2)), (1 << 30, Tiling(4)))


@triton.jit
def _low(words):  # type: ignore[no-untyped-def]
    """The first of the two bfloat16 in each word, as float32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):  # type: ignore[no-untyped-def]
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(low, high, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two float32 as two bfloat16 in a word."""
    if PLAIN:
        first = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        second = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return (first | (second << 16)).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger(one, other, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each two bfloat16 the larger magnitude; its sign means nothing."""
    if PLAIN:
        low = tl.maximum(one & 0x7FFF, other & 0x7FFF)
        return low | tl.maximum(one & 0x7FFF0000, other & 0x7FFF0000)
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _magnitude(largest):  # type: ignore[no-untyped-def]
    """A row's largest magnitude, from those of its chunks."""
    return tl.max(tl.maximum(tl.abs(_low(largest)), tl.abs(_high(largest))), axis=0)


@triton.jit
def _silu(gate, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    if PLAIN:
        return gate / (1.0 + tl.exp(-gate))
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [gate * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )
    return gate * tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _float8(low, high, FP8_LARGEST: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two float32 as two float8 e4m3 in 16 bits."""
    if PLAIN:
        low = tl.minimum(tl.maximum(low, -FP8_LARGEST), FP8_LARGEST).to(tl.float8e4nv)
        high = tl.minimum(tl.maximum(high, -FP8_LARGEST), FP8_LARGEST).to(tl.float8e4nv)
        second = high.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        return (low.to(tl.uint8, bitcast=True).to(tl.uint16) | second).to(tl.int16, bitcast=True)
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f", [high, low], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _store_quantised(  # type: ignore[no-untyped-def]
    kept, largest, row, out, scales, WORDS: tl.constexpr, CHUNK: tl.constexpr, FP8_LARGEST: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """A row that is kept as chunks of words, as float8, and its scale, as `kernels.py` chooses that."""
    scale = tl.maximum(_magnitude(largest), 1e-10) / FP8_LARGEST
    tl.store(scales + row, scale)
    target = out.to(tl.pointer_type(tl.int16), bitcast=True) + row * WORDS
    lanes = tl.arange(0, CHUNK)
    inverse = 1.0 / scale
    for start in tl.static_range(0, WORDS, CHUNK):
        words = kept[start // CHUNK]
        if PLAIN:  # the interpreter rounds each of two steps, where the card's division is a product by this inverse
            low, high = _low(words) / scale, _high(words) / scale
        else:
            low, high = _low(words) * inverse, _high(words) * inverse
        pairs = _float8(low, high, FP8_LARGEST, PLAIN)
        tl.store(target + start + lanes, pairs, start + lanes < WORDS)


@triton.jit
def _gate_quantise(  # type: ignore[no-untyped-def]
    gate_up, out, scales, WORDS: tl.constexpr, CHUNK: tl.constexpr, FP8_LARGEST: tl.constexpr, EVICT: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = gate_up.to(tl.pointer_type(tl.int32), bitcast=True) + row * 2 * WORDS
    lanes = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.int32)
    kept = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        at = start + lanes
        gate = tl.load(source + at, at < WORDS, other=0, eviction_policy=EVICT)
        up = tl.load(source + WORDS + at, at < WORDS, other=0, eviction_policy=EVICT)
        words = _rounded(_silu(_low(gate), PLAIN) * _low(up), _silu(_high(gate), PLAIN) * _high(up), PLAIN)
        largest = _larger(largest, words, PLAIN)
        kept = kept + (words,)  # noqa: RUF005 - Triton knows no unpacking
    _store_quantised(kept, largest, row, out, scales, WORDS, CHUNK, FP8_LARGEST, PLAIN)


@triton.jit
def _norm_quantise(  # type: ignore[no-untyped-def]
    hidden, residual, weight, out, scales, eps, WORDS: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr,
    FP8_LARGEST: tl.constexpr, EVICT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = hidden.to(tl.pointer_type(tl.int32), bitcast=True) + row * WORDS
    other = residual.to(tl.pointer_type(tl.int32), bitcast=True) + row * WORDS
    weights = weight.to(tl.pointer_type(tl.int32), bitcast=True)
    lanes = tl.arange(0, CHUNK)
    squares = tl.zeros([CHUNK], tl.float32)
    lows = ()
    highs = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        at = start + lanes
        words = tl.load(source + at, at < WORDS, other=0, eviction_policy=EVICT)
        low, high = _low(words), _high(words)
        if ADD:
            words = tl.load(other + at, at < WORDS, other=0)
            low += _low(words)
            high += _high(words)
            tl.store(other + at, _rounded(low, high, PLAIN), at < WORDS)
        squares += low * low + high * high
        lows = lows + (low,)  # noqa: RUF005
        highs = highs + (high,)  # noqa: RUF005
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / (2 * WORDS) + eps)
    largest = tl.zeros([CHUNK], tl.int32)
    kept = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        at = start + lanes
        words = tl.load(weights + at, at < WORDS, other=0)
        low = lows[start // CHUNK] * inverse * _low(words)
        high = highs[start // CHUNK] * inverse * _high(words)
        words = _rounded(low, high, PLAIN)
        largest = _larger(largest, words, PLAIN)
        kept = kept + (words,)  # noqa: RUF005
    _store_quantised(kept, largest, row, out, scales, WORDS, CHUNK, FP8_LARGEST, PLAIN)


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    values, out, scales, WORDS: tl.constexpr, CHUNK: tl.constexpr, FP8_LARGEST: tl.constexpr, EVICT: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = values.to(tl.pointer_type(tl.int32), bitcast=True) + row * WORDS
    lanes = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.int32)
    kept = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        words = tl.load(source + start + lanes, start + lanes < WORDS, other=0, eviction_policy=EVICT)
        largest = _larger(largest, words, PLAIN)
        kept = kept + (words,)  # noqa: RUF005
    scale = _magnitude(largest) / FP8_LARGEST
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)
    tl.store(scales + row, scale)
    target = out.to(tl.pointer_type(tl.int16), bitcast=True) + row * WORDS
    for start in tl.static_range(0, WORDS, CHUNK):
        words = kept[start // CHUNK]
        pairs = _float8(_low(words) * inverse, _high(words) * inverse, FP8_LARGEST, PLAIN)
        tl.store(target + start + lanes, pairs, start + lanes < WORDS)


def norm_quantise(
    hidden: Any, residual: Any | None, weight: Any, eps: float, tiling: Tiling | None = None, evict: str = "",
    plain: bool = INTERPRETED,
) -> tuple[Any, Any]:  # fmt: skip
    """`kernels.norm_quantise`: float8 [tokens, width], scales [tokens, 1]; `residual` is overwritten with the sum."""
    rows, width = hidden.shape
    out, scales = _empty(rows, width, hidden.device)
    how = _how(width, tiling, NORM_TILINGS, evict, plain)
    _norm_quantise[(rows,)](
        hidden, residual if residual is not None else hidden, weight, out, scales, eps, ADD=residual is not None, **how
    )
    return out, scales


def gate_quantise(
    gate_up: Any, tiling: Tiling | None = None, evict: str = "", plain: bool = INTERPRETED
) -> tuple[Any, Any]:
    """`kernels.gate_quantise`: silu(gate) * up of [tokens, 2 * width], as float8, and scales."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, scales = _empty(rows, width, gate_up.device)
    _gate_quantise[(rows,)](gate_up, out, scales, **_how(width, tiling, GATE_TILINGS, evict, plain))
    return out, scales


def quantise(values: Any, tiling: Tiling | None = None, evict: str = "", plain: bool = INTERPRETED) -> tuple[Any, Any]:
    """Rows of bfloat16 [tokens, width] as float8 and scales [tokens, 1], as `sglang_per_token_quant_fp8` does."""
    rows, width = values.shape
    out, scales = _empty(rows, width, values.device)
    _quantise[(rows,)](values, out, scales, **_how(width, tiling, QUANTISE_TILINGS, evict, plain))
    return out, scales


def tiling_of(width: int, by_width: tuple[tuple[int, Tiling], ...]) -> Tiling:
    """The one that a table has for rows of this width."""
    return next(tiling for until, tiling in by_width if width <= until)


def _empty(rows: int, width: int, device: Any) -> tuple[Any, Any]:
    scales = torch.empty((rows, 1), dtype=torch.float32, device=device)
    return torch.empty((rows, width), dtype=FP8, device=device), scales


def _how(
    width: int, tiling: Tiling | None, by_width: tuple[tuple[int, Tiling], ...], evict: str, plain: bool
) -> dict[str, Any]:
    tiling = tiling or tiling_of(width, by_width)
    return {
        "WORDS": width // 2, "CHUNK": tiling.warps * 32 * tiling.words, "FP8_LARGEST": FP8_MAX, "EVICT": evict,
        "PLAIN": plain, "num_warps": tiling.warps,
    }  # fmt: skip
