"""Qwen3's layers with the work between the matrix products fused, on releases where that was run on a GPU.

`attention` replaces norm, rotation and copy of queries and keys (bfloat16 and float8 alike); `fp8_layer` replaces a
whole layer of `--quantization fp8`, and takes the faster of two products by the number of tokens. Both look at each
layer once, and leave what they do not know to the stock code. `verify --level full` passed with `attention` on an H100;
`fp8_layer`'s vectors are nearer to transformers' emulation of fp8 than that is to float32 (docs/benchmarks).
"""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit, sglang_version

logger = logging.getLogger("qwen3emb_engine_plugin")

MODEL = "sglang.srt.models.qwen3"
PROVEN = ("0.5.16",)  # releases on which vectors were compared and times measured (docs/benchmarks)
# Tokens from which torch's row-wise float8 product is the faster one on Hopper; below it is SGLang's. With 0 a text has
# one kernel alone and in any batch; whether that ends float8 noise, and its cost for one query, is not measured yet.
ROWWISE_FROM = int(os.environ.get("QWEN3EMB_PLUGIN_ROWWISE_FROM", "") or 100)


def _no_gpu_or_version() -> str | None:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return NOT_NEEDED
    if torch.cuda.get_device_capability() != (9, 0):
        return NOT_NEEDED
    return None if sglang_version() in PROVEN else f"proven on SGLang {', '.join(PROVEN)} alone"


def attention() -> str | None:
    """Queries and keys: one kernel where the stock layer runs three."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.models.qwen3 import Qwen3Attention

    problem = misfit(
        Qwen3Attention.forward_prepare_native, "self positions hidden_states", "apply_qk_norm(", "rotary_emb("
    )
    if problem:
        return problem

    def prepare(original: Any, self: Any, positions: Any, hidden_states: Any) -> Any:
        if not _plain_attention(self):
            return original(self, positions, hidden_states)
        qkv, _ = self.qkv_proj(hidden_states)
        return _q_k_v(self, qkv, positions)

    HookRegistry.register(f"{MODEL}.Qwen3Attention.forward_prepare_native", prepare, HookType.AROUND)
    return None


def fp8_layer() -> str | None:
    """A float8 layer: norms and gating write float8 themselves; the product that is faster for the batch."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer

    problem = misfit(
        Qwen3DecoderLayer.forward,
        "self positions hidden_states forward_batch residual post_residual_addition",
        "layer_communicator.prepare_attn(", "layer_communicator.prepare_mlp(", "layer_communicator.postprocess_layer(",
    ) or misfit(
        Qwen3Attention.forward,
        "self positions hidden_states forward_batch",
        "self.attn(q, k, v, forward_batch, save_kv_cache=save_kv_cache)",
    )  # fmt: skip
    if problem:
        return problem

    def forward(
        original: Any, self: Any, positions: Any, hidden_states: Any, forward_batch: Any, residual: Any, *rest: Any,
        **more: Any,
    ) -> Any:  # fmt: skip
        if rest or any(value is not None for value in more.values()) or not _plain_fp8(self):
            return original(self, positions, hidden_states, forward_batch, residual, *rest, **more)
        return _fp8_forward(self, positions, hidden_states, forward_batch, residual)

    HookRegistry.register(f"{MODEL}.Qwen3DecoderLayer.forward", forward, HookType.AROUND)
    return None


def _q_k_v(attention: Any, qkv: Any, positions: Any) -> tuple[Any, Any, Any]:
    from qwen3emb_engine_plugin.kernels import norm_rotate

    q, k = norm_rotate(
        qkv, positions, attention.rotary_emb.cos_sin_cache, attention.q_norm.weight, attention.k_norm.weight,
        attention.q_norm.variance_epsilon, attention.num_heads, attention.num_kv_heads,
    )  # fmt: skip
    return q, k, qkv[:, attention.q_size + attention.kv_size :]


