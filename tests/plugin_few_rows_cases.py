"""Products of few rows: the kernel against float64, its tables, and the hooks around it.

Run by the engine environment's python (see test_plugin.py). Without a GPU: TRITON_INTERPRET=1, with the products and
instructions of card_instructions.py; programs run one after the other there.
"""
# ruff: noqa: PT009, PT027 - unittest: the engine environment has no pytest

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import unittest
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from card_instructions import at_hand
from qwen3emb_engine_plugin import few_rows
from qwen3emb_engine_plugin import few_rows_kernels as kernels
from qwen3emb_engine_plugin.few_rows_kernels import Config, choice, product
from sglang.srt.plugins.hook_registry import HookRegistry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2**-8 if DEVICE == "cuda" else 2**-7  # relative, the worst; the interpreter cuts off what it should round
N, K = 128, 384
USUAL = Config(64, 64, 2, 3, 4)


fetched: list[int] = []  # addresses that the interpreter was asked to have in the L2 cache


def fetch(asm: str, _: str, operands: list[Any], dtype: tl.dtype, is_pure: bool, pack: int) -> Any:
    """The prefetch, which the interpreter lacks."""
    from triton.runtime.interpreter import TensorHandle

    assert "prefetch.L2" in asm
    assert not is_pure
    addresses, wanted = (x.handle.data for x in operands)
    fetched.extend(addresses[wanted != 0].tolist())
    return tl.tensor(TensorHandle(np.zeros_like(wanted), dtype), tl.block_type(dtype, list(wanted.shape)))


