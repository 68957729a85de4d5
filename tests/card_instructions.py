"""What the kernels ask of a GPU by its instructions, done by torch and numpy for Triton's interpreter."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0


def at_hand(asm: Any = None) -> AbstractContextManager[object]:
    """A kernel finds them: a GPU's own where there is one. `asm` in place of `instruction`, for other instructions."""
    if torch.cuda.is_available():
        return nullcontext()
    from triton.runtime.interpreter import InterpreterBuilder

    both = ExitStack()
    both.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", product))
    both.enter_context(mock.patch.object(tl, "inline_asm_elementwise", asm or instruction))
    return both


def product(_: Any, a: Any, b: Any, sums: Any, *__: Any) -> Any:
    """Of bfloat16 as the numbers they are, which the interpreter takes for whole ones."""
    from triton.runtime.interpreter import TensorHandle

    def wide(x: Any) -> Any:
        assert x.dtype.scalar == tl.bfloat16
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    # Not `@`, whose order of sums depends on where in the tile a number lies.
    return TensorHandle(np.einsum("nk,km->nm", wide(a), wide(b)) + sums.data, sums.dtype.scalar)


def instruction(asm: str, _: str, operands: list[tl.tensor], dtype: tl.dtype, is_pure: bool, pack: int) -> tl.tensor:
    """One of them as PTX describes it. Of two halves the first is high."""
    from triton.runtime.interpreter import TensorHandle

    a, *rest = (torch.from_numpy(x.handle.data.copy()) for x in operands)
    name = asm.split()[0]
    if name == "ex2.approx.ftz.f32":
        found = torch.exp2(a)
    elif name == "rcp.approx.ftz.f32":
        found = 1 / a
    elif name == "cvt.rn.bf16x2.f32":
        found = torch.stack([rest[0], a], -1).bfloat16().view(torch.int32)[..., 0]
    elif name == "max.xorsign.abs.bf16x2":
        halves = torch.maximum(*(x[..., None].view(torch.bfloat16).abs() for x in (a, rest[0])))
        found = halves.view(torch.int32)[..., 0]
    elif name == "cvt.rn.satfinite.e4m3x2.f32":
        halves = torch.stack([rest[0], a], -1).clamp(-FP8_MAX, FP8_MAX)
        found = halves.to(FP8).view(torch.int16)[..., 0]
    else:
        raise NotImplementedError(asm)
    return tl.tensor(TensorHandle(found.numpy(), dtype), tl.block_type(dtype, list(found.shape)))
