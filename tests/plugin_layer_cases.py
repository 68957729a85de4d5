"""The plugin's own ways through a layer, on layers made to measure.

Run by the engine environment's python (see test_plugin.py).
"""
# ruff: noqa: PT009, PT027 - unittest: the engine environment has no pytest

from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from card_instructions import at_hand
from qwen3emb_engine_plugin import attention_kernel, gated, graph_attention, graph_last_layer, last_layer, layer
from sglang.srt.plugins.hook_registry import HookRegistry

INNER, WIDTH = 48, 32


class Attention(unittest.TestCase):
    """Our kernel while a graph is captured, FlashAttention in every other pass and for every other layer."""

    def setUp(self) -> None:
        self.metadata = object()
        self.backend = SimpleNamespace(
            fa_skip_kv_cache=True, full_cg_prefill_metadata=self.metadata, forward_metadata=self.metadata
        )
        self.layer = SimpleNamespace(
            head_dim=128, qk_head_dim=128, v_head_dim=128, tp_q_head_num=4, tp_k_head_num=2, tp_v_head_num=2,
            scaling=0.1, sliding_window_size=-1, logit_cap=0.0, is_cross_attention=False,
            attn_type=SimpleNamespace(value="decoder"),
        )  # fmt: skip
        qkv = torch.randn(6, 8 * 128).bfloat16()
        self.q, self.k = qkv[:, : 4 * 128].contiguous(), qkv[:, 4 * 128 : 6 * 128].contiguous().view(6, 2, 128)
        self.v = qkv[:, 6 * 128 :].view(6, 2, 128)
        self.batch = SimpleNamespace(positions=torch.tensor([0, 1, 2, 0, 0, 1]), extend_seq_lens_cpu=[3, 1, 2])
        self.given: list[tuple[Any, ...]] = []
        self.enterContext(mock.patch.object(attention_kernel, "attend", lambda *given: self.given.append(given)))
        self.attending = graph_attention.Attending()

    def attended(self, **more: Any) -> Any:
        stock: Any = lambda *_, **__: "stock"  # noqa: E731
        return self.attending(stock, self.backend, self.q, self.k, self.v, self.layer, self.batch, **more)

    def test_a_captured_pass_is_ours(self) -> None:
        """Into a tensor of its own, or where SGLang's operator of a captured pass wants it."""
        out = self.attended(save_kv_cache=True)
        self.assertEqual(out.shape, self.q.shape)
        ((q, k, v, positions, into, *rest),) = self.given
        self.assertTrue(torch.equal(q, self.q))
        self.assertIs(into, out)
        self.assertIs(positions, self.batch.positions)
        self.assertEqual(rest, [0.1, 4, 2])
        self.assertEqual((k.stride(0), v.stride(0)), (256, 1024))
        self.batch._attn_output = torch.empty(6, 4, 128).bfloat16()
        self.assertEqual(self.attended().data_ptr(), self.batch._attn_output.data_ptr())

    def test_a_live_pass_and_a_cache_are_flash_attention_s(self) -> None:
        """A live pass has brought metadata of its own; with a cache, keys are not those of this batch alone."""
        for name, value in (
            ("forward_metadata", object()), ("full_cg_prefill_metadata", None), ("fa_skip_kv_cache", False)
        ):  # fmt: skip
            with self.subTest(name), mock.patch.object(self.backend, name, value):
                self.assertEqual(self.attended(), "stock")
        self.assertFalse(self.attending.ours)

    def test_another_layer_is_flash_attention_s(self) -> None:
        """Windows, caps, sinks, other shapes and types: what the kernel does not know."""
        others: list[tuple[Any, str, Any]] = [
            (self.layer, "sliding_window_size", 511), (self.layer, "logit_cap", 30.0), (self.layer, "head_dim", 64),
            (self.layer, "tp_q_head_num", 6), (self.layer, "is_cross_attention", True),
            (self.layer, "attn_type", SimpleNamespace(value="encoder_only")),
            (self.batch, "positions", torch.zeros(3, 6)), (self.batch, "positions", None),
            (self, "q", self.q.float()), (self, "k", self.k.transpose(0, 1).contiguous().transpose(0, 1)),
            (self, "v", self.v[:4]),
        ]  # fmt: skip
        for of, name, value in others:
            attending = graph_attention.Attending()  # each says once that it stands aside
            with (
                self.subTest(name), mock.patch.object(of, name, value), mock.patch.object(self, "attending", attending),
                self.assertLogs(graph_attention.logger, "WARNING") as said,
            ):  # fmt: skip
                self.assertEqual([self.attended(), self.attended()], ["stock"] * 2)
            self.assertEqual(len(said.output), 1)
        self.assertEqual(self.attended(sinks=torch.ones(1)), "stock")
        self.batch._attn_output = torch.empty(3, 512).bfloat16()
        self.assertEqual(self.attended(), "stock")
        self.assertFalse(self.given)

    def test_a_long_text_is_for_a_live_pass(self) -> None:
        """Where graphs are ours; what cannot run as one anyway stays so, and what is computed before it is launched."""
        runner: Any = SimpleNamespace(_is_full_backend=True, model_runner=SimpleNamespace(attn_backend=self.backend))
        long = SimpleNamespace(extend_seq_lens_cpu=[3, graph_attention.LONGEST + 1])
        self.assertTrue(self.attending.short_enough(True, runner, long))
        self.attended()
        self.assertFalse(self.attending.short_enough(True, runner, long))
        self.assertTrue(self.attending.short_enough(True, runner, self.batch))
        self.assertTrue(self.attending.short_enough(True, runner, SimpleNamespace(extend_seq_lens_cpu=[2112, 33])))
        self.assertFalse(self.attending.short_enough(False, runner, self.batch))


