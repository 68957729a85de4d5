"""The plugin's Triton kernels against plain torch. Run by the engine environment's python (see test_plugin.py).

On a GPU: `python tests/plugin_kernel_cases.py`, as compiled. Without one: TRITON_INTERPRET=1, which executes them
on the CPU and rounds bfloat16 its own way, hence a tolerance of one step of that type; the card's instructions are
those of card_instructions.py there.
"""
# ruff: noqa: PT009 - unittest: the engine environment has no pytest

from __future__ import annotations

import importlib.util
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from card_instructions import at_hand
from qwen3emb_engine_plugin.attention_kernel import LARGE, SMALL, Way, attend, way_of
from qwen3emb_engine_plugin.fp8_kernels import gate_quantise, gate_warps, quantise
from qwen3emb_engine_plugin.kernels import FP8, FP8_MAX, PADDING, fill_inputs, norm_quantise, norm_rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
BF16_STEP = 2**-7  # relative, of the worst place in a binade
FP8_STEP = 2**-3
TWO_ULPS = 2**-22  # of a float32, relative


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).bfloat16()


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).bfloat16()


def quantised_by_torch(values: torch.Tensor, smallest: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    largest = values.float().abs().amax(-1, keepdim=True).clamp_min(smallest)
    scales = largest / torch.full_like(largest, FP8_MAX)
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (values.float() * inverse).clamp(-FP8_MAX, FP8_MAX).to(FP8), scales


class Kernels(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.enterContext(at_hand())

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
        self.close(scales, values.abs().amax(-1, keepdim=True) / FP8_MAX, BF16_STEP)
        found = rows.float() * scales
        if DEVICE == "cpu":
            # Triton's interpreter does not carry into the exponent when float8 rounds up to a power of two.
            mantissa, _ = torch.frexp(values / scales)
            judged = (mantissa.abs() < 1 - 2**-4) & (mantissa.abs() > 0.5 + 2**-6)
            self.assertGreater(judged.float().mean().item(), 0.7)
            found, values = found[judged], values[judged]
        self.close(found, values, FP8_STEP, absolute=scales.max().item() * 2**-6)
        self.assertTrue((rows.float().abs().amax(-1) >= FP8_MAX * (1 - FP8_STEP)).all())

    def test_norm_and_quantisation(self) -> None:
        """With and without a residual, which is overwritten with the sum; widths that are no power of two too."""
        for tokens, width in ((3, 2560), (1, 1024), (2, 96)):
            hidden, weight = self.random(tokens, width), self.weight(width)
            self.quantised(normed(hidden, weight), *norm_quantise(hidden, None, weight, EPS))
            residual = self.random(tokens, width)
            summed = hidden.float() + residual.float()
            self.quantised(normed(summed, weight), *norm_quantise(hidden, residual, weight, EPS))
            self.close(residual, summed, BF16_STEP)

    def test_a_row_of_zeros_stays_zeros(self) -> None:
        """Padding rows of a graph: no division by zero, no NaN."""
        zeros = self.random(2, 128) * 0
        for rows, scales in (norm_quantise(zeros, None, self.weight(128), EPS), gate_quantise(zeros), quantise(zeros)):
            self.assertEqual(rows.float().abs().max().item(), 0.0)
            self.assertTrue(torch.isfinite(scales).all())

    def test_gating_and_quantisation(self) -> None:
        """silu(gate) * up, the gate first: far values on both sides, and up to gates where silu is 0."""
        for width in (9728, 12288, 3072, 96):
            gate_up = self.random(6, 2 * width)
            gate_up *= torch.tensor([[1e-6], [0.01], [1.0], [8.0], [40.0], [1e4]], device=DEVICE).bfloat16()
            rows, scales = gate_quantise(gate_up)
            self.quantised(gated(gate_up)[2:4], rows[2:4], scales[2:4])
            expected, expected_scales = quantised_by_torch(gated(gate_up), smallest=1e-10)
            self.close(scales / expected_scales, torch.ones_like(scales), BF16_STEP)
            # Not all: powers and sigmoids are approximate, and a last bit rounds another way.
            self.assertGreater((rows.float() == expected.float()).float().mean().item(), 0.99)

    def test_rows_are_the_same_whatever_the_warps(self) -> None:
        """To the bit: each value is computed by itself, and a row's largest is exact in any order."""
        for width in (9728, 3072, 96):
            gate_up, values = self.random(3, 2 * width) * 4, self.random(3, width)
            for warps in (2, 8, 16):
                self.same(gate_quantise(gate_up, warps), gate_quantise(gate_up))
                self.same(quantise(values, warps), quantise(values))

    def test_few_rows_have_twice_the_warps(self) -> None:
        """Up to a row a multiprocessor of Hopper's."""
        for width, few, many in ((3072, 8, 4), (9728, 16, 8), (12288, 16, 8)):
            self.assertEqual([gate_warps(rows, width) for rows in (1, 132, 133, 16384)], [few, few, many, many])

    def test_quantised_rows_are_sglang_s(self) -> None:
        """To the bit, where its kernel is; elsewhere its arithmetic. Rows of zeros too."""
        for width in (2048, 4096, 96):
            values = self.random(2200 if DEVICE == "cuda" else 5, width) * 3
            values[1] = 0
            rows, scales = quantise(values)
            self.quantised(values[2:], rows[2:], scales[2:])
            expected, expected_scales = quantised_by_torch(values)
            if DEVICE == "cuda":
                from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_quant_fp8

                self.same((rows, scales), sglang_per_token_quant_fp8(values))
                self.close(scales, expected_scales, TWO_ULPS)  # a product by 1/448 there
            else:
                self.same((rows, scales), (expected, expected_scales))

    def same(self, found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Float8 rows and their scales, to the bit."""
        self.assertEqual([x.shape for x in found], [x.shape for x in expected])
        self.assertTrue(torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)))
        self.assertTrue(torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32)))

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
            found = norm_rotate(qkv, positions, cos_sin, q_weight, k_weight, EPS, q_heads, k_heads)
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

    def test_attention_by_positions(self) -> None:
        """Against torch's own, text by text: shorter and longer than a tile, many in one, all the official groups."""
        many = [1, 2, 3, 40, 1, 100, 7, 64, 1, 1, 31]
        batches = [([33], 8, 2), (many, 8, 2), ([70] * 2, 16, 8), ([5] * 9 + [160], 4, 4)]
        if DEVICE == "cuda":  # minutes in the interpreter; and only there are reads of keys under way at once
            batches += [([17, 1056, 3], 32, 8), ([33] * 128, 32, 8), ([9, 2112], 16, 8), ([1] * 129, 16, 8)]
        for lengths, q_heads, k_heads in batches:
            rows, q_width, k_width = sum(lengths), q_heads * 128, k_heads * 128
            qkv = torch.randn(rows, q_width + 2 * k_width, device=DEVICE).bfloat16()
            q, k, v = qkv.split([q_width, k_width, k_width], 1)
            k, v = k.contiguous().view(rows, k_heads, 128), v.view(rows, k_heads, 128)
            positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
            expected = torch.cat(
                [
                    torch.nn.functional.scaled_dot_product_attention(
                        *(text.float().transpose(0, 1) for text in texts), is_causal=True, scale=0.1, enable_gqa=True
                    ).transpose(0, 1)
                    for texts in zip(*(of.split(lengths) for of in (q.reshape(rows, q_heads, 128), k, v)), strict=True)
                ]
            ).flatten(1)
            for way in (None, SMALL, LARGE):
                out = torch.full((rows, q_width), torch.nan, dtype=torch.bfloat16, device=DEVICE)
                attend(q.contiguous(), k, v, positions, out, 0.1, q_heads, k_heads, way)
                self.close(out, expected, BF16_STEP, absolute=0.02)
                # By their length too: answers of a long text are small, and keys left out would change them by less.
                rows_off = (out.view(-1, 128).float() - expected.view(-1, 128)).norm(dim=-1)
                self.assertLess((rows_off / expected.view(-1, 128).norm(dim=-1)).max().item(), 0.02)

    def test_small_tiles_until_large_ones_fill_the_card(self) -> None:
        """Of the 4B's four queries a key head to 512 rows, of the 0.6B's two to twice as many."""
        for rows, group, expected in (
            (33, 4, SMALL), (512, 4, SMALL), (528, 4, LARGE), (4224, 4, LARGE), (1024, 2, SMALL), (1056, 2, LARGE)
        ):  # fmt: skip
            self.assertEqual(way_of(rows, group, 8), expected)

    def test_a_text_s_bits_are_the_same_wherever_it_lies(self) -> None:
        """Alone and among others, at the beginning of a tile and in its middle, in small tiles and in large ones."""
        q, k, v = (torch.randn(200, heads * 128, device=DEVICE).bfloat16() for heads in (8, 2, 2))
        k, v = k.view(-1, 2, 128), v.view(-1, 2, 128)

        def attended(rows: torch.Tensor, lengths: list[int], way: Way) -> torch.Tensor:
            positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
            out = torch.empty(q[rows].shape, device=DEVICE)  # float32: bfloat16 would hide most of what differs
            attend(q[rows], k[rows], v[rows], positions, out, 0.1, 8, 2, way)
            return out

        for length in (33, 70):
            text, others = torch.arange(length), torch.arange(length, 200)
            alone = attended(text, [length], SMALL)
            for way in (SMALL, LARGE):
                for before in ([], [5, 1, 7], [16], [45], [59], [90]):
                    rows = torch.cat([others[: sum(before)], text, others[-20:]])
                    found = attended(rows, [*before, length, 3, 17], way)
                    self.assertTrue(torch.equal(found[sum(before) :][:length], alone), f"{before} {way}")

    def test_padding_does_not_reach_a_text(self) -> None:
        """Rows after the last text: at place 0, as the runner fills them, or with what an earlier batch has left."""
        q, k, v = (torch.randn(40, 2 * 128, device=DEVICE).bfloat16() for _ in range(3))
        found = []
        for left in (torch.zeros(7), torch.arange(33, 40), torch.full((7,), 900)):
            positions = torch.cat([torch.arange(33), left.long()]).to(DEVICE)
            out = torch.empty_like(q)
            attend(q, k.view(40, 2, 128), v.view(40, 2, 128), positions, out, 0.1, 2, 2)
            self.assertTrue(out.isfinite().all())
            found.append(out[:33])
        self.assertTrue(torch.equal(found[0], found[1]))
        self.assertTrue(torch.equal(found[0], found[2]))

    def test_the_benchmark_sees_keys_left_out(self) -> None:
        """Of a long text, whose answers are means of many values: 64 keys of 4,000 change them by 0.01."""
        folder = Path(__file__).parents[1] / "benchmarks" / "gpu"
        spec = importlib.util.spec_from_file_location("attention_benchmark", folder / "attention.py")
        assert spec is not None
        assert spec.loader is not None
        benchmark = importlib.util.module_from_spec(spec)
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            spec.loader.exec_module(benchmark)
        q, k, v = (self.random(4000, 1, 128) for _ in range(3))
        q, k, v = q[-8:].float(), k.float(), v.float()

        def attention(left_out: int) -> Any:
            shares = (q[:, 0] @ k[left_out:, 0].T / 128**0.5).softmax(-1)
            return lambda _: (shares.bfloat16().float() @ v[left_out:, 0]).bfloat16()

        ways = {"graph": attention(0), "same": attention(0), "other": attention(64)}
        with mock.patch.object(torch.cuda, "synchronize"):
            said = benchmark.differing(torch, ways, benchmark.Buffers(q, k, v))
        self.assertEqual(list(said), ["other"])

    def test_a_graph_s_inputs(self) -> None:
        """Ids with zeros to the size, positions with short texts; the texts' ends, and the padding as one segment."""
        for lengths, size, slots in (([3], 8, 4), ([5, 1, 7], 2112, 129), ([1200, 900], 2112, 129), ([2, 2], 4, 3)):
            for kind in (torch.int32, torch.int64):
                tokens = sum(lengths)
                ids = torch.randint(1, 150_000, (tokens,), device=DEVICE)
                positions = torch.randint(0, 4096, (tokens,), device=DEVICE)
                out_ids, out_positions = (torch.full((size,), 9, device=DEVICE) for _ in range(2))
                offsets = torch.full((slots + 1,), 9, dtype=torch.int32, device=DEVICE)
                offsets[0] = 0
                of_texts = torch.tensor(lengths, dtype=kind, device=DEVICE)
                fill_inputs(ids, positions, of_texts, out_ids, out_positions, offsets)
                padding = torch.arange(size - tokens, device=DEVICE)
                self.assertTrue(torch.equal(out_ids, torch.cat([ids, 0 * padding])))
                self.assertTrue(torch.equal(out_positions, torch.cat([positions, padding % PADDING])))
                ends = torch.tensor(lengths).cumsum(0).tolist()
                self.assertEqual(offsets.tolist(), [0, *ends, *[tokens] * (slots - len(ends) - 1), size])


if __name__ == "__main__":
    unittest.main(verbosity=2)
