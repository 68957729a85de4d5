# ruff: noqa: ANN001, ANN202, N803, N806 - Triton compiles these functions: their arguments are pointers and constants
"""A product of few rows with a weight that is read once: bfloat16, torch's layout of both. Triton, for Hopper.

What bounds it is reading the weight. Its rows are the tall side of the tensor cores' tile, so that few rows of `x`
waste little of it: 36 rows take tiles of 32 and 16. Each program reads a block of the weight's rows along a part of
their length, some stages ahead; wide blocks read `x` less often, and parts make up for the programs that wide blocks
lack. The parts' sums go to memory in float32, and the program that arrives last at a tile adds them up, always in the
same order: the same row gives the same bits, whoever arrives last, and nobody waits for another. It sets the count of
arrivals to 0 again, for the next product on the stream. Between two products come small kernels, which leave the memory
idle: a product can ask for the first of what the next one reads.

The scratch memory is one for a GPU: products run one after the other, on one stream, and in graphs replayed there.

Nothing here was timed yet. Without QWEN3EMB_PLUGIN_FEW_ROWS_TABLE, which `benchmarks/gpu/few_rows.py --write` makes,
the blocks are chosen by reckoning (`reckoned`), which is a guess.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

TABLE = "QWEN3EMB_PLUGIN_FEW_ROWS_TABLE"
# Rows up to which a product has tiles of so many rows of `x`; powers of two and 16 at least, hence two tiles.
TILES = {16: (16, 0), 32: (32, 0), 48: (32, 16), 64: (64, 0), 80: (64, 16), 128: (128, 0), 144: (128, 16)}
MOST_ROWS = max(TILES)
# The official models' qkv, o, gate_up and down: the weight's rows and columns.
SHAPES = {
    "0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "4b": ((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
    "8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
}
FETCH = tl.constexpr(1024)  # bytes of a weight that a thread asks for at once, as the instruction has them too
PROCESSORS = 132
SHARED, SHARED_A_PROGRAM, RESERVED = 228 * 1024, 227 * 1024, 1024  # bytes of a multiprocessor
# Float32 a thread, of a program's own sums and of all parts' together, which are loaded at once. Compiled for sm_90,
# 128 and 384 of them spill.
MOST_SUMS, MOST_OF_PARTS = 96, 256


class Config(NamedTuple):
    """How a product is cut: a program has `block_n` of the weight's rows and one of `split` parts of their length."""

    block_n: int
    block_k: int
    split: int
    stages: int
    warps: int
    tma: bool = False  # the weight's blocks are copied by the tensor memory accelerator, not thread by thread