class Pooled(unittest.TestCase):
    """The last layer ends with the pooled rows in a live pass, and only there."""

    def setUp(self) -> None:
        self.products: list[tuple[int, ...]] = []

        def o_proj(x: torch.Tensor) -> tuple[torch.Tensor, None]:
            self.products.append(tuple(x.shape))
            return 2 * x, None

        communicator = SimpleNamespace(
            prepare_attn=lambda hidden, residual, batch: (hidden, hidden if residual is None else hidden + residual),
            prepare_mlp=lambda hidden, residual, batch: (hidden + residual, hidden + residual),
            postprocess_layer=lambda hidden, residual, batch: (hidden, residual),
        )
        attention = SimpleNamespace(
            forward_prepare_native=lambda positions, hidden_states: (hidden_states,) * 3,
            attn=lambda q, k, v, batch, save_kv_cache: q.cumsum(dim=0),
            o_proj=o_proj,
        )
        self.layer = SimpleNamespace(
            layer_communicator=communicator, self_attn=attention, mlp=lambda x, forward_batch: x * x, forward=None
        )
        self.layer.forward = self.whole
        pooler = SimpleNamespace(forward=lambda hidden, batch: hidden[batch.extend_seq_lens.cumsum(dim=0) - 1])
        self.model = SimpleNamespace(model=SimpleNamespace(layers=[None, self.layer]), pooler=pooler)
        self.last = last_layer.LastLayer(self.model, fp8_layer=False)
        self.batch = SimpleNamespace(extend_seq_lens=torch.tensor([3, 1, 4]))
        self.rows = torch.arange(8.0 * 5).view(8, 5)

    def whole(self, positions: Any, hidden: Any, batch: Any, residual: Any) -> Any:
        communicator, attention = self.layer.layer_communicator, self.layer.self_attn
        hidden, residual = communicator.prepare_attn(hidden, residual, batch)
        hidden, _ = attention.o_proj(attention.attn(hidden, hidden, hidden, batch, save_kv_cache=True))
        hidden, residual = communicator.prepare_mlp(hidden, residual, batch)
        return self.layer.mlp(hidden, forward_batch=batch), residual

    def ends_with(self, residual: Any) -> torch.Tensor:
        """What the pooler gets to see of a pass, as SGLang adds and pools it."""
        hidden, left = self.layer.forward(None, self.rows, self.batch, residual)
        return self.model.pooler.forward(hidden + left, self.batch)

    def test_three_texts_are_three_rows_and_the_same_vectors(self) -> None:
        """With a residual and, as in a model of one layer, without."""
        for residual in (None, self.rows.flip(0)):
            expected = self.ends_with(residual)
            self.last.live = True
            found = self.ends_with(residual)
            self.last.live, self.last.picked = False, None
            self.assertTrue(torch.equal(found, expected))
            self.assertEqual(self.products[-2:], [(8, 5), (3, 5)])

    def test_a_pass_that_is_captured_keeps_all_rows(self) -> None:
        """Not live: the graph's output has a row a token, and the pooler picks from it."""
        self.ends_with(None)
        self.assertEqual(self.products, [(8, 5)])

    def test_a_graph_ends_with_a_row_for_each_of_its_places(self) -> None:
        """Captured for none in particular; replayed for three texts and the padding, the pooler finds theirs."""
        offsets = torch.zeros(6, dtype=torch.int32)  # five places, the last of them the padding's
        backend = SimpleNamespace(
            fa_skip_kv_cache=True, full_cg_prefill_metadata=SimpleNamespace(cu_seqlens_q=offsets)
        )  # fmt: skip
        runner = SimpleNamespace(
            _is_full_backend=True, model_runner=SimpleNamespace(attn_backend=backend, _qwen3emb_last=self.last)
        )
        graphs = graph_last_layer.Graphs()

        def forward(runner: Any, batch: Any, tokens: int) -> Any:
            hidden, left = self.layer.forward(None, self.rows, self.batch, None)
            return hidden + left

        def execute(runner: Any, batch: Any, static: Any, size: int, tokens: int) -> Any:
            replayed = graphs.capture(forward, runner, static, size) if size not in graphs.picking else again()
            return self.model.pooler.forward(replayed[:tokens], batch)

        def again() -> Any:  # what a replay does: the same once more, with what lies in the graph's places by now
            offsets[1:] = torch.tensor([3, 4, 7, 7, 8])
            return graphs.capture(forward, runner, self.batch, 8)

        batch = SimpleNamespace(extend_seq_lens=torch.tensor([3, 1, 3]))
        expected = graphs.replay(execute, runner, batch, None, 8, 7)
        self.assertEqual(self.products, [(8, 5)])
        offsets[1:] = 8
        with mock.patch.object(graph_last_layer, "FROM", 9):
            graphs.capture(forward, runner, self.batch, 8)
        self.assertEqual(self.products[-1], (8, 5))
        with mock.patch.object(graph_last_layer, "FROM", 8):
            graphs.capture(forward, runner, self.batch, 8)
            self.assertEqual(self.products[-1], (5, 5))
            found = graphs.replay(execute, runner, batch, None, 8, 7)
        self.assertTrue(torch.equal(found, expected))
        self.assertIsNone(self.last.ends)
        self.assertIsNone(self.last.picked)

    def test_a_graph_stays_whole_where_the_layer_is_not_plain(self) -> None:
        """Nothing found at load, or a server with a cache: captured as SGLang does, replayed so."""
        kept: Any = SimpleNamespace(fa_skip_kv_cache=True)
        for last, backend in ((None, kept), (self.last, SimpleNamespace(fa_skip_kv_cache=False))):
            runner = SimpleNamespace(
                _is_full_backend=True, model_runner=SimpleNamespace(attn_backend=backend, _qwen3emb_last=last)
            )
            graphs = graph_last_layer.Graphs()
            self.assertEqual(graphs.capture(lambda *_: "captured", runner, None, 4224), "captured")
            self.assertEqual(graphs.replay(lambda *_: "replayed", runner, None, None, 4224, 4000), "replayed")
            self.assertFalse(graphs.picking)

    def test_another_batch_s_rows_are_picked_by_the_pooler(self) -> None:
        """A batch that no layer has thinned is pooled as ever, whatever went before."""
        self.last.live = True
        self.layer.forward(None, self.rows, self.batch, None)
        other = SimpleNamespace(extend_seq_lens=torch.tensor([2, 2]))
        found = self.model.pooler.forward(self.rows[:4], other)
        self.assertTrue(torch.equal(found, self.rows[[1, 3]]))
        self.assertEqual(self.batch.extend_seq_lens.tolist(), [3, 1, 4])

    def test_a_pass_is_live_while_it_runs(self) -> None:
        """By the hook on passes without a graph: ended by an error too, and only for a model that fits."""
        self.addCleanup(HookRegistry.reset)
        with mock.patch.dict(os.environ, QWEN3EMB_PLUGIN_LAST_LAYER="1"):
            self.assertIsNone(last_layer.last_layer())
        ((_, execute, _),) = HookRegistry._hooks[f"{last_layer.RUNNER}.runner.eager_runner.EagerRunner._execute_extend"]
        seen = []

        def forward(runner: Any, batch: Any) -> Any:
            seen.append(self.last.live)
            return self.layer.forward(None, self.rows, batch, None)[0]

        runner = SimpleNamespace(model_runner=SimpleNamespace(_qwen3emb_last=self.last))
        self.assertEqual(len(execute(forward, runner, self.batch)), 3)
        with self.assertRaises(AttributeError):
            execute(forward, runner, None)
        self.assertEqual((self.last.live, self.last.picked), (False, None))
        self.assertEqual(len(execute(forward, SimpleNamespace(model_runner=SimpleNamespace()), self.batch)), 8)
        self.assertEqual(seen, [True, True, False])

    def test_a_model_that_is_not_plain_is_left_alone(self) -> None:
        """Generation, other classes, several cards, adapters, compiled graphs."""

        def norm() -> Any:
            return SimpleNamespace(variance_size_override=None, cast_x_before_out_mul=False, fp32_residual=False)

        def runner(**changes: Any) -> Any:
            arguments = {"is_embedding": True, "enable_lora": False, "backend": "full", "tp": 1, "pp": 1, "aux": False}
            arguments |= changes
            named = {name: type(name, (SimpleNamespace,), {}) for name in ("Qwen3ForCausalLM", "RMSNorm")}
            norms = [named["RMSNorm"](**vars(norm())) for _ in range(3)]
            linear = type(changes.get("linear", "RowParallelLinear"), (), {})()
            layer = SimpleNamespace(
                self_attn=SimpleNamespace(tp_size=arguments["tp"], o_proj=linear),
                input_layernorm=norms[0], post_attention_layernorm=norms[1],
            )  # fmt: skip
            body = SimpleNamespace(layers=[layer], norm=norms[2], layers_to_capture=[])
            model = named["Qwen3ForCausalLM"](
                model=body, pp_group=SimpleNamespace(world_size=arguments["pp"]),
                capture_aux_hidden_states=arguments["aux"],
            )  # fmt: skip
            graphs = SimpleNamespace(prefill=SimpleNamespace(backend=arguments["backend"]))
            server = SimpleNamespace(
                is_embedding=arguments["is_embedding"], enable_lora=arguments["enable_lora"], cuda_graph_config=graphs
            )
            return SimpleNamespace(model=model, server_args=server)

        self.assertTrue(last_layer._plain(runner()))
        for change in (
            {"is_embedding": False}, {"enable_lora": True}, {"backend": "tc_piecewise"}, {"tp": 2}, {"pp": 2},
            {"aux": True}, {"linear": "RowParallelLinearWithLoRA"},
        ):  # fmt: skip
            self.assertFalse(last_layer._plain(runner(**change)), change)


