# ruff: noqa: ANN001, ANN202, N803 - Triton compiles these functions: their arguments are pointers and constants
"""A layer's norms, each with what follows it in one pass over memory, and a graph's inputs. Triton.

A long batch is bound by the products and by the traffic between them. Each norm here reads and writes once what the
stock layer moves two to four times. Values are rounded to bfloat16 where the stock kernels write bfloat16, so that only
the order of sums differs. A norm's rows in chunks, as `fp8_kernels.py` has its own, were timed on an H200: 3% less time
for a long batch of the 4B, 12% of the 0.6B, none of the 8B, and up to 1.6x as much for few rows, as a single query is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
PADDING = 64  # tokens of a text of a graph's padding


@triton.jit
def _quantised(values, FP8_LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row as float8 e4m3 and its scale, as the stock per-token quantisation chooses it."""
    scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-10) / FP8_LARGEST
    scaled = tl.minimum(tl.maximum(values / scale, -FP8_LARGEST), FP8_LARGEST)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def _norm_quantise(  # type: ignore[no-untyped-def]
    hidden, residual, weight, out, scales, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    FP8_LARGEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    values = tl.load(hidden + row * WIDTH + columns, inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * WIDTH + columns, inside, other=0.0).to(tl.float32)
        tl.store(residual + row * WIDTH + columns, values.to(tl.bfloat16), inside)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    values = values * inverse * tl.load(weight + columns, inside, other=0.0).to(tl.float32)
    quantised, scale = _quantised(values.to(tl.bfloat16).to(tl.float32), FP8_LARGEST)
    tl.store(out + row * WIDTH + columns, quantised, inside)
    tl.store(scales + row, scale)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    source, weight, target, cos, sin, eps, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr, HALF: tl.constexpr
):
    """Norm of each head, then the rotation of its two halves."""
    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    places = tl.arange(0, HALF)[None, :]
    inside = (heads < HEADS) & (places < HALF)
    at = heads * 2 * HALF + places
    first = tl.load(source + at, inside, other=0.0).to(tl.float32)
    second = tl.load(source + at + HALF, inside, other=0.0).to(tl.float32)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    inverse = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
    first = first * inverse * tl.load(weight + places).to(tl.float32)
    second = second * inverse * tl.load(weight + HALF + places).to(tl.float32)
    first = first.to(tl.bfloat16).to(tl.float32)
    second = second.to(tl.bfloat16).to(tl.float32)
    tl.store(target + at, (first * cos - second * sin).to(tl.bfloat16), inside)
    tl.store(target + at + HALF, (second * cos + first * sin).to(tl.bfloat16), inside)


@triton.jit
def _norm_rotate(  # type: ignore[no-untyped-def]
    qkv, positions, cos_sin, q_weight, k_weight, q_out, k_out, eps, ROW: tl.constexpr, Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, HALF)[None, :]
    position = tl.load(positions + row).to(tl.int64)
    cos = tl.load(cos_sin + position * 2 * HALF + places).to(tl.float32)
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + places).to(tl.float32)
    q_width = Q_HEADS * 2 * HALF
    k_width = K_HEADS * 2 * HALF
    _turn(qkv + row * ROW, q_weight, q_out + row * q_width, cos, sin, eps, Q_HEADS, Q_BLOCK, HALF)
    _turn(qkv + row * ROW + q_width, k_weight, k_out + row * k_width, cos, sin, eps, K_HEADS, K_BLOCK, HALF)


def norm_quantise(hidden: Any, residual: Any | None, weight: Any, eps: float) -> tuple[Any, Any]:
    """RMS norm of `hidden` [tokens, width] plus `residual`, as float8 [tokens, width] and scales [tokens, 1].

    `residual` is overwritten with the sum, as the stock kernel does; None: nothing is added.
    """
    rows, width = hidden.shape
    out = torch.empty((rows, width), dtype=FP8, device=hidden.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=hidden.device)
    _norm_quantise[(rows,)](
        hidden, residual if residual is not None else hidden, weight, out, scales, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADD=residual is not None, FP8_LARGEST=FP8_MAX, num_warps=8,
    )  # fmt: skip
    return out, scales


def norm_rotate(
    qkv: Any, positions: Any, cos_sin: Any, q_weight: Any, k_weight: Any, eps: float, q_heads: int, k_heads: int
) -> tuple[Any, Any]:
    """Queries and keys of `qkv` [tokens, (q + 2k) * head], normed per head and rotated, contiguous and anew.

    `cos_sin` [positions, head] holds the cosines of the first half, then the sines (neox).
    """
    rows, head = qkv.shape[0], cos_sin.shape[1]
    q = torch.empty((rows, q_heads * head), dtype=qkv.dtype, device=qkv.device)
    k = torch.empty((rows, k_heads * head), dtype=qkv.dtype, device=qkv.device)
    _norm_rotate[(rows,)](
        qkv, positions, cos_sin, q_weight, k_weight, q, k, eps, ROW=qkv.shape[1], Q_HEADS=q_heads, K_HEADS=k_heads,
        Q_BLOCK=triton.next_power_of_2(q_heads), K_BLOCK=triton.next_power_of_2(k_heads), HALF=head // 2, num_warps=4,
    )  # fmt: skip
    return q, k


@triton.jit(do_not_specialize=["tokens", "size", "texts", "slots"])
def _fill_inputs(  # type: ignore[no-untyped-def]
    ids, positions, lengths, out_ids, out_positions, offsets, tokens, size, texts, slots, SLOTS: tl.constexpr,
    BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    row = part * BLOCK + tl.arange(0, BLOCK)
    real, wanted = row < tokens, row < size
    tl.store(out_ids + row, tl.load(ids + row, real, other=0), wanted)
    tl.store(out_positions + row, tl.where(real, tl.load(positions + row, real, other=0), (row - tokens) % PAD), wanted)
    if part == 0:
        slot = tl.arange(0, SLOTS)
        ends = tl.cumsum(tl.load(lengths + slot, slot < texts, other=0).to(tl.int32), 0)
        tl.store(offsets + 1 + slot, tl.where(slot == slots - 1, size, ends), slot < slots)


def fill_inputs(ids: Any, positions: Any, lengths: Any, out_ids: Any, out_positions: Any, offsets: Any) -> None:
    """What a graph of whole passes reads, in one launch: ids, positions, and where each text begins.

    `ids` and `positions` are [tokens], `lengths` [texts]. `out_ids` [size] ends with zeros, `out_positions` [size] with
    texts of PADDING tokens: `graph_attention` goes from text to text, and would have one a row of zeros.
    `offsets`, [slots + 1] with more slots than texts, holds each text's end, and the padding as the last segment.
    """
    size, slots, block = out_ids.shape[0], offsets.shape[0] - 1, 1024
    _fill_inputs[(triton.cdiv(size, block),)](
        ids, positions, lengths, out_ids, out_positions, offsets, ids.shape[0], size, lengths.shape[0], slots,
        SLOTS=triton.next_power_of_2(slots), BLOCK=block, PAD=PADDING,
    )  # fmt: skip
