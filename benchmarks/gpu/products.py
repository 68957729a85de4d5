"""Matrix products of one pass over the 4B's 36 layers, by number of tokens and by implementation: what bounds a batch.

    PYTHONPATH=SITE python benchmarks/gpu/products.py [--tokens 48,528,16384]

Each product is captured in a CUDA graph over 36 different weights: neither launches nor the L2 cache change it. Prints
milliseconds a pass and TFLOP/s; of bfloat16 also gate_up with the gating behind it, by the stock kernel and inside
QuACK's product. Needs torch, SGLang and a Hopper GPU; QuACK and DeepGEMM are left out where they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from replays import replayed

SHAPES = {"qkv": (2560, 6144), "o": (4096, 2560), "gate_up": (2560, 19456), "down": (9728, 2560)}  # in, out
LAYERS = 36


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16,48,132,528,2112,8192,16384")
    args = parser.parse_args()
    import torch
    from sgl_kernel import fp8_scaled_mm

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    weights = {n: [random(out, into) for _ in range(LAYERS)] for n, (into, out) in SHAPES.items()}
    small = {n: [w.to(torch.float8_e4m3fn) for w in of] for n, of in weights.items()}
    channel = {n: torch.rand(out, 1, device="cuda") * 0.01 + 0.01 for n, (_, out) in SHAPES.items()}
    one = torch.ones((), device="cuda")

    for tokens in map(int, args.tokens.split(",")):
        rows = {n: random(tokens, into) for n, (into, _) in SHAPES.items()}
        rows8 = {n: x.to(torch.float8_e4m3fn) for n, x in rows.items()}
        scales = torch.rand(tokens, 1, device="cuda") * 0.01 + 0.01

        def scaled(n: str, k: int, a: Any, b: Any, rows8: Any = rows8) -> Any:
            return torch._scaled_mm(
                rows8[n], small[n][k].t(), scale_a=a, scale_b=b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        ways: dict[str, Callable[[str, int], Any]] = {
            "bfloat16": lambda n, k, rows=rows: torch.nn.functional.linear(rows[n], weights[n][k]),
            **others(rows, weights),
            "float8, sglang": lambda n, k, rows8=rows8, scales=scales: fp8_scaled_mm(
                rows8[n], small[n][k].t(), scales, channel[n], torch.bfloat16, None
            ),
            "float8, torch by row": lambda n, k, scales=scales, scaled=scaled: scaled(n, k, scales, channel[n].t()),
            "float8, torch by tensor": lambda n, k, scaled=scaled: scaled(n, k, one, one),
        }
        for name, product in ways.items():
            try:
                passes = {shape: milliseconds(torch, product, [shape]) for shape in SHAPES}
                whole = milliseconds(torch, product, list(SHAPES))
            except Exception as error:  # noqa: BLE001 - one that does not compile here; the others are worth having
                print(f"{tokens:6} {name:24} failed: {type(error).__name__}: {error}", flush=True)
                continue
            flops = 2 * tokens * LAYERS * sum(into * out for into, out in SHAPES.values())
            each = "  ".join(f"{shape} {ms:.3f}" for shape, ms in passes.items())
            print(f"{tokens:6} {name:24} {whole:8.3f} ms {flops / whole / 1e9:6.0f} TFLOP/s   {each}", flush=True)
        for name, product in gatings(rows["gate_up"], weights["gate_up"]).items():
            try:
                took = f"{milliseconds(torch, product, ['gate_up']):8.3f} ms"
            except Exception as error:  # noqa: BLE001
                took = f"failed: {type(error).__name__}: {error}"
            print(f"{tokens:6} gate_up and gating: {name:20} {took}", flush=True)


def others(rows: dict[str, Any], weights: dict[str, list[Any]]) -> dict[str, Callable[[str, int], Any]]:
    """bfloat16 products of libraries that SGLang brings along beside torch's."""
    ways: dict[str, Callable[[str, int], Any]] = {}
    with contextlib.suppress(ImportError):
        from quack.gemm_interface import gemm

        ways["bfloat16, quack"] = lambda n, k: gemm(rows[n], weights[n][k].t(), tuned=False)
    with contextlib.suppress(ImportError):
        import deep_gemm

        out = {n: rows[n].new_empty((len(rows[n]), SHAPES[n][1])) for n in SHAPES}
        ways["bfloat16, deep_gemm"] = lambda n, k: deep_gemm.bf16_gemm_nt(rows[n], weights[n][k], out[n])
    return ways


def gatings(rows: Any, weights: list[Any]) -> dict[str, Callable[[str, int], Any]]:
    """The gate and up product with the gating: one after the other, and in one."""
    import torch
    from sglang.jit_kernel.activation import silu_and_mul

    out = rows.new_empty((len(rows), SHAPES["gate_up"][1] // 2))

    def apart(_: str, k: int) -> Any:
        return silu_and_mul(torch.nn.functional.linear(rows, weights[k]), out)

    ways = {"torch, then stock": apart}
    with contextlib.suppress(ImportError):
        from quack.gemm_interface import gemm_gated

        how = {"activation": "swiglu", "store_preact": False, "tuned": False, "concat_layout": ("B",)}
        ways["quack, gated"] = lambda _, k: gemm_gated(rows, weights[k].t(), **how)[1]
    return ways


def milliseconds(torch: Any, product: Callable[[str, int], Any], shapes: list[str]) -> float:
    """One pass over all layers, replayed for about a third of a second."""
    for shape in shapes:
        product(shape, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            for shape in shapes:
                product(shape, layer)
    return replayed(torch, graph, max(3, min(60, int(350 / max(replayed(torch, graph, 1), 1e-3)))))


if __name__ == "__main__":
    main()