class MergedColumnParallelLinear:
    """As much of SGLang's as `gated` asks about."""

    tp_size = 1

    def __init__(self) -> None:
        self.weight = torch.randn((2 * INNER, WIDTH), generator=torch.Generator().manual_seed(3)).bfloat16()
        self.quant_method = type("UnquantizedLinearMethod", (), {})()

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.t(), None


class SiluAndMul:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class Gated(unittest.TestCase):
    """A product that gates is used once it has been seen to compute what the stock layer does."""

    def setUp(self) -> None:
        self.mlp = SimpleNamespace(gate_up_proj=MergedColumnParallelLinear(), act_fn=SiluAndMul())
        self.model = SimpleNamespace(model=SimpleNamespace(layers=[SimpleNamespace(mlp=self.mlp)]))

    def quack(self, x: torch.Tensor, weight: torch.Tensor, **how: Any) -> tuple[None, torch.Tensor]:
        """QuACK's product as its own reference computes it: in float32 until it is written."""
        self.assertEqual(how["concat_layout"], ("B",))
        return None, SiluAndMul()(x.float() @ weight.float()).bfloat16()

    def test_one_that_is_right_is_used(self) -> None:
        """And gives what both halves and the gating give."""
        product = gated.Product(self.quack)
        self.assertIsNone(product.prove(self.model))
        self.assertTrue(product.proved)
        x = torch.randn((5, WIDTH)).bfloat16()
        stock = self.mlp.act_fn(self.mlp.gate_up_proj(x)[0])
        found = product(self.mlp.gate_up_proj.weight, x)
        self.assertGreater(torch.nn.functional.cosine_similarity(found.float(), stock.float()).min().item(), 0.9999)

    def test_one_that_is_wrong_or_fails_is_not(self) -> None:
        """Halves exchanged, no number, an error of its compiler: the reason is told."""
        exchanged = lambda x, w, **_: (None, SiluAndMul()((x @ w).roll(INNER, dims=-1)))  # noqa: E731
        nothing = lambda x, w, **_: (None, torch.full((len(x), INNER), float("nan")))  # noqa: E731
        for quack, reason in ((exchanged, "something else"), (nothing, "something else"), (None, "TypeError")):
            product = gated.Product(quack)
            self.assertIn(reason, product.prove(self.model) or "")
            self.assertFalse(product.proved)

    def test_other_servers_keep_their_layers(self) -> None:
        """Without a word of warning: chat, quantised weights, graphs that a compiler cuts out of the model."""

        def runner(**arguments: Any) -> SimpleNamespace:
            return SimpleNamespace(
                server_args=SimpleNamespace(**{"is_embedding": True, "quantization": None} | arguments)
            )

        graphs = SimpleNamespace(prefill=SimpleNamespace(backend="tc_piecewise"))
        self.assertIsNone(gated._other_server(runner()))
        for arguments, told in (
            ({"is_embedding": False}, "embeddings"),
            ({"quantization": "fp8"}, "fp8"),
            ({"cuda_graph_config": graphs}, "graphs"),
        ):
            self.assertIn(told, gated._other_server(runner(**arguments)) or "")

    def test_kernels_are_kept_where_only_this_user_writes(self) -> None:
        """Not below /tmp, QuACK's own choice; a folder that somebody chose stays."""
        with tempfile.TemporaryDirectory() as scratch:
            environ = {"QWEN3EMB_CACHE_DIR": f"{scratch}/cache"}
            gated.keep_what_is_compiled(environ)
            folder = Path(environ["QUACK_CACHE_DIR"])
            self.assertEqual(folder, Path(scratch) / "cache" / "quack")
            self.assertEqual(folder.stat().st_mode & 0o777, 0o700)
            environ["QUACK_CACHE_DIR"] = "/chosen"
            gated.keep_what_is_compiled(environ)
            self.assertEqual(environ["QUACK_CACHE_DIR"], "/chosen")

    def test_quantised_weights_and_several_cards_are_left_alone(self) -> None:
        """Asked once a layer."""
        for owner, name, value in (
            (self.mlp.gate_up_proj, "tp_size", 2),
            (self.mlp.gate_up_proj, "quant_method", object()),
            (self.mlp.gate_up_proj, "weight", self.mlp.gate_up_proj.weight.float()),
            (self.mlp, "act_fn", torch.nn.SiLU()),
        ):
            with mock.patch.object(owner, name, value):
                self.assertIn("not the official", gated.Product(self.quack).prove(self.model) or "")
            del self.mlp._qwen3emb_gated
        self.assertIsNone(gated.Product(self.quack).prove(self.model))