@triton.jit
def _values(x, row, at, rows, K, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of `x`, transposed; zeros past its rows."""
    place = row[:, None] * K + at + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(x + place, row[:, None] < rows, other=0.0).T


@triton.jit
def _whole(partial, place, inside, size, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the parts come to, from the first to the last. Past the L1 cache, which knows nothing of other programs."""
    whole = tl.load(partial + place, inside, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT):
        whole += tl.load(partial + part * size + place, inside, other=0.0, cache_modifier=".cg")
    return whole


@triton.jit
def _fetch(ahead, size, program, programs, THREADS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Have the L2 cache read this program's share of what comes next. Nobody waits for that, and nothing changes."""
    lanes = tl.arange(0, THREADS)
    for first in tl.range(program * THREADS, size // FETCH, programs * THREADS):
        wanted = (first + lanes < size // FETCH).to(tl.int32)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0; }",
            "=r,l,r", [(ahead + (first + lanes) * (FETCH // 2)).to(tl.int64), wanted], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "ahead_size"])
def _product(  # type: ignore[no-untyped-def]
    x, w, out, partial, arrived, ahead, rows, N, K, ahead_size, ROWS: tl.constexpr, MORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    WIDTH: tl.constexpr = MORE if MORE else ROWS  # noqa: FURB110 - Triton; an unused tile needs a size too
    row, row_more = tl.arange(0, ROWS), ROWS + tl.arange(0, WIDTH)
    sums, more = tl.zeros([BLOCK_N, ROWS], tl.float32), tl.zeros([BLOCK_N, WIDTH], tl.float32)
    blocks = K // BLOCK_K
    for block in tl.range(part * blocks // SPLIT, (part + 1) * blocks // SPLIT):
        at = block * BLOCK_K
        if TMA:
            weights = w.load([tile * BLOCK_N, at])
        else:
            weights = tl.load(w + column[:, None] * K + at + tl.arange(0, BLOCK_K)[None, :])
        sums = tl.dot(weights, _values(x, row, at, rows, K, BLOCK_K), sums)
        if MORE:
            more = tl.dot(weights, _values(x, row_more, at, rows, K, BLOCK_K), more)
    _fetch(ahead, ahead_size, part * (N // BLOCK_N) + tile, SPLIT * (N // BLOCK_N), THREADS)
    place, place_more = row[None, :] * N + column[:, None], row_more[None, :] * N + column[:, None]
    inside, inside_more = row[None, :] < rows, row_more[None, :] < rows
    if SPLIT == 1:
        tl.store(out + place, sums.to(tl.bfloat16), inside)
        if MORE:
            tl.store(out + place_more, more.to(tl.bfloat16), inside_more)
    else:
        size = rows * N
        tl.store(partial + part * size + place, sums, inside)
        if MORE:
            tl.store(partial + part * size + place_more, more, inside_more)
        # All threads have written before one of them says so; what it acquires, it acquires for all.
        tl.debug_barrier()
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if before == SPLIT - 1:
            sums = _whole(partial, place, inside, size, SPLIT)
            if MORE:
                more = _whole(partial, place_more, inside_more, size, SPLIT)
                tl.store(out + place_more, more.to(tl.bfloat16), inside_more)
            tl.store(out + place, sums.to(tl.bfloat16), inside)
            tl.store(arrived + tile, 0)


def product(x: Any, weight: Any, config: Config | None = None, ahead: Any = None, ahead_size: int = 0) -> Any:
    """`x` [rows, K] times `weight` [N, K], both contiguous bfloat16: [rows, N]. ValueError where no table has it.

    Programs that have read their share of `weight` ask for the first bytes of `ahead`, the next product's weight: the
    memory is idle until that begins.
    """
    (rows, k), n = x.shape, weight.shape[0]
    config = config or choice(n, k, rows)
    if config is None:
        raise ValueError(f"no configuration for {rows} rows of {k} and a weight of {n}")
    out = x.new_empty((rows, n))
    partial, arrived = scratch(x.device, *scratch_of(n, rows, config))
    grid = (n // config.block_n, config.split)
    ahead, size = (weight, 0) if ahead is None else (ahead, min(ahead_size, ahead.numel() * 2))
    w = _source(weight, config)
    _product[grid](x, w, out, partial, arrived, ahead, rows, n, k, size, **_constants(rows, config))
    return out


def compile_only(rows: int, config: Config, device: str = "cuda") -> Any:
    """Compile what such products launch, whatever their weights, into Triton's cache."""
    bf16 = torch.bfloat16
    weight = _source(torch.empty((256, 256), dtype=bf16, device=device), config) if config.tma else bf16
    return _product.warmup(
        bf16, weight, bf16, torch.float32, torch.int32, bf16, rows, 256, 256, 0, grid=(1,), **_constants(rows, config)
    )


def _source(weight: Any, config: Config) -> Any:
    if not config.tma:
        return weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])


def _constants(rows: int, config: Config) -> dict[str, Any]:
    tiles, more = tile_rows(rows)
    return {
        "ROWS": tiles, "MORE": more, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "SPLIT": config.split,
        "TMA": config.tma, "num_warps": config.warps, "num_stages": config.stages,
        "THREADS": 32 * config.warps,
    }  # fmt: skip


_scratch: dict[Any, list[tuple[Any, Any]]] = {}


def scratch_of(n: int, rows: int, config: Config) -> tuple[int, int]:
    """How many float32 of partial sums and how many counts of arrivals a product needs."""
    return (config.split * rows * n, n // config.block_n) if config.split > 1 else (0, 0)


def scratch(device: Any, floats: int, counts: int) -> tuple[Any, Any]:
    """Room for so many. It grows outside captures alone, and stays where a graph has seen it."""
    made = _scratch.setdefault(device, [])
    if not made or made[-1][0].numel() < floats or made[-1][1].numel() < counts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("room for partial sums is made before a capture")
        if made:
            floats, counts = max(floats, made[-1][0].numel()), max(counts, made[-1][1].numel())
        made.append((
            torch.empty(max(floats, 4), dtype=torch.float32, device=device),
            torch.zeros(max(counts, 4), dtype=torch.int32, device=device),
        ))  # fmt: skip
    return made[-1]


def tile_rows(rows: int) -> tuple[int, int]:
    return next(tiles for most, tiles in TILES.items() if rows <= most)


def choice(n: int, k: int, rows: int) -> Config | None:
    """How to cut a product, or None where torch is to have it."""
    if not 0 < rows <= MOST_ROWS:
        return None
    of_rows = table().get((n, k), {})
    return next((config for most, config in sorted(of_rows.items()) if rows <= most), None)


@cache
def table() -> dict[tuple[int, int], dict[int, Config | None]]:
    """By weight, then by the number of rows up to which it holds; None: torch is the faster one."""
    path = os.environ.get(TABLE)
    if path:
        return read_table(json.loads(Path(path).read_text()))
    return {(n, k): {rows: guess(n, k, rows) for rows in TILES} for of in SHAPES.values() for n, k in of}


def read_table(written: Mapping[str, Any]) -> dict[tuple[int, int], dict[int, Config | None]]:
    """What `benchmarks/gpu/few_rows.py --write` has written. ValueError for what the kernel cannot do."""
    found: dict[tuple[int, int], dict[int, Config | None]] = {}
    for entry in written["products"]:
        n, k, rows = (int(entry[name]) for name in ("n", "k", "rows"))
        config = entry["config"] and Config(**entry["config"])
        if config and not fits(n, k, rows, config):
            raise ValueError(f"{n} x {k}, {rows} rows: {config} does not fit")
        found.setdefault((n, k), {})[rows] = config
    return found


def fits(n: int, k: int, rows: int, config: Config) -> bool:
    """Whether the kernel can be compiled so, and fits a multiprocessor."""
    return (
        0 < rows <= MOST_ROWS
        and config.block_n in (64, 128, 256)
        and config.block_k in (64, 128)
        and config.warps in (4, 8)
        and n % config.block_n == 0
        and k % config.block_k == 0
        and 1 <= config.split <= k // config.block_k
        and config.stages >= 2
        and shared(rows, config) <= SHARED_A_PROGRAM
        and sums_a_thread(rows, config) <= MOST_SUMS
        and (config.split == 1 or sums_a_thread(rows, config) * config.split <= MOST_OF_PARTS)
    )


def sums_a_thread(rows: int, config: Config) -> int:
    return config.block_n * sum(tile_rows(rows)) // (32 * config.warps)


def shared(rows: int, config: Config) -> int:
    """Bytes of shared memory: the stages' blocks of both sides, and their barriers."""
    return config.stages * ((config.block_n + sum(tile_rows(rows))) * config.block_k * 2 + 16)


def resident(rows: int, config: Config) -> int:
    """Programs that one multiprocessor has at once, by its shared memory and, about, by its registers."""
    sums = sums_a_thread(rows, config)
    registers = min(255, max(24 + 2.6 * sums, 32 + sums * config.split))
    return min(SHARED // (shared(rows, config) + RESERVED), int(65536 / (registers * 32 * config.warps)))


def candidates(n: int, k: int, rows: int, most: int = 60) -> list[Config]:
    """Ways worth timing, the likeliest first: one to three programs a multiprocessor, with the stages they leave."""
    found = set()
    for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        for block_k in (64, 128):
            for beside in (1, 2, 3):
                full = max(1, min(PROCESSORS * beside * block_n // n, k // block_k // 2, 8))
                for split in {full, max(1, full - 1), 1}:
                    one = Config(block_n, block_k, split, 1, warps)
                    stages = min((SHARED // beside - RESERVED) // shared(rows, one), 8, k // block_k // split)
                    if stages >= 3 and fits(n, k, rows, one := one._replace(stages=stages)):
                        found |= {one, one._replace(tma=True)}
    return sorted(found, key=lambda config: (reckoned(n, k, rows, config), config))[:most]


def guess(n: int, k: int, rows: int) -> Config | None:
    """The likeliest; torch where its programs are more than the card has at once, a second turn being half empty."""
    first = next(iter(candidates(n, k, rows, 1)), None)
    return first if first and n // first.block_n * first.split <= PROCESSORS * resident(rows, first) else None


def reckoned(n: int, k: int, rows: int, config: Config) -> float:
    """Microseconds, from what is read and the card's rates: no measurement.

    4.0 MB a microsecond from memory, if as much is on its way as comes in one; 5.5 through the L2 cache, which has `x`
    once a tile and the partial sums twice; 0.06 into one multiprocessor. 2 us to start and to end, 1 more for a last
    part, which has 0.1 MB a microsecond.
    """
    tiles = n // config.block_n
    programs = tiles * config.split
    turns = programs / (PROCESSORS * resident(rows, config))
    ahead = programs / max(turns, 1) * (config.stages - 1) * config.block_n * config.block_k * 2
    sums = config.split * rows * n * 4 if config.split > 1 else 0
    through = (n + tiles * rows) * k * 2 + 2 * sums
    reading = max(n * k * 2 / min(4.0e6, ahead), through / 5.5e6, through / min(programs, PROCESSORS) / 0.06e6)
    if turns > 1:  # the last programs have the card to themselves
        reading *= math.ceil(turns) / turns
    return 2 + reading + (1 + sums / tiles / 0.1e6 if sums else 0)
