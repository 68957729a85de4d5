# ruff: noqa: ANN001, ANN202, N803 - Triton compiles these functions: their arguments are pointers and constants
"""Gating and the attention's output as float8, in few instructions a value. Triton; a program does one row.

Both are bound by memory where little is computed, and Triton's own way computed much: a power of two of lanes, of which
40% lay past the end of the 4B's row, and 46 instructions for a gated value. Here a row is a tuple of chunks that cover
it, two bfloat16 lie in one word until they are rounded again, and what a compiled kernel takes several instructions for
is one of the card's:

- `cvt.rn.bf16x2` and `cvt.rn.satfinite.e4m3x2` round two values at once, to the same numbers; the latter ends the range
  at +-448 by itself.
- `max.xorsign.abs.bf16x2` finds two largest magnitudes at once; maxima are exact in any order.
- `ex2.approx.ftz` and `rcp.approx.ftz` are what `tl.exp` and a division become, without their cases for subnormal and
  huge numbers: `1 + exp(-gate)` is 1 or more, and a row's scale between 2e-13 and 8e35.

On an H200 gating is 1.3 to 1.65 times as fast as it was that way, from 528 rows on (4B, 8B), with the same bits. NaN
stays NaN, and for gates below -87 silu, under 1e-36 there, is 0. `quantise` is 1.2 times as fast as SGLang's kernel for
Hopper with few rows and 1.7 times with many (4B, 8B), and does to the bit what that one does (sglang-kernel 0.4.5 as
compiled: a product by 1/448, an approximate reciprocal), but for NaN, which that one makes 448, and for rows of zeros
in batches below 16 rows a multiprocessor, for which it writes 448 beside a scale of 0.

Triton's interpreter has no card to ask: tests/card_instructions.py stands in for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen3emb_engine_plugin.kernels import FP8, FP8_MAX

# Warps for a row, each thread of which takes 16 bytes of a chunk, the widest load: the best of those timed on an H200
# (benchmarks/gpu/fp8_kernels.py). Fewer for a row keep more rows at work on a multiprocessor, for which there must be
# more rows than multiprocessors, of which Hopper has 132: until then a row takes as many as help it.
GATE_WARPS, NARROW_GATE_WARPS = 8, 4
NARROW = 3072  # values: the 0.6B's row
FEW_ROWS = 132
QUANTISE_WARPS = 4
WORDS_A_THREAD = 4


@triton.jit
def _low(words):  # type: ignore[no-untyped-def]
    """The first of the two bfloat16 in each word, as float32."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):  # type: ignore[no-untyped-def]
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(low, high):  # type: ignore[no-untyped-def]
    """Two float32 as two bfloat16 in a word."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger(one, other):  # type: ignore[no-untyped-def]
    """Of each two bfloat16 the larger magnitude; its sign means nothing."""
    return tl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [one, other], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _magnitude(largest):  # type: ignore[no-untyped-def]
    """A row's largest magnitude, from those of its chunks."""
    return tl.max(tl.maximum(tl.abs(_low(largest)), tl.abs(_high(largest))), axis=0)


@triton.jit
def _silu(gate):  # type: ignore[no-untyped-def]
    power = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [gate * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )
    return gate * tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _float8(low, high):  # type: ignore[no-untyped-def]
    """Two float32 as two float8 e4m3 in 16 bits.

    Not by Triton's cast and a shift: ptxas 12.8 and 12.9 compile what Triton 3.6 makes of it, `x | x >> 8 << 16` of a
    pair, to a packing with a register that nothing has set, and a quarter of the values are others.
    """
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f", [high, low], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _store(kept, inverse, row, out, WORDS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row that is kept as chunks of words, as float8."""
    target = out.to(tl.pointer_type(tl.int16), bitcast=True) + row * WORDS
    lanes = tl.arange(0, CHUNK)
    for start in tl.static_range(0, WORDS, CHUNK):
        words = kept[start // CHUNK]
        pairs = _float8(_low(words) * inverse, _high(words) * inverse)
        tl.store(target + start + lanes, pairs, start + lanes < WORDS)


@triton.jit
def _gate_quantise(  # type: ignore[no-untyped-def]
    gate_up, out, scales, WORDS: tl.constexpr, CHUNK: tl.constexpr, FP8_LARGEST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = gate_up.to(tl.pointer_type(tl.int32), bitcast=True) + row * 2 * WORDS
    lanes = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.int32)
    kept = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        at = start + lanes
        gate = tl.load(source + at, at < WORDS, other=0)
        up = tl.load(source + WORDS + at, at < WORDS, other=0)
        words = _rounded(_silu(_low(gate)) * _low(up), _silu(_high(gate)) * _high(up))
        largest = _larger(largest, words)
        kept = kept + (words,)  # noqa: RUF005 - Triton knows no unpacking
    scale = tl.maximum(_magnitude(largest), 1e-10) / FP8_LARGEST
    tl.store(scales + row, scale)
    _store(kept, 1.0 / scale, row, out, WORDS, CHUNK)


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    values, out, scales, WORDS: tl.constexpr, CHUNK: tl.constexpr, FP8_LARGEST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = values.to(tl.pointer_type(tl.int32), bitcast=True) + row * WORDS
    lanes = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.int32)
    kept = ()
    for start in tl.static_range(0, WORDS, CHUNK):
        words = tl.load(source + start + lanes, start + lanes < WORDS, other=0)
        largest = _larger(largest, words)
        kept = kept + (words,)  # noqa: RUF005
    scale = _magnitude(largest) / FP8_LARGEST
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)
    tl.store(scales + row, scale)
    _store(kept, inverse, row, out, WORDS, CHUNK)


def gate_quantise(gate_up: Any, warps: int | None = None) -> tuple[Any, Any]:
    """silu(gate) * up of [tokens, 2 * width], as float8 [tokens, width] and scales [tokens, 1]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return _of_rows(_gate_quantise, gate_up, width, warps or gate_warps(rows, width))


def quantise(values: Any, warps: int = QUANTISE_WARPS) -> tuple[Any, Any]:
    """Rows of bfloat16 [tokens, width] as float8 and scales [tokens, 1], as `sglang_per_token_quant_fp8` does."""
    return _of_rows(_quantise, values, values.shape[1], warps)


def gate_warps(rows: int, width: int) -> int:
    """Warps for each of so many gated rows."""
    warps = NARROW_GATE_WARPS if width <= NARROW else GATE_WARPS
    return warps if rows > FEW_ROWS else 2 * warps


def _of_rows(kernel: Any, values: Any, width: int, warps: int) -> tuple[Any, Any]:
    rows = values.shape[0]
    out = torch.empty((rows, width), dtype=FP8, device=values.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=values.device)
    kernel[(rows,)](
        values, out, scales, WORDS=width // 2, CHUNK=warps * 32 * WORDS_A_THREAD, FP8_LARGEST=FP8_MAX, num_warps=warps
    )
    return out, scales