class Float8(unittest.TestCase):
    """A float8 layer with the plugin's kernels, interpreted; its products are plain ones here."""

    def test_the_kernels_give_a_layer_s_output(self) -> None:
        """What the same layer gives without quantisation, but for that; of 3 rows left, the same as of all."""
        torch.manual_seed(4)
        head, width, inner, tokens = 64, 96, 160, 5

        def weight(out: int, into: int) -> torch.Tensor:
            return (torch.randn(out, into) / into**0.5).bfloat16()

        def norm(size: int) -> Any:
            return SimpleNamespace(weight=(1 + 0.1 * torch.randn(size)).bfloat16(), variance_epsilon=1e-6)

        attention = SimpleNamespace(
            qkv_proj=weight(4 * head, width), o_proj=weight(width, 2 * head), q_norm=norm(head), k_norm=norm(head),
            rotary_emb=SimpleNamespace(cos_sin_cache=torch.randn(8, head)), num_heads=2, num_kv_heads=1,
            q_size=2 * head, kv_size=head, attn=lambda q, k, v, batch, save_kv_cache: q + torch.cat([k, v], -1),
        )  # fmt: skip
        mlp = SimpleNamespace(gate_up_proj=weight(2 * inner, width), down_proj=weight(width, inner))
        whole = SimpleNamespace(
            self_attn=attention, mlp=mlp, input_layernorm=norm(width), post_attention_layernorm=norm(width)
        )
        hidden, residual = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, width).bfloat16()
        positions = torch.arange(tokens)

        def scaled(rows: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return (rows.float() * scales @ weight.float().t()).bfloat16()

        def root_mean_square(x: torch.Tensor, one: Any) -> torch.Tensor:
            x = x.float()
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + one.variance_epsilon) * one.weight.float()

        with mock.patch.object(layer, "_product", scaled), at_hand():
            found = layer._fp8_forward(whole, positions, hidden, None, residual.clone())
            left = torch.tensor([0, 2, 4])
            some = layer._fp8_forward(whole, positions, hidden, None, residual.clone(), rows_left=left)
            summed = hidden.float() + residual.float()
            qkv = root_mean_square(summed, whole.input_layernorm) @ attention.qkv_proj.float().t()
            q, k, v = layer._q_k_v(attention, qkv.bfloat16(), positions)
        summed = summed + attention.attn(q, k, v, None, True).float() @ attention.o_proj.float().t()
        gate_up = root_mean_square(summed, whole.post_attention_layernorm) @ mlp.gate_up_proj.float().t()
        gate, up = gate_up.chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up) @ mlp.down_proj.float().t()
        cosine = torch.nn.functional.cosine_similarity
        for one, of_some, plain in zip(found, some, (expected, summed), strict=True):
            self.assertEqual(len(of_some), 3)
            self.assertGreater(cosine(of_some.float(), one[left].float()).min().item(), 0.9999)
            self.assertGreater(cosine(one.float(), plain).min().item(), 0.95)  # 96 numbers average little of it out


if __name__ == "__main__":
    unittest.main(verbosity=2)
