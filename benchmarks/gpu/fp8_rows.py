"""Whether a float8 product of one row is another one when more rows stand beside it, and in which kernel.

    PYTHONPATH=SITE python benchmarks/gpu/fp8_rows.py [--shapes 4b,8b]

For the four products of each official shape: SGLang's `fp8_scaled_mm` and torch's row-wise `_scaled_mm`, from 1 row to
4,224. Float8 engines give a text other vectors in a batch than alone, and a kernel that sums in another order for more
rows would do that. An H200 has none (docs/benchmarks/h200-2026-12-01/fp8_rows.txt): the cause is elsewhere. Prints, for
each kernel, from how many rows on the first row is another one than alone, how many of its numbers, and its error to a
product in float64; then how many numbers of that row the two kernels have otherwise, since the plugin's layer changes
from one to the other at 100 rows (that run had no such line). Needs torch, SGLang, a Hopper GPU, and the plugin
(PYTHONPATH=engine_plugin where it is not installed).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import groupby
from typing import Any

ROWS = (
    1,
    2,
    4,
    8,
    12,
    16,
    24,
    32,
    36,
    48,
    64,
    65,
    68,
    100,
    128,
    129,
    132,
    200,
    256,
    264,
    396,
    528,
    792,
    1056,
    2112,
    4224,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.6b,4b,8b")
    args = parser.parse_args()
    import torch
    from qwen3emb_engine_plugin.few_rows_kernels import SHAPES

    torch.manual_seed(0)
    for name in args.shapes.split(","):
        for out, width in SHAPES[name]:
            weight, weight_scales = quantised(torch.randn(out, width, device="cuda").bfloat16() * 0.02)
            rows, scales = quantised(torch.randn(max(ROWS), width, device="cuda").bfloat16())
            exact = (rows[:1].double() * scales[:1].double()) @ (weight.double() * weight_scales.double()).t()
            alone = {}
            for kernel, product in kernels(torch, weight, weight_scales).items():
                found = {count: product(rows[:count], scales[:count])[0] for count in ROWS}
                error = ((found[1].double() - exact[0]).norm() / exact.norm()).item()
                print(f"{name:5} [{out}, {width}] {kernel:6} error alone {error:.5f}; {told(found)}", flush=True)
                alone[kernel] = found[1]
            others = int((alone["sglang"] != alone["torch"]).sum())
            print(f"{name:5} [{out}, {width}] sglang and torch: {others} of {out} numbers others", flush=True)


def quantised(values: Any) -> tuple[Any, Any]:
    """Rows as float8, each with its scale."""
    import torch

    scales = values.abs().amax(-1, keepdim=True).float() / 448
    return (values.float() / scales).to(torch.float8_e4m3fn), scales


def kernels(torch: Any, weight: Any, weight_scales: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """Rows and their scales to bfloat16, by name."""
    from sgl_kernel import fp8_scaled_mm

    turned, of_columns = weight.t(), weight_scales.t().contiguous()

    def sglang(rows: Any, scales: Any) -> Any:
        return fp8_scaled_mm(rows, turned, scales, of_columns, out_dtype=torch.bfloat16, bias=None)

    def by_torch(rows: Any, scales: Any) -> Any:
        return torch._scaled_mm(
            rows, turned, scale_a=scales, scale_b=of_columns, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return {"sglang": sglang, "torch": by_torch}


def told(found: dict[int, Any]) -> str:
    """`4 to 64 rows: 12 numbers others`, for each stretch of row counts whose answer is not that of one row."""
    stretches = []
    for others, counts in groupby(found, key=lambda count: int((found[count] != found[1]).sum())):
        inside = list(counts)
        if others:
            stretches.append(f"{inside[0]} to {inside[-1]} rows: {others} numbers others")
    return "; ".join(stretches) or "the same beside any number of rows"


if __name__ == "__main__":
    main()
