"""What the plugin's fp8 layer quantises with, against SGLang's own way and with other numbers of warps.

    PYTHONPATH=SITE python benchmarks/gpu/fp8_kernels.py [--shapes 4b] [--rows 64,15903]

`plugin` is what the layer runs (`fp8_kernels.py`), `N warps` the same with so many a row, `stock` what SGLang does
there: for gating its silu_and_mul, then its quantisation. Each is compared with `plugin` first; one with other warps
that does not give the same bits is left out. Then each is captured in a CUDA graph over so many buffers that the L2
cache does not help. Prints milliseconds a call, TB/s of what must be read and written, and what a pass gains over
`stock` and would gain by the best. Needs torch, SGLang, a Hopper GPU, and the plugin (PYTHONPATH=engine_plugin where it
is not installed).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from replays import in_turn

ROWS = "36,132,264,528,2112,15903"  # either side of fewer and more rows than multiprocessors, and a long batch
WARPS = (2, 4, 8, 16)
BEYOND_L2 = 400e6  # bytes that the buffers of one graph have together at least; an H200 keeps 60 MB


class Shape(NamedTuple):
    inner: int
    queries: int
    layers: int


class Kernel(NamedTuple):
    """One kind of work, once a layer: its ways by name, called with a buffer of [rows, width]."""

    width: int  # of a buffer's rows
    bytes_a_row: int
    ways: dict[str, Callable[[Any], tuple[Any, Any]]]


SHAPES = {"0.6b": Shape(3072, 2048, 28), "4b": Shape(9728, 4096, 36), "8b": Shape(12288, 4096, 36)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4b,8b,0.6b")
    parser.add_argument("--rows", default=ROWS)
    args = parser.parse_args()
    import torch

    begin = time.monotonic()
    torch.manual_seed(0)
    arena = torch.randn(400_000_000, device="cuda", dtype=torch.bfloat16)  # every buffer is a piece of it
    for name in args.shapes.split(","):
        for work, kernel in kernels(SHAPES[name]).items():
            for way in list(kernel.ways):
                try:
                    same = alike(torch, kernel, way)
                except Exception as error:  # noqa: BLE001 - one that does not run here; the others are worth having
                    same = f"left out: {type(error).__name__}: {error}"
                    del kernel.ways[way]
                print(f"{name:5} {work:14} {way:9} {same}", flush=True)
            for rows in map(int, args.rows.split(",")):
                took = timed(torch, kernel, rows, arena)
                for way, ms in took.items():
                    speed = rows * kernel.bytes_a_row / ms / 1e9
                    print(f"{name:5} {work:14} {way:9} {rows:6} rows {ms:8.4f} ms {speed:5.2f} TB/s", flush=True)
                best = min(took, key=took.__getitem__)
                for one, other in (("stock", "plugin"), ("plugin", best)):
                    if one in took and other in took and one != other:
                        gain = (took[one] - took[other]) * SHAPES[name].layers
                        times = took[one] / took[other]
                        print(f"{name:5} {work:14} {rows} rows: {other} for {one}, {times:.2f}x, {gain:.2f} ms a pass")
    print(f"{time.monotonic() - begin:.0f} s")


def kernels(shape: Shape) -> dict[str, Kernel]:
    from qwen3emb_engine_plugin.fp8_kernels import gate_quantise, quantise

    def ways(ours: Callable[..., tuple[Any, Any]], stock: Callable[..., tuple[Any, Any]]) -> dict[str, Any]:
        tried = {f"{warps} warps": partial(ours, warps=warps) for warps in WARPS}
        return {"plugin": ours, **tried, "stock": stock}

    return {
        "gate_quantise": Kernel(2 * shape.inner, 5 * shape.inner + 4, ways(gate_quantise, stock_gate_quantise)),
        "quantise": Kernel(shape.queries, 3 * shape.queries + 4, ways(quantise, stock_quantise)),
    }


def stock_gate_quantise(rows: Any) -> tuple[Any, Any]:
    from sglang.srt.layers.activation import silu_and_mul

    out = rows.new_empty(rows.shape[0], rows.shape[1] // 2)
    silu_and_mul(rows, out)
    return stock_quantise(out)


def stock_quantise(rows: Any) -> tuple[Any, Any]:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

    found: tuple[Any, Any] = sglang_per_token_quant_fp8(rows)
    return found


def alike(torch: Any, kernel: Kernel, way: str) -> str:
    """How much of 4,000 rows is other than by `plugin`. It compiles both, too."""
    rows = torch.randn(4000, kernel.width, device="cuda").bfloat16()
    values, scales = (
        (one.view(kind) != other.view(kind)).float().mean().item()
        for one, other, kind in zip(
            kernel.ways[way](rows), kernel.ways["plugin"](rows), (torch.uint8, torch.int32), strict=True
        )
    )
    if not values and not scales:
        return "the same to the bit"
    told = f"{values:.1e} of the values and {scales:.1e} of the scales are others"
    if way != "stock":
        raise ValueError(told)
    return told


def timed(torch: Any, kernel: Kernel, rows: int, arena: Any) -> dict[str, float]:
    """Milliseconds a call of each way, the better of two turns."""
    size = rows * kernel.width
    buffers = max(4, math.ceil(BEYOND_L2 / (rows * kernel.bytes_a_row)))
    room = len(arena) // size  # past the arena's end they begin anew: by then the cache has forgotten the first
    assert room > 0, f"{rows} rows of {kernel.width} do not fit the arena"
    inputs = [arena[(k % room) * size : (k % room + 1) * size].view(rows, kernel.width) for k in range(buffers)]
    return in_turn(torch, kernel.ways, inputs)


if __name__ == "__main__":
    main()
