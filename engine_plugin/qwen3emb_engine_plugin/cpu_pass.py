"""A pass on a CPU with its memory near: large tensors are not returned to the kernel, norms work in blocks.

On a CPU without AMX, SGLang runs its norms as eight tensor operations, each of them over a whole float32 copy of the
batch. Such a copy is returned to the kernel when it is freed and faulted in again by the next operation, and it does
not fit the cache. The numbers stay the same: every row sees the same operations in the same order.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit

NORM = "sglang.srt.layers.layernorm.RMSNorm"
# Elements of a block, for each thread: two float32 copies of it stay in a core's second cache (measured: notes.md).
BLOCK = 1 << 17
# glibc's own numbers of its settings. Larger tensors than this go back as ever: glibc's own rule ends at that size too,
# and larger ones would leave holes that the next one does not fit.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20
KEEP = 256 << 20


def heap() -> str | None:
    """Freed tensors of up to LARGEST bytes stay with the process, KEEP bytes in all: the next finds its pages there."""
    import torch

    if torch.cuda.is_available() or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return NOT_NEEDED
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "the C library has no mallopt"
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEEP)
    return None if kept else "the C library refuses to keep what is freed"


def norms() -> str | None:
    """Hook the norm that a CPU runs."""
    import torch
    from sglang.srt.layers.layernorm import RMSNorm

    if torch.cuda.is_available():
        return NOT_NEEDED
    problem = misfit(
        RMSNorm.forward_native,
        "self x residual post_residual_addition",
        "x = x.to(torch.float32)",
        "x = x + residual.to(torch.float32)",
        "residual = x.to(orig_dtype)",
        "variance = x_var.pow(2).mean(dim=-1, keepdim=True)",
        "x = x * torch.rsqrt(variance + self.variance_epsilon)",
        "x = (x * self.weight).to(orig_dtype)",
    )
    if not problem:
        HookRegistry.register(f"{NORM}.forward_native", _forward, HookType.AROUND)
    return problem


def _forward(original: Any, self: Any, x: Any, residual: Any = None, post_residual_addition: Any = None) -> Any:
    """Large batches of the plain kind in blocks; all others as they come."""
    import torch

    rows = BLOCK * torch.get_num_threads() // x.shape[-1]
    if (
        not 0 < rows < x.shape[0]
        or x.dim() != 2
        or x.shape[1] != self.hidden_size
        or x.device.type != "cpu"
        or x.dtype not in (torch.bfloat16, torch.float16)
        or post_residual_addition is not None
        or not _plain(self)
    ):
        return original(self, x, residual, post_residual_addition)
    return in_blocks(x, residual, self.weight, self.variance_epsilon, rows)


def _plain(norm: Any) -> bool:
    return (
        norm.override_orig_dtype is None
        and not norm.fp32_residual
        and norm.variance_size_override is None
        and not norm.cast_x_before_out_mul
    )


def in_blocks(x: Any, residual: Any, weight: Any, epsilon: float, rows: int) -> Any:
    """The stock norm of `x`, or of `x + residual` with that sum beside it, `rows` rows at a time."""
    import torch

    count, width = x.shape
    out = torch.empty((count, width), dtype=x.dtype)
    total = None if residual is None else torch.empty((count, width), dtype=x.dtype)
    values, squares = torch.empty((2, rows, width), dtype=torch.float32)
    for start in range(0, count, rows):
        here = slice(start, min(start + rows, count))
        a, b = values[: here.stop - start], squares[: here.stop - start]
        a.copy_(x[here])
        if total is not None:
            a.add_(b.copy_(residual[here]))
            total[here] = a
        scale = torch.square(a, out=b).mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        out[here] = a.mul_(scale).mul_(weight)
    return out if total is None else (out, total)
