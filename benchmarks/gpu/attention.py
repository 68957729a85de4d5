"""Attention of a whole-pass graph: FlashAttention as SGLang calls it, and the plugin's kernel with several tiles.

    PYTHONPATH=SITE python benchmarks/gpu/attention.py [--shapes 4b] [--batches 33x1,33x128] [--ways 64-64-4-2,...]

`33x64` is 64 texts of 33 tokens, in a graph of that many rows with places for 129 texts, as `full_graph` has them;
`live` is FlashAttention in a live pass, with places for its texts alone. A way is the plugin kernel's tile: rows of
queries, keys at a time, warps, stages; `plugin` is what it takes by itself. Each is compared with FlashAttention
first, then captured in a CUDA graph over so many buffers that the L2 cache does not help. Prints microseconds a layer,
and what a pass gains. Needs torch, SGLang, a Hopper GPU, and the plugin (PYTHONPATH=engine_plugin where it is not
installed).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from replays import in_turn

BATCHES = "33x1,33x4,33x16,33x64,33x128,129x16,513x1,513x4,513x8,1056x1,1056x4,2112x1,2112x2,4224x1"
WAYS = "64-32-4-2,64-32-4-3,64-64-4-1,64-64-4-2,64-64-4-3,64-128-4-2,128-32-8-2,128-64-8-2,128-64-8-3,128-128-8-2"
SLOTS = 129  # texts that a graph of the launcher's has places for, the padding's among them
BEYOND_L2 = 200e6  # bytes that the buffers of one graph have together at least; an H200 keeps 60 MB
ROOM = 400_000_000  # numbers
ALIKE = 0.02  # a row's distance by its length; two that round shares and answer to bfloat16 have 0.004, in torch


class Shape(NamedTuple):
    q_heads: int
    k_heads: int
    layers: int


class Buffers(NamedTuple):
    """One layer's inputs: queries [rows, q_heads, 128], keys contiguous, values as a part of the wider rows."""

    q: Any
    k: Any
    v: Any


SHAPES = {"0.6b": Shape(16, 8, 28), "4b": Shape(32, 8, 36), "8b": Shape(32, 8, 36)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4b,0.6b")
    parser.add_argument("--batches", default=BATCHES)
    parser.add_argument("--ways", default=WAYS)
    args = parser.parse_args()
    import torch

    begin = time.monotonic()
    torch.manual_seed(0)
    arena = torch.randn(ROOM, device="cuda", dtype=torch.bfloat16)  # every buffer is a piece of it
    for name in args.shapes.split(","):
        shape = SHAPES[name]
        for batch in args.batches.split(","):
            length, _, texts = batch.partition("x")
            ways = attentions(torch, shape, [int(length)] * int(texts), args.ways.split(","))
            rows = int(length) * int(texts)
            inputs = buffers(shape, rows, arena)
            wrong = differing(torch, ways, inputs[0])
            took = {way: 1000 * ms for way, ms in in_turn(torch, ways, inputs).items()}
            for way, us in took.items():
                said = f" {wrong[way]}" if way in wrong else ""
                print(f"{name:5} {batch:8} {way:12} {us:8.2f} us a layer{said}", flush=True)
            best = min((way for way in took if way not in {"graph", "live"}), key=took.__getitem__)
            for way in dict.fromkeys(("plugin", best)):
                gain = (took["graph"] - took[way]) * shape.layers / 1000
                print(f"{name:5} {batch}: {way} {took['graph'] / took[way]:.2f}x, {gain:.2f} ms a pass", flush=True)
    print(f"{time.monotonic() - begin:.0f} s")


def buffers(shape: Shape, rows: int, arena: Any) -> list[Buffers]:
    """As many as the cache does not hold, of one long piece of memory; past its end they begin anew."""
    width = (shape.q_heads + 2 * shape.k_heads) * 128
    size = rows * (width + shape.q_heads * 128 + shape.k_heads * 128)
    found = []
    for k in range(max(4, math.ceil(BEYOND_L2 / (2 * size)))):
        piece = arena[(k % (len(arena) // size)) * size :][:size]
        qkv, q, keys = piece.split([rows * width, rows * shape.q_heads * 128, rows * shape.k_heads * 128])
        v = qkv.view(rows, width)[:, -shape.k_heads * 128 :].view(rows, shape.k_heads, 128)
        found.append(Buffers(q.view(rows, shape.q_heads, 128), keys.view(rows, shape.k_heads, 128), v))
    return found


def attentions(torch: Any, shape: Shape, lengths: list[int], tried: list[str]) -> dict[str, Callable[[Buffers], Any]]:
    """Each way by name, with the offsets and positions of these texts."""
    from qwen3emb_engine_plugin.attention_kernel import Way, attend
    from sglang.jit_kernel.flash_attention import flash_attn_varlen_func

    scaling, rows = 128**-0.5, sum(lengths)
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])
    padded = torch.cat([offsets, offsets.new_full((SLOTS + 1 - len(offsets),), rows)])

    def flash(places: Any, longest: int, splits: int) -> Callable[[Buffers], Any]:
        def attention(one: Buffers) -> Any:
            return flash_attn_varlen_func(
                q=one.q, k=one.k, v=one.v, cu_seqlens_q=places, cu_seqlens_k=places, max_seqlen_q=longest,
                max_seqlen_k=longest, softmax_scale=scaling, causal=True, num_splits=splits,
            )  # fmt: skip

        return attention

    def ours(way: Any) -> Callable[[Buffers], Any]:
        def attention(one: Buffers) -> Any:
            out = torch.empty_like(one.q).flatten(1)
            attend(one.q.flatten(1), one.k, one.v, positions, out, scaling, shape.q_heads, shape.k_heads, way)
            return out

        return attention

    ways = {"graph": flash(padded, rows, 1), "live": flash(offsets, max(lengths), 0), "plugin": ours(None)}
    return ways | {way: ours(Way(*map(int, way.split("-")))) for way in tried}


def differing(torch: Any, ways: dict[str, Callable[[Buffers], Any]], one: Buffers) -> dict[str, str]:
    """What is to be said of a way that differs from FlashAttention's answer. One that fails is taken out.

    Each head of each row for itself, by its length: where a text is long, answers are means of many values and small,
    and one that leaves keys out is no farther away than the rounding of an early row.
    """
    head = one.q.shape[-1]
    expected = ways["graph"](one).reshape(-1, head).float()
    said = {}
    for name, way in list(ways.items()):
        try:
            distance = (way(one).reshape(-1, head).float() - expected).norm(dim=-1)
            far = (distance / expected.norm(dim=-1)).max().item()
        except Exception as error:  # noqa: BLE001 - one that does not compile here; the others are worth having
            print(f"{name}: left out: {type(error).__name__}: {error}", flush=True)
            del ways[name]
            continue
        if not far < ALIKE:
            said[name] = f"WRONG by {far:.3f}"
    torch.cuda.synchronize()
    return said


if __name__ == "__main__":
    main()