@contextmanager
def table_of(entries: list[dict[str, Any]]) -> Iterator[None]:
    """A measured table instead of what was reckoned."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "table.json"
        path.write_text(json.dumps({"products": entries}))
        kernels.table.cache_clear()
        try:
            with mock.patch.dict(os.environ, {kernels.TABLE: str(path)}):
                yield
        finally:
            kernels.table.cache_clear()


def entry(rows: int, config: Config | None = USUAL, n: int = N, k: int = K) -> dict[str, Any]:
    return {"n": n, "k": k, "rows": rows, "config": config and config._asdict()}


class Products(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.enterContext(at_hand(fetch))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    def right(self, x: torch.Tensor, weight: torch.Tensor, config: Config) -> torch.Tensor:
        """The product, once it is near float64's and no program is left to be counted."""
        found = product(x, weight, config)
        expected = torch.nn.functional.linear(x.double(), weight.double())
        off = (found.double() - expected).abs() - ROUNDING * expected.abs()
        self.assertLess(off.max().item(), 1e-4 * K**0.5, (x.shape, config))
        _, arrived = kernels.scratch(x.device, 0, 0)
        self.assertEqual(arrived.abs().sum().item(), 0)
        return found

    def test_ragged_rows_and_all_splits(self) -> None:
        """Tiles of one and of two kinds, full and not; parts of the same length and not; copied both ways."""
        weight = self.random(N, K)
        for rows in (1, 16, 17, 36, 50, 68, 100, 132, 144):
            x = self.random(rows, K)
            for split, tma in ((1, False), (1, True), (2, False), (3, True), (4, False), (5, False), (6, True)):
                self.right(x, weight, Config(64, 64, split, 3, 8, tma))

    def test_every_block(self) -> None:
        x, weight = self.random(36, K), self.random(256, K)
        for block_n in (64, 128, 256):
            for block_k in (64, 128):
                self.right(x, weight, Config(block_n, block_k, 3, 2, 8))

    def test_a_row_is_the_same_whatever_lies_beside_it(self) -> None:
        """To the bit: at another place, among others, alone; and at every call."""
        x, weight, config = self.random(36, K), self.random(N, K), Config(64, 64, 3, 3, 4)
        found = self.right(x, weight, config)
        self.assertTrue(torch.equal(product(x, weight, config), found))
        self.assertTrue(torch.equal(product(x.flip(0), weight, config), found.flip(0)))
        other = self.random(36, K)
        other[7] = x[30]
        self.assertTrue(torch.equal(product(other, weight, config)[7], found[30]))

    def test_rows_past_the_last_are_not_read(self) -> None:
        """What lies behind them may be anything."""
        memory, weight = self.random(40, K), self.random(N, K)
        memory[36:] = float("nan")
        self.right(memory[:36], weight, Config(64, 64, 3, 3, 4))

    def test_what_is_asked_for_ahead(self) -> None:
        """Each kilobyte of the next weight once, up to the size or the weight's end; the product is the same."""
        x, weight, following = self.random(20, K), self.random(N, K), self.random(N, 2 * K)
        for config in (Config(64, 64, 3, 3, 4), Config(128, 64, 1, 3, 8)):
            for size, kilobytes in ((0, 0), (5000, 4), (100_000, 97), (10**9, N * 2 * K * 2 // 1024)):
                fetched.clear()
                found = product(x, weight, config, following, size)
                self.assertTrue(torch.equal(found, product(x, weight, config)))
                if DEVICE == "cpu":
                    at = [(one - following.data_ptr()) // 1024 for one in fetched]
                    self.assertEqual(sorted(at), list(range(kilobytes)))

    def test_products_that_follow_share_the_scratch(self) -> None:
        """Of other sizes: it grows, and what a graph has seen of it stays."""
        with mock.patch.dict(kernels._scratch, clear=True):
            for rows, n, split in ((4, 64, 2), (36, N, 6), (4, 64, 3)):
                self.right(self.random(rows, K), self.random(n, K), Config(64, 64, split, 3, 4))
            (made,) = kernels._scratch.values()
            self.assertEqual([len(partial) for partial, _ in made], [2 * 4 * 64, 6 * 36 * N])

    def test_no_room_is_made_in_a_capture(self) -> None:
        with (
            mock.patch.dict(kernels._scratch, clear=True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
            self.assertRaises(RuntimeError),
        ):
            kernels.scratch(torch.device("cuda"), 100, 4)


class Tables(unittest.TestCase):
    def test_the_official_shapes_have_a_guess_for_most_graphs(self) -> None:
        """One that fits a multiprocessor; the widest weights with many rows, more rows, and others are torch's."""
        for shapes in kernels.SHAPES.values():
            for n, k in shapes:
                for rows in (1, 4, 8, 16, 24, 36, 48, 68, 100, 132):
                    config = choice(n, k, rows)
                    if config is None:
                        self.assertTrue(n > 3 * k and rows >= 100, (n, k, rows))
                    else:
                        self.assertTrue(kernels.fits(n, k, rows, config))
                        self.assertGreaterEqual(config.stages, 3)
                self.assertIsNone(choice(n, k, 145))
        self.assertIsNone(choice(2560, 2560, 4))

    def test_candidates_are_a_few_dozen_that_fit(self) -> None:
        for n, k in kernels.SHAPES["4b"]:
            for rows in (4, 36, 132):
                tried = kernels.candidates(n, k, rows)
                self.assertTrue(10 <= len(set(tried)) <= 60, len(tried))
                self.assertTrue(all(kernels.fits(n, k, rows, config) for config in tried))

    def test_a_measured_table_takes_the_place_of_guesses(self) -> None:
        """For rows up to those that were measured; where torch was faster, it stays."""
        with table_of([entry(36), entry(16, None), entry(68, Config(64, 128, 3, 2, 8, True))]):
            self.assertEqual([choice(N, K, rows) for rows in (4, 16, 69)], [None] * 3)
            self.assertEqual({choice(N, K, rows) for rows in (17, 36)}, {Config(64, 64, 2, 3, 4)})
            self.assertEqual(choice(N, K, 37), Config(64, 128, 3, 2, 8, True))
            self.assertIsNone(choice(6144, 2560, 36))
            with self.assertRaises(ValueError):
                product(torch.zeros((4, K)), torch.zeros((N, K)))

    def test_a_table_that_the_kernel_cannot_do_is_refused(self) -> None:
        """Too many stages, a weight that is no multiple, more parts than blocks, more rows than tiles."""
        for bad in (
            entry(36, Config(64, 64, 2, 40, 4)), entry(36, n=100), entry(36, k=100), entry(145),
            entry(36, Config(64, 64, 7, 3, 4)), entry(36, Config(96, 64, 1, 3, 4)),
            entry(132, Config(128, 64, 1, 3, 4)),
        ):  # fmt: skip
            with table_of([bad]), self.assertRaises(ValueError):
                kernels.table()


def benchmark() -> Any:
    path = Path(__file__).resolve().parents[1] / "benchmarks/gpu/few_rows.py"
    spec = importlib.util.spec_from_file_location("few_rows_benchmark", path)
    assert spec
    assert spec.loader
    module = sys.modules["few_rows_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Benchmark(unittest.TestCase):
    """A kernel that goes astray spoils its process's card, and nothing else."""

    def test_another_process_goes_on_without_the_one_it_died_of(self) -> None:
        """Also of the work that comes later; what was measured is not measured again."""
        tried = {piece: ["good", "bad", "other"] for piece in ("a", "b", "c")}
        starts: list[list[str]] = []

        def start(work: list[str], of: dict[str, list[str]]) -> Iterator[tuple[Any, Any]]:
            starts.append(list(work))
            for piece in list(work):
                yield None, None
                for config in of[piece]:
                    yield None, config
                    if config == "bad" and piece == "b":
                        return
                yield {"entry": piece}, None

        found = list(benchmark().survived(start, ["a", "b", "c"], tried))
        self.assertEqual(found, [(piece, {"entry": piece}) for piece in ("a", "b", "c")])
        self.assertEqual(starts, [["a", "b", "c"], ["b", "c"]])
        self.assertEqual(tried["b"], ["good", "other"])
        self.assertEqual(tried["c"], ["good", "other"])

    def test_a_card_that_fails_at_torch_s_product_ends_it(self) -> None:
        for said in ([], [(None, None)]):
            with self.assertRaises(SystemExit):
                list(benchmark().survived(lambda *_, said=said: iter(said), ["a"], {"a": ["good"]}))

    def test_a_compiler_that_dies_leaves_the_others_to_be_compiled(self) -> None:
        """Those it was beside are compiled when they are launched."""
        module, configs = benchmark(), kernels.candidates(6144, 2560, 36)
        pools: list[int] = []

        class Pool:
            def __init__(self, processes: int, **_: Any) -> None:
                self.broken = False
                pools.append(processes)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def submit(self, _: Any, wanted: tuple[int, Config]) -> Future[str | None]:
                future: Future[str | None] = Future()
                self.broken = self.broken or wanted[1] == configs[5]
                if self.broken:
                    future.set_exception(BrokenProcessPool())
                else:
                    future.set_result("no" if wanted[1] == configs[9] else None)
                return future

        with mock.patch.object(module, "ProcessPoolExecutor", Pool):
            failed = module.compile_all([(36, config) for config in configs], 2)
        self.assertEqual(failed, {(36, configs[9])})
        self.assertEqual(pools, [2, 2])

    def test_a_process_whose_card_is_spoilt_ends(self) -> None:
        """At once. After any other error it goes on."""

        def broken() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        module = benchmark()
        for synchronize, ends in ((broken, 1), (lambda: None, 0)):
            with mock.patch.object(os, "_exit") as ended:
                module.end_if_spoilt(SimpleNamespace(cuda=SimpleNamespace(synchronize=synchronize)))
            self.assertEqual(ended.call_count, ends)


class UnquantizedLinearMethod:
    def apply(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


def linear(kind: str, **changes: Any) -> Any:
    weight = torch.randn((N, K), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3)).bfloat16()
    given = {"weight": weight, "quant_method": UnquantizedLinearMethod(), "bias": None, "tp_size": 1}
    return type(kind, (SimpleNamespace,), {})(**given | changes)


class Hooks(unittest.TestCase):
    """Products are ours in the capture of a graph that was proved, and torch's everywhere else."""

    def setUp(self) -> None:
        self.enterContext(at_hand(fetch))
        self.enterContext(table_of([entry(16), entry(36), entry(68, None)]))
        self.layers = [
            SimpleNamespace(
                self_attn=SimpleNamespace(qkv_proj=linear("QKVParallelLinear"), o_proj=linear("RowParallelLinear")),
                mlp=SimpleNamespace(
                    gate_up_proj=linear("MergedColumnParallelLinear"), down_proj=linear("RowParallelLinear")
                ),
            )
            for _ in range(2)
        ]
        self.model = SimpleNamespace(model=SimpleNamespace(layers=self.layers))
        self.products = few_rows.FewRows()
        self.ours: list[int] = []

        self.ahead: list[tuple[Any, ...]] = []

        def counted(x: torch.Tensor, weight: torch.Tensor, config: Config | None = None, *ahead: Any) -> torch.Tensor:
            self.ours.append(len(x))
            self.ahead.append(ahead)
            return product(x, weight, config, *ahead)

        self.enterContext(mock.patch.object(kernels, "product", counted))

    def call(self, one: Any, rows: int, bias: Any = None) -> torch.Tensor:
        x = torch.randn((rows, K), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(5)).bfloat16()
        method = one.quant_method
        found: torch.Tensor = self.products.apply(UnquantizedLinearMethod.apply, method, one, x, bias)
        cosine = torch.nn.functional.cosine_similarity(found.float(), method.apply(one, x, bias).float(), dim=-1)
        self.assertGreater(cosine.min().item(), 0.9999)
        return found

    def captured(self, size: int, rows: int | None = None, full: bool = True, **more: Any) -> list[int]:
        """The rows of our products while a graph of `size` is captured."""
        self.ours.clear()
        runner = SimpleNamespace(_is_full_backend=full)
        one = more.pop("one", self.layers[1].mlp.down_proj)
        self.products.capture(lambda _, __: self.call(one, rows or size, **more), runner, size)
        return list(self.ours)

    def test_in_a_graph_of_few_rows(self) -> None:
        """Of those sizes alone that the table has and the proof has seen."""
        self.assertEqual(self.captured(36), [])
        self.assertIsNone(self.products.prove(self.model, [4, 36, 68, 100]))
        self.assertEqual(self.products.sizes, {4, 36})
        for size, ours in ((36, [36]), (4, [4]), (8, []), (68, []), (100, [])):
            self.assertEqual(self.captured(size), ours)
        self.ours.clear()
        self.call(self.layers[0].self_attn.o_proj, 36)  # outside
        self.assertEqual(self.ours, [])

    def test_each_asks_for_the_next_one_s_weight(self) -> None:
        """The layer's, then the next layer's, and the last for none; without the setting nothing."""
        self.assertIsNone(self.products.prove(self.model, [36]))
        self.assertEqual([one._qwen3emb_ahead for one in few_rows._linears(self.layers[0])], [()] * 4)
        self.products = few_rows.FewRows(16_000_000)
        self.assertIsNone(self.products.prove(self.model, [36]))
        flat = [one for layer in self.layers for one in few_rows._linears(layer)]
        for one, following in zip(flat, [*flat[1:], None], strict=True):
            self.captured(36, one=one)
            expected = () if following is None else (following.weight, 16_000_000)
            self.assertEqual(len(self.ahead[-1]), len(expected))
            self.assertTrue(all(a is b for a, b in zip(self.ahead[-1], expected, strict=True)))

    def test_what_else_is_captured_stays_torch_s(self) -> None:
        """Other rows, a bias, a layer that is none of the model's, another kind of graph; an error ends it."""
        self.assertIsNone(self.products.prove(self.model, [36]))
        bias = torch.ones(N, device=DEVICE).bfloat16()
        self.assertEqual(self.captured(36, rows=5), [])
        self.assertEqual(self.captured(36, bias=bias), [])
        self.assertEqual(self.captured(36, one=linear("RowParallelLinear")), [])
        self.assertEqual(self.captured(36, full=False), [])
        with self.assertRaises(ZeroDivisionError):
            self.products.capture(lambda *_: 1 / 0, SimpleNamespace(_is_full_backend=True), 36)
        self.ours.clear()
        self.call(self.layers[1].mlp.down_proj, 36)
        self.assertEqual(self.ours, [])

    def test_one_that_is_wrong_or_fails_is_not_used(self) -> None:
        """A block left out, NaN, an error of the compiler, another result each time: the reason is told."""
        blocked = lambda x, w, *_: torch.nn.functional.linear(x[:, 64:], w[:, 64:])  # noqa: E731
        nothing = lambda x, w, *_: torch.full((len(x), N), float("nan"), device=DEVICE)  # noqa: E731
        flaky = iter((1.0, 1.002) * 8)
        wandering = lambda x, w, *_: (torch.nn.functional.linear(x, w).float() * next(flaky)).bfloat16()  # noqa: E731
        for wrong, reason in (
            (blocked, "36 rows of 384, weight of 128"),
            (nothing, "not the product's"),
            (wandering, "two results"),
            (None, "TypeError"),
        ):
            with mock.patch.object(kernels, "product", wrong):
                self.assertIn(reason, self.products.prove(self.model, [4, 36]) or "")
            self.assertEqual(self.captured(36), [])

    def test_a_right_one_is_used_whatever_torch_s_rounds(self) -> None:
        """cuBLAS may add up the parts of a long weight in bfloat16, as torch lets it unless told otherwise."""
        linear = torch.nn.functional.linear

        def parted(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
            if x.dtype != torch.bfloat16:
                return linear(x, weight, bias)
            half = x.shape[1] // 2
            return linear(x[:, :half], weight[:, :half]) + linear(x[:, half:], weight[:, half:])

        with mock.patch.object(torch.nn.functional, "linear", parted):
            self.assertIsNone(self.products.prove(self.model, [4, 36]))

    def test_other_layers_are_left_alone(self) -> None:
        """In any layer: several cards, quantised, another type or place, a bias, an adapter's wrapper."""
        float32 = torch.zeros((N, K), device=DEVICE)
        between = torch.zeros(1 + N * K, device=DEVICE).bfloat16()[1:].view(N, K)
        for other in (
            linear("RowParallelLinear", tp_size=2), linear("RowParallelLinear", quant_method=object()),
            linear("RowParallelLinear", weight=float32), linear("RowParallelLinear", bias=float32[0]),
            linear("RowParallelLinearWithLoRA"), linear("RowParallelLinear", weight=float32.bfloat16().t()),
            linear("RowParallelLinear", weight=between),
        ):  # fmt: skip
            with mock.patch.object(self.layers[1].mlp, "down_proj", other):
                self.assertIn("not the official", self.products.prove(self.model, [36]) or "")
        self.assertIn("no product", self.products.prove(self.model, [68, 100]) or "")
        self.assertIsNone(self.products.prove(self.model, [36]))

    def test_servers_that_have_such_graphs(self) -> None:
        """Embeddings, bfloat16, whole passes."""

        def arguments(backend: str = "full", **changes: Any) -> Any:
            prefill = SimpleNamespace(backend=backend, bs=[4, 36, 132, 200])
            given = {"is_embedding": True, "quantization": None, "cuda_graph_config": SimpleNamespace(prefill=prefill)}
            return SimpleNamespace(**given | changes)

        self.assertEqual(few_rows.graph_sizes(arguments()), [4, 36, 132])
        for other in (
            arguments("breakable"), arguments(is_embedding=False), arguments(quantization="fp8"),
            arguments(cuda_graph_config=None), arguments(torchao_config="int8wo"),
        ):  # fmt: skip
            self.assertEqual(few_rows.graph_sizes(other), [])

    def test_the_hooks_find_this_engine(self) -> None:
        """Their places exist in the SGLang installed here, with the parameters and lines they were written for."""
        self.addCleanup(HookRegistry.reset)
        with mock.patch.object(few_rows, "_no_gpu_or_version", return_value=None):
            self.assertIsNone(few_rows.few_rows())
        self.assertEqual(len(HookRegistry._hooks), 3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