def _fp8_forward(
    layer: Any, positions: Any, hidden: Any, forward_batch: Any, residual: Any, rows_left: Any = None
) -> tuple[Any, Any]:
    """The layer's hidden states and residual; after the attention for `rows_left` alone, where those are given."""
    from qwen3emb_engine_plugin.fp8_kernels import gate_quantise, quantise
    from qwen3emb_engine_plugin.kernels import norm_quantise

    attention, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    rows, scales = norm_quantise(hidden, residual, first.weight, first.variance_epsilon)
    residual = hidden if residual is None else residual
    q, k, v = _q_k_v(attention, _product(rows, scales, attention.qkv_proj), positions)
    attended = attention.attn(q, k, v, forward_batch, save_kv_cache=True)
    attended = attended.view(-1, attention.q_size)
    if rows_left is not None:
        attended, residual = attended[rows_left], residual[rows_left]
    hidden = _product(*quantise(attended), attention.o_proj)
    rows, scales = norm_quantise(hidden, residual, second.weight, second.variance_epsilon)
    rows, scales = gate_quantise(_product(rows, scales, mlp.gate_up_proj))
    return _product(rows, scales, mlp.down_proj), residual


def _product(rows: Any, scales: Any, linear: Any) -> Any:
    """float8 rows times the layer's float8 weight, each with its scales, as bfloat16."""
    import torch
    from sgl_kernel import fp8_scaled_mm

    if rows.shape[0] < ROWWISE_FROM:
        return fp8_scaled_mm(rows, linear.weight, scales, linear.weight_scale, out_dtype=torch.bfloat16, bias=None)
    return torch._scaled_mm(
        rows, linear.weight, scale_a=scales, scale_b=linear.weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _plain_attention(attention: Any) -> bool:
    """Whether this is the official models' attention on one GPU, in an embedding server; looked at once."""
    known: bool | None = getattr(attention, "_qwen3emb_plain", None)
    if known is None:
        import torch
        from sglang.srt.server_args import get_global_server_args

        rotary, norms = attention.rotary_emb, (attention.q_norm, attention.k_norm)
        known = (
            bool(get_global_server_args().is_embedding)
            and type(rotary).__name__ == "RotaryEmbedding"
            and rotary.is_neox_style
            and rotary.rotary_dim == rotary.head_size == attention.head_dim
            and attention.head_dim & (attention.head_dim - 1) == 0
            and rotary.cos_sin_cache.shape[1] == attention.head_dim
            and rotary.cos_sin_cache.is_contiguous()
            and all(_plain_norm(norm) and norm.weight.dtype == torch.bfloat16 for norm in norms)
            and attention.q_norm.variance_epsilon == attention.k_norm.variance_epsilon
            and attention.tp_size == 1
        )
        attention._qwen3emb_plain = known
        if not known:
            logger.warning("qwen3emb plugin: attention stands aside: another layer, or no embedding server")
    return known


def _plain_fp8(layer: Any) -> bool:
    """Whether all four products take float8 with a scale a row and a channel; looked at once."""
    known: bool | None = getattr(layer, "_qwen3emb_fp8", None)
    if known is None:
        import torch

        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        known = (
            _plain_attention(attention)
            and all(_plain_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
            and type(mlp.act_fn).__name__ == "SiluAndMul"
            and all(
                type(one.quant_method).__name__ == "Fp8LinearMethod"
                and not one.quant_method.use_marlin
                and not one.quant_method.block_quant
                and one.weight.dtype == torch.float8_e4m3fn
                and tuple(one.weight_scale.shape) == (1, one.weight.shape[1])
                and getattr(one, "input_scale", None) is None
                and getattr(one, "bias", None) is None
                for one in products
            )
        )
        layer._qwen3emb_fp8 = known
    return known


def _plain_norm(norm: Any) -> bool:
    return (
        type(norm).__name__ == "RMSNorm"
        and norm.variance_size_override is None
        and not norm.cast_x_before_out_mul
        and not norm.fp32_residual
    )
