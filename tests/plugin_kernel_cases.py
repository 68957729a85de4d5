"""The plugin's Triton kernels against plain torch. Run by the engine environment's python (see test_plugin.py).

On a GPU: `python tests/plugin_kernel_cases.py`, as compiled. Without one: TRITON_INTERPRET=1, which executes them
on the CPU and rounds bfloat16 its own way, hence a tolerance of one step of that type.
"""
# ruff: noqa: PT009 - unittest: the engine environment has no pytest

from __future__ import annotations

import unittest
from unittest import mock

import torch
import triton.language as tl
from qwen3emb_engine_plugin import fp8_kernels, kernels
from qwen3emb_engine_plugin.fp8_kernels import Tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
BF16_STEP = 2**-7  # relative, of the worst place in a binade
FP8_STEP = 2**-3


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).bfloat16()


def quantised_by_torch(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = values.float().abs().amax(-1, keepdim=True)
    scales = largest / torch.full_like(largest, kernels.FP8_MAX)
    return (values.float() * (1 / scales)).clamp(-kernels.FP8_MAX, kernels.FP8_MAX).to(kernels.FP8), scales


def instruction(asm: str, _: str, operands: list[tl.tensor], dtype: tl.dtype, is_pure: bool, pack: int) -> tl.tensor:
    """One of the card's instructions as PTX describes it, for Triton's interpreter. Of two halves the first is high."""
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
        halves = torch.stack([rest[0], a], -1).clamp(-kernels.FP8_MAX, kernels.FP8_MAX)
        found = halves.to(kernels.FP8).view(torch.int16)[..., 0]
    else:
        raise NotImplementedError(asm)
    return tl.tensor(TensorHandle(found.numpy(), dtype), tl.block_type(dtype, list(found.shape)))


class Kernels(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    def weight(self, width: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(width, device=DEVICE)).bfloat16()

    def close(self, found: torch.Tensor, expected: torch.Tensor, relative: float, absolute: float = 0.0) -> None:
        found, expected = found.float(), expected.float()
        worst = ((found - expected).abs() - relative * expected.abs() - absolute).max().item()
        self.assertLessEqual(worst, 0.0)
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0).item()
        self.assertGreater(cosine, 0.9995)

    def quantised(self, values: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
        """`rows` times `scales` are `values`, the largest of each row at the end of the range."""
        values = values.float()
        self.close(scales, values.abs().amax(-1, keepdim=True) / kernels.FP8_MAX, BF16_STEP)
        found = rows.float() * scales
        if DEVICE == "cpu":
            # Triton's interpreter does not carry into the exponent when float8 rounds up to a power of two.
            mantissa, _ = torch.frexp(values / scales)
            judged = (mantissa.abs() < 1 - 2**-4) & (mantissa.abs() > 0.5 + 2**-6)
            self.assertGreater(judged.float().mean().item(), 0.7)
            found, values = found[judged], values[judged]
        self.close(found, values, FP8_STEP, absolute=scales.max().item() * 2**-6)
        self.assertTrue((rows.float().abs().amax(-1) >= kernels.FP8_MAX * (1 - FP8_STEP)).all())

    def test_norm_and_quantisation(self) -> None:
        """With and without a residual, which is overwritten with the sum; widths that are no power of two too."""
        for tokens, width in ((3, 2560), (1, 1024), (2, 96)):
            hidden, weight = self.random(tokens, width), self.weight(width)
            for of in (kernels, fp8_kernels):
                self.quantised(normed(hidden, weight), *of.norm_quantise(hidden, None, weight, EPS))
                residual = self.random(tokens, width)
                summed = hidden.float() + residual.float()
                self.quantised(normed(summed, weight), *of.norm_quantise(hidden, residual, weight, EPS))
                self.close(residual, summed, BF16_STEP)

    def test_a_row_of_zeros_stays_zeros(self) -> None:
        """Padding rows of a graph: no division by zero, no NaN."""
        zeros = self.random(2, 128) * 0
        for rows, scales in (
            *(of.norm_quantise(zeros, None, self.weight(128), EPS) for of in (kernels, fp8_kernels)),
            *(of.gate_quantise(zeros) for of in (kernels, fp8_kernels)),
            fp8_kernels.quantise(zeros),
        ):
            self.assertEqual(rows.float().abs().max().item(), 0.0)
            self.assertTrue(torch.isfinite(scales).all())

    def test_gating_and_quantisation(self) -> None:
        """silu(gate) * up, the gate first; far values on both sides."""
        for width in (9728, 96):
            gate_up = self.random(3, 2 * width) * 4
            gate, up = gate_up[:, :width].float(), gate_up[:, width:].float()
            expected = (torch.nn.functional.silu(gate) * up).bfloat16()
            for of in (kernels, fp8_kernels):
                self.quantised(expected, *of.gate_quantise(gate_up))

    def same(self, found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Float8 rows and their scales, to the bit."""
        self.assertEqual([x.shape for x in found], [x.shape for x in expected])
        self.assertTrue(torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)))
        self.assertTrue(torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32)))

    def test_gated_rows_are_the_same_to_the_bit_in_chunks(self) -> None:
        """Whatever the chunks, up to gates where silu is 0 and rows of small numbers."""
        for width in (9728, 3072, 12288, 96):
            gate_up = self.random(6, 2 * width)
            gate_up *= torch.tensor([[1e-6], [0.01], [1.0], [8.0], [40.0], [1e4]], device=DEVICE).bfloat16()
            expected = kernels.gate_quantise(gate_up)
            for tiling in (None, Tiling(4, 2), Tiling(16)):
                self.same(fp8_kernels.gate_quantise(gate_up, tiling, "evict_first"), expected)
            self.same(fp8_kernels.gate_quantise(gate_up, plain=True), expected)

    def test_normed_rows_differ_in_the_order_of_a_sum_alone(self) -> None:
        """The residual to the bit; of the rows nearly all."""
        for width in (1024, 2560, 4096, 96):
            hidden, before, weight = self.random(7, width), self.random(7, width), self.weight(width)
            residual = before.clone()
            rows, scales = kernels.norm_quantise(hidden, residual, weight, EPS)
            for tiling in (None, Tiling(1), Tiling(8, 2)):
                again = before.clone()
                found = fp8_kernels.norm_quantise(hidden, again, weight, EPS, tiling)
                self.assertTrue(torch.equal(again, residual))
                self.close(found[1], scales, BF16_STEP)
                alike = found[1] == scales  # in the others the largest value was rounded otherwise
                self.assertGreater(alike.float().mean().item(), 0.7)
                self.assertGreater((found[0].float() == rows.float())[alike[:, 0]].float().mean().item(), 0.99)

    def test_quantised_rows_are_sglang_s(self) -> None:
        """To the bit, where its kernel is; elsewhere its arithmetic. Rows of zeros too."""
        for width in (2048, 4096, 96):
            values = self.random(2200 if DEVICE == "cuda" else 5, width) * 3
            values[1] = 0
            for tiling in (None, Tiling(1), Tiling(8, 2)):
                found = fp8_kernels.quantise(values, tiling)
                largest = values.cpu().float().abs().amax(-1, keepdim=True)
                self.assertTrue(torch.equal(found[1].cpu(), largest / torch.full_like(largest, kernels.FP8_MAX)))
                self.quantised(values[2:], found[0][2:], found[1][2:])
                if DEVICE == "cuda":
                    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

                    self.same(found, sglang_per_token_quant_fp8(values))

    @unittest.skipIf(DEVICE == "cuda", "a GPU has the instructions themselves")
    def test_the_card_s_instructions_lie_where_they_should(self) -> None:
        """What PLAIN leaves out, with each instruction done by torch: order of halves, rounding, what is kept."""
        with mock.patch.object(tl, "inline_asm_elementwise", instruction):
            for width in (2560, 96):
                gate_up = self.random(4, 2 * width) * 4
                gate, up = gate_up[:, :width].float(), gate_up[:, width:].float()
                gated = (gate * (1 / (1 + torch.exp2(gate * -1.4426950408889634))) * up).bfloat16()
                self.same(fp8_kernels.quantise(gated, plain=False), quantised_by_torch(gated))
                rows, scales = fp8_kernels.gate_quantise(gate_up, plain=False)
                expected, expected_scales = quantised_by_torch(gated)
                self.close(scales, expected_scales, BF16_STEP)
                # Not all: torch's powers of the last few numbers of a tensor may be others than of those before.
                self.assertGreater((rows.float() == expected.float()).float().mean().item(), 0.999)
                hidden, residual, weight = self.random(4, width), self.random(4, width), self.weight(width)
                summed = hidden.float() + residual.float()
                rows, scales = fp8_kernels.norm_quantise(hidden, residual, weight, EPS, plain=False)
                self.assertTrue(torch.equal(residual, summed.bfloat16()))
                expected, expected_scales = quantised_by_torch(normed(summed, weight))
                self.close(scales, expected_scales, BF16_STEP)
                self.assertGreater((rows.float() == expected.float()).float().mean().item(), 0.99)

    def test_norm_and_rotation_of_each_head(self) -> None:
        """As each of the official shapes has it, and others; keys and queries keep their order, values stay."""
        for q_heads, k_heads, head in ((32, 8, 128), (16, 8, 128), (3, 1, 64)):
            tokens = 5
            qkv = self.random(tokens, (q_heads + 2 * k_heads) * head)
            before = qkv.clone()
            positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
            inverse = 1 / (1e6 ** (torch.arange(0, head, 2, device=DEVICE) / head))
            angles = torch.outer(torch.arange(4096, device=DEVICE).float(), inverse)
            cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
            q_weight, k_weight = self.weight(head), self.weight(head)
            found = kernels.norm_rotate(qkv, positions, cos_sin, q_weight, k_weight, EPS, q_heads, k_heads)
            ends = (q_heads * head, (q_heads + k_heads) * head)
            parts = (before[:, : ends[0]], before[:, ends[0] : ends[1]])
            for one, part, weight, heads in zip(found, parts, (q_weight, k_weight), (q_heads, k_heads), strict=True):
                x = normed(part.view(tokens, heads, head), weight).float()
                a, b = x[..., : head // 2], x[..., head // 2 :]
                cos, sin = cos_sin[positions][:, None, : head // 2], cos_sin[positions][:, None, head // 2 :]
                turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).view(tokens, heads * head)
                # A difference of two larger numbers keeps their rounding.
                self.close(one, turned, BF16_STEP, absolute=4 * BF16_STEP)
            self.assertTrue(torch.equal(qkv, before))

    def test_a_graph_s_inputs(self) -> None:
        """Ids and positions with zeros to the size; ends of the texts, and the padding as the last segment."""
        for lengths, size, slots in (([3], 8, 4), ([5, 1, 7], 2112, 129), ([1200, 900], 2112, 129), ([2, 2], 4, 3)):
            for kind in (torch.int32, torch.int64):
                tokens = sum(lengths)
                ids = torch.randint(1, 150_000, (tokens,), device=DEVICE)
                positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
                out_ids, out_positions = (torch.full((size,), 9, device=DEVICE) for _ in range(2))
                offsets = torch.full((slots + 1,), 9, dtype=torch.int32, device=DEVICE)
                offsets[0] = 0
                of_texts = torch.tensor(lengths, dtype=kind, device=DEVICE)
                kernels.fill_inputs(ids, positions, of_texts, out_ids, out_positions, offsets)
                for found, given in ((out_ids, ids), (out_positions, positions)):
                    self.assertTrue(torch.equal(found[:tokens], given))
                    self.assertEqual(found[tokens:].abs().sum().item(), 0)
                ends = torch.tensor(lengths).cumsum(0).tolist()
                self.assertEqual(offsets.tolist(), [0, *ends, *[tokens] * (slots - len(ends) - 1), size])


if __name__ == "__main__":
    unittest.main(verbosity=2)
