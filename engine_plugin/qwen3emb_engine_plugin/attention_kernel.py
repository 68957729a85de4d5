# ruff: noqa: ANN001, ANN202, N803 - Triton compiles these functions: their arguments are pointers and constants
"""Causal attention over texts that lie one after the other, which needs no more than each token's place in its text.

A general kernel for texts of different lengths gives each text tiles of its own, of 128 rows: one of 33 tokens leaves
three quarters of its tile empty, and a first kernel has to count the tiles. Here a tile is so many rows, of whichever
texts, with all the queries that share a key head; it reads the keys from the beginning of its first row's text to its
own end, and each row looks at those between its text's beginning and itself. Nothing is counted, and a graph needs no
more than the positions, which it has.

A text's keys are read from its own beginning, so many at a time, and no read has those of two texts: a row's sums are
the same to the bit, wherever its text lies and whatever lies beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


class Way(NamedTuple):
    """A tile's rows of queries, the keys that it reads at a time, its warps, and how many of those reads are ahead."""

    size: int
    keys: int
    warps: int
    stages: int


# Guesses, until benchmarks/gpu/attention.py has run. With two stages Triton asks for the next keys when this read's
# shares are there, and waits for them at once; a third is ahead by a whole read. By ptxas (Triton 3.6) as many tiles
# of either size are on a multiprocessor with it: two small ones, by shared memory, or a large one, by registers.
SMALL, LARGE = Way(64, 64, 4, 3), Way(128, 64, 8, 3)
CARD = 132  # multiprocessors of an H200


def way_of(rows: int, group: int, k_heads: int) -> Way:
    """Large tiles read each key half as often; where they would leave a part of the card idle, small ones."""
    return SMALL if triton.cdiv(rows, LARGE.size // group) * k_heads < CARD else LARGE


@triton.jit(do_not_specialize=["rows"])
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, positions, out, rows, scale, V_ROW: tl.constexpr, K_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # The last rows of a long text read the most keys. They begin first, lest the card waits for a few of them.
    tile, key_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, TOKENS * GROUP)
    token = tile * TOKENS + member // GROUP
    real = token < rows
    # Unreal rows are the last one once more: they are not written, and look at no key that it does not look at.
    token = tl.minimum(token, rows - 1)
    begins = tl.maximum(token - tl.load(positions + token).to(tl.int32), 0)
    places = tl.arange(0, HEAD)
    at = token[:, None] * (K_HEADS * GROUP * HEAD) + (key_head * GROUP + (member % GROUP)[:, None]) * HEAD + places
    queries = tl.load(q + at)
    largest = tl.full([TOKENS * GROUP], -1e30, tl.float32)
    weight = tl.zeros([TOKENS * GROUP], tl.float32)
    summed = tl.zeros([TOKENS * GROUP, HEAD], tl.float32)
    end = tl.minimum((tile + 1) * TOKENS, rows)
    first = tl.min(begins)
    while first < end:  # one text of the tile after the other
        stop = tl.min(tl.where(begins > first, begins, end))
        for read in range(first, stop, KEYS):
            key = read + tl.arange(0, KEYS)
            there = key < stop
            keys = tl.load(k + key[None, :] * (K_HEADS * HEAD) + key_head * HEAD + places[:, None], there[None, :], 0.0)
            seen = there[None, :] & (key[None, :] >= begins[:, None]) & (key[None, :] <= token[:, None])
            scores = tl.where(seen, tl.dot(queries, keys) * scale, -1e30)
            # A row that has seen no key yet weighs what it does not see; its first own key takes that to nothing.
            now = tl.maximum(largest, tl.max(scores, 1))
            shares = tl.exp2(scores - now[:, None])
            kept = tl.exp2(largest - now)
            weight = weight * kept + tl.sum(shares, 1)
            values = tl.load(v + key[:, None] * V_ROW + key_head * HEAD + places[None, :], there[:, None], 0.0)
            summed = summed * kept[:, None] + tl.dot(shares.to(values.dtype), values)
            largest = now
        first = stop
    tl.store(out + at, (summed / weight[:, None]).to(out.dtype.element_ty), real[:, None])


def attend(
    q: Any, k: Any, v: Any, positions: Any, out: Any, scaling: float, q_heads: int, k_heads: int, way: Way | None = None
) -> None:
    """Causal attention of texts in one row after the other, into `out` [tokens, query heads * head] as `q` is.

    `k` and `v` [tokens, key heads, head]; `k` is contiguous like `q`, `v` may be part of wider rows. `positions`
    [tokens] count from 0 in each text; a row that pads is a text of its own, or looks at rows before it: its answer is
    nobody's. The number of query heads a key head is a power of two. `way`: not the one for so many rows.
    """
    rows, head, group = q.shape[0], q.shape[1] // q_heads, q_heads // k_heads
    size, keys, warps, stages = way or way_of(rows, group, k_heads)
    _attend[(triton.cdiv(rows, size // group), k_heads)](
        q, k, v, positions, out, rows, scaling * LOG2_E, V_ROW=v.stride(0), K_HEADS=k_heads, GROUP=group, HEAD=head,
        TOKENS=size // group, KEYS=keys, num_warps=warps, num_stages=stages,
    )  # fmt: skip
