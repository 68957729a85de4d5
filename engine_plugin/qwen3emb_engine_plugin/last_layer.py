"""The last layer's second half, for the pooled tokens alone.

An embedding is the hidden state of a text's last token. Of the other tokens the last layer is asked for keys and values
only; their output projection, norms and MLP are computed by the stock model and thrown away: 84% of that layer's
products, 2.3% of a pass of the 4B's 36. Here the pooled rows are picked right after the attention. A product of fewer
rows may sum in another order, so the floats are not the stock server's to the last bit; `verify` holds them.

Passes that run live, and graphs of `graph_last_layer`; other CUDA graphs are captured with all rows, and stay so.
`verify --level full` passed with it on an H200 in bfloat16 and float8, in bfloat16 without graphs too
(docs/benchmarks). Elsewhere it is off unless QWEN3EMB_PLUGIN_LAST_LAYER=1: on a CPU the floats are to be the stock
server's.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.layer import _fp8_forward, _no_gpu_or_version, _plain_fp8, _plain_norm
from qwen3emb_engine_plugin.prefill_graph import compiled
from qwen3emb_engine_plugin.switches import misfit, switched_on

logger = logging.getLogger("qwen3emb_engine_plugin")

RUNNER = "sglang.srt.model_executor"


def last_layer() -> str | None:
    """Hook the model once it is loaded, and the runner of live passes."""
    problem = None if switched_on("last_layer", default=False) else _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.layers import pooler
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner
    from sglang.srt.models import qwen3

    start = "self positions hidden_states forward_batch"
    problem = (
        misfit(
            qwen3.Qwen3DecoderLayer.forward, f"{start} residual post_residual_addition",
            "layer_communicator.prepare_attn(", "layer_communicator.prepare_mlp(",
            "hidden_states = self.mlp(hidden_states, forward_batch=forward_batch)",
        )
        or misfit(qwen3.Qwen3Attention.forward, start, "save_kv_cache=save_kv_cache)", "self.o_proj(attn_output)")
        or misfit(qwen3.Qwen3ForCausalLM.forward, None, "return self.pooler(hidden_states, forward_batch)")
        or misfit(pooler.pool_hidden_states, None, "torch.cumsum(forward_batch.extend_seq_lens, dim=0) - 1")
        or misfit(EagerRunner._execute_extend, None, "model_runner.model.forward(")
        or misfit(ModelRunner.load_model, "self")
    )  # fmt: skip
    if problem:
        return problem

    fp8_layer = switched_on("fp8_layer") and _no_gpu_or_version() is None

    def loaded(result: Any, runner: Any, *_: Any, **__: Any) -> Any:
        try:
            plain = _plain(runner)
        except AttributeError:  # a model of another shape: nothing here is a reason not to load it
            plain = False
        if plain:
            runner._qwen3emb_last = LastLayer(runner.model, fp8_layer)
            logger.info("qwen3emb plugin: the last layer ends with the pooled tokens")
        else:
            logger.warning("qwen3emb plugin: last_layer stands aside: not an official model in one process")
        return result

    def execute(original: Any, self: Any, *args: Any, **more: Any) -> Any:
        last: LastLayer | None = getattr(self.model_runner, "_qwen3emb_last", None)
        if last is None:
            return original(self, *args, **more)
        last.live = True
        try:
            return original(self, *args, **more)
        finally:
            last.live, last.picked = False, None

    HookRegistry.register(f"{RUNNER}.model_runner.ModelRunner.load_model", loaded, HookType.AFTER)
    HookRegistry.register(f"{RUNNER}.runner.eager_runner.EagerRunner._execute_extend", execute, HookType.AROUND)
    return None


class LastLayer:
    """A model's last layer and its pooler, both of which know during a live pass which rows are left.

    Of a pass that is captured, `ends` holds the end of each text's rows, of as many texts as the graph has places for.
    With `fp8_layer`, a layer of float8 weights goes that part's way.
    """

    def __init__(self, model: Any, fp8_layer: bool) -> None:
        self._fp8_layer = fp8_layer
        self.layer, pooler = model.model.layers[-1], model.pooler
        self._whole, self._pool = self.layer.forward, pooler.forward
        self.live = False
        self.ends: Any = None
        self.picked: Any = None  # the batch whose rows have been picked
        self.layer.forward, pooler.forward = self.forward, self.pool

    def forward(self, positions: Any, hidden: Any, batch: Any, residual: Any, *rest: Any, **more: Any) -> Any:
        """Hidden states and residual: each [texts, width] in a live pass, [places, width] with `ends`."""
        if not (self.live or self.ends is not None) or rest or more or hidden.shape[0] == 0:
            return self._whole(positions, hidden, batch, residual, *rest, **more)
        if self.ends is not None:
            rows = self.ends.long() - 1
        else:
            rows = batch.extend_seq_lens.cumsum(dim=0) - 1
            self.picked = batch
        if self._fp8_layer and _plain_fp8(self.layer):
            return _fp8_forward(self.layer, positions, hidden, batch, residual, rows)
        communicator, attention = self.layer.layer_communicator, self.layer.self_attn
        hidden, residual = communicator.prepare_attn(hidden, residual, batch)
        q, k, v = attention.forward_prepare_native(positions=positions, hidden_states=hidden)
        attended = attention.attn(q, k, v, batch, save_kv_cache=True)
        hidden, _ = attention.o_proj(attended[rows])
        hidden, residual = communicator.prepare_mlp(hidden, residual[rows], batch)
        hidden = self.layer.mlp(hidden, forward_batch=batch)
        return communicator.postprocess_layer(hidden, residual, batch)

    def pool(self, hidden: Any, batch: Any) -> Any:
        """The pooler's own work, over rows that are one a text where they have been picked."""
        if self.picked is batch:
            batch = copy.copy(batch)
            batch.extend_seq_lens = batch.extend_seq_lens.new_ones(batch.extend_seq_lens.shape)
        return self._pool(hidden, batch)


def _plain(runner: Any) -> bool:
    """Whether this is an official model's embedding server in one process, with nothing else in its layers."""
    model, arguments = runner.model, runner.server_args
    if type(model).__name__ != "Qwen3ForCausalLM" or not arguments.is_embedding:
        return False
    layer = model.model.layers[-1]
    return (
        model.pp_group.world_size == 1
        and layer.self_attn.tp_size == 1
        and not getattr(arguments, "enable_lora", False)
        and not getattr(arguments, "enable_pdmux", False)
        and not compiled(arguments)
        and not model.capture_aux_hidden_states
        and not model.model.layers_to_capture
        and type(layer.self_attn.o_proj).__name__ == "RowParallelLinear"
        and all(_plain_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm))
    )
