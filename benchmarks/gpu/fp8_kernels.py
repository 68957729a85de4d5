"""What quantises between the products of a float8 layer: the plugin's kernels against those that may take their place.

    PYTHONPATH=SITE python benchmarks/gpu/fp8_kernels.py [--shapes 4b] [--rows 64,15903]

`present` is what the plugin runs: `kernels.py`, and SGLang's quantisation of the attention's output. The others are of
`fp8_kernels.py`: `W x N` has W warps a row and N words (of two values) a thread and chunk, `*` is its own choice,
`plain` has no instructions of the card's own, `evict_first` asks the L2 cache to keep nothing. Each is compared with
`present` first, then captured in a CUDA graph over so many buffers that the L2 cache does not help. Prints milliseconds
a call, TB/s of what must be read and written, and what a pass would gain. Meant to take less than 40 s, a third of it
compiling. Needs torch, SGLang, a Hopper GPU, and the plugin (PYTHONPATH=engine_plugin where it is not installed).
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
from products import replayed

ROWS = "64,528,2112,15903"
BEYOND_L2 = 400e6  # bytes that the buffers of one graph have together at least; an H200 keeps 60 MB
SECONDS = 0.02  # of replays, for each number
FAR = 1e-2  # of the values: more than another order of a norm's sum explains
EPS = 1e-6


class Shape(NamedTuple):
    hidden: int
    inner: int
    queries: int
    layers: int


class Kernel(NamedTuple):
    """One kind of work: its ways by name, called with a buffer of [rows, width]; the first is the present one."""

    width: int  # of a buffer's rows
    bytes_a_row: int
    calls_a_layer: int
    ways: dict[str, Callable[[Any], tuple[Any, Any]]]


SHAPES = {"0.6b": Shape(1024, 3072, 2048, 28), "4b": Shape(2560, 9728, 4096, 36), "8b": Shape(4096, 12288, 4096, 36)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4b,8b,0.6b")
    parser.add_argument("--rows", default=ROWS)
    args = parser.parse_args()
    import torch

    begin = time.monotonic()
    counts = [int(rows) for rows in args.rows.split(",")]
    torch.manual_seed(0)
    arena = torch.randn(400_000_000, device="cuda", dtype=torch.bfloat16)  # every buffer is a piece of it
    for name in args.shapes.split(","):
        shape = SHAPES[name]
        gains = dict.fromkeys(counts, 0.0)
        for work, kernel in kernels(torch, shape).items():
            for way in list(kernel.ways):
                try:
                    same = alike(torch, kernel, way)
                except Exception as error:  # noqa: BLE001 - one that does not compile here; the others are worth having
                    same = f"left out: {type(error).__name__}: {error}"
                    del kernel.ways[way]
                print(f"{name:5} {work:20} {way:20} {same}", flush=True)
            arena.normal_()  # residuals have grown
            for rows in counts:
                took = timed(torch, kernel, rows, arena)
                for way, ms in took.items():
                    speed = rows * kernel.bytes_a_row / ms / 1e9
                    print(f"{name:5} {work:20} {way:20} {rows:6} rows {ms:8.4f} ms {speed:5.2f} TB/s", flush=True)
                if "present" in took:
                    best = min(took, key=took.__getitem__)
                    gain = (took["present"] - took[best]) * kernel.calls_a_layer * shape.layers
                    gains[rows] += gain
                    times = took["present"] / took[best]
                    print(f"{name:5} {work:20} best of {rows} rows: {best}, {times:.2f}x, {gain:.2f} ms a pass")
        for rows, gain in gains.items():
            print(f"{name:5} {rows} rows: a pass of {shape.layers} layers takes {gain:.2f} ms less", flush=True)
    print(f"{time.monotonic() - begin:.0f} s")


def kernels(torch: Any, shape: Shape) -> dict[str, Kernel]:
    from qwen3emb_engine_plugin import fp8_kernels as new
    from qwen3emb_engine_plugin import kernels as present

    weight = (1 + 0.1 * torch.randn(shape.hidden, device="cuda")).bfloat16()

    def normed(norm: Callable[..., tuple[Any, Any]], rows: Any) -> tuple[Any, Any]:
        hidden, residual = rows.view(2, -1, shape.hidden)
        return norm(hidden, residual, weight, EPS)

    def ways(chosen: Any, tilings: list[Any], new_one: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        found = {}
        for tiling in dict.fromkeys([chosen, *tilings]):
            name = f"{tiling.warps} x {tiling.words}{' *' if tiling == chosen else ''}"
            found[name] = partial(new_one, tiling=tiling)
        return {
            **found,
            "* evict_first": partial(new_one, evict="evict_first"),
            "* plain": partial(new_one, plain=True),
        }

    some = shape == SHAPES["4b"]  # more of them for the shape that was traced
    tiling = new.Tiling
    gating = ways(
        new.tiling_of(shape.inner, new.GATE_TILINGS),
        [tiling(4), tiling(8), tiling(4, 2), *([tiling(2), tiling(16)] if some else [])],
        new.gate_quantise,
    )
    norming = ways(
        new.tiling_of(shape.hidden, new.NORM_TILINGS),
        [tiling(2), tiling(4), *([tiling(1), tiling(8, 2)] if some else [])],
        new.norm_quantise,
    )
    plain = ways(new.tiling_of(shape.queries, new.QUANTISE_TILINGS), [tiling(2), tiling(4), tiling(8)], new.quantise)
    for found in (plain, *(() if some else (gating, norming))):
        found.pop("* plain")
    return {
        "gate_quantise": Kernel(2 * shape.inner, 5 * shape.inner + 4, 1, {"present": present.gate_quantise, **gating}),
        "norm_quantise": Kernel(
            2 * shape.hidden, 7 * shape.hidden + 4, 2,
            {name: partial(normed, way) for name, way in {"present": present.norm_quantise, **norming}.items()},
        ),
        "quantise": Kernel(shape.queries, 3 * shape.queries + 4, 1, {"present": stock_quantise, **plain}),
    }  # fmt: skip


def stock_quantise(rows: Any) -> tuple[Any, Any]:
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

    return sglang_per_token_quant_fp8(rows)


def alike(torch: Any, kernel: Kernel, way: str) -> str:
    """How many of 4,000 rows are the present kernel's to the bit. It compiles both, too."""
    rows = torch.randn(4000, kernel.width, device="cuda").bfloat16()
    again = rows.clone()  # norms overwrite the residual
    found = kernel.ways[way](rows)
    expected = kernel.ways.get("present", kernel.ways[way])(again)
    kept = torch.equal(rows, again)
    values, scales = (
        (a.view(t) != b.view(t)).float().mean().item()
        for a, b, t in zip(found, expected, (torch.uint8, torch.int32), strict=True)
    )
    if not kept or values > FAR or scales > FAR:
        raise ValueError(f"{values:.1%} of the values, {scales:.1%} of the scales are others, overwritten: {not kept}")
    if values or scales:
        return f"{values:.1e} of the values and {scales:.1e} of the scales are others"
    return "the same to the bit"


def timed(torch: Any, kernel: Kernel, rows: int, arena: Any) -> dict[str, float]:
    """Milliseconds a call of each way, the better of two turns."""
    size = rows * kernel.width
    buffers = max(4, math.ceil(BEYOND_L2 / (rows * kernel.bytes_a_row)))
    room = len(arena) // size  # past the arena's end they begin anew: by then the cache has forgotten the first
    assert room > 0, f"{rows} rows of {kernel.width} do not fit the arena"
    inputs = [arena[(k % room) * size : (k % room + 1) * size].view(rows, kernel.width) for k in range(buffers)]
    graphs = {}
    for name, way in kernel.ways.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [way(buffer) for buffer in inputs]  # all kept until the end: each has memory of its own
        del outputs
        graphs[name] = graph
    found = dict.fromkeys(graphs, math.inf)
    for _ in range(2):
        for name, graph in graphs.items():
            times = max(2, min(60, int(SECONDS * 1000 / max(replayed(torch, graph, 1), 1e-3))))
            found[name] = min(found[name], replayed(torch, graph, times) / buffers)
    return found


if __name__ == "__main__":
    main()
