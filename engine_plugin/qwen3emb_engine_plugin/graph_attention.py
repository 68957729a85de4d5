"""Attention of a whole-pass graph by a kernel of our own, which knows texts by their positions.

A graph of whole passes (`prefill_graph`) has places for 129 texts of any length, so that FlashAttention counts its
tiles anew in each layer, and gives each text tiles of 128 rows. One query of 33 tokens spends 0.57 ms of a 4B's 3.4 in
it on an H200, 256 clients 8% of the pass (docs/benchmarks/h200-2026-12-01, h200-2026-11-30-2). A long text is
what FlashAttention is for: a batch that has one runs live, where it is.

Off unless QWEN3EMB_PLUGIN_GRAPH_ATTENTION=1: no GPU has run it yet (docs/benchmarks/notes.md).
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.layer import _no_gpu_or_version
from qwen3emb_engine_plugin.prefill_graph import BACKEND, RUNNER, _skips_cache
from qwen3emb_engine_plugin.switches import misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

# Tokens of a text in a graph: a guess, until benchmarks/gpu/attention.py has run. A live pass costs the 25 to 50 ms of
# its launching (docs/profiles.md), however small the model; 2,112 tokens of the 4B are computed in 25, with some 3 more
# if our kernel has half of FlashAttention's rate there.
LONGEST = 3168


def graph_attention() -> str | None:
    """Hook the attention backend, and the choice between a graph and a live pass."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    problem = (
        misfit(
            FlashAttentionBackend.forward_extend, None, "elif self.fa_skip_kv_cache:",
            "metadata = self.forward_metadata", "softmax_scale=layer.scaling,",
        )
        or misfit(PrefillCudaGraphRunner.can_run_graph, "self forward_batch")
        or misfit(PrefillCudaGraphRunner.capture_prepare, "self num_tokens", 'positions=_slot("positions")')
    )  # fmt: skip
    if problem:
        return problem
    attending = Attending()
    HookRegistry.register(f"{BACKEND}.forward_extend", attending, HookType.AROUND)
    HookRegistry.register(f"{RUNNER}.can_run_graph", attending.short_enough, HookType.AFTER)
    return None


class Attending:
    """Who attends in a pass: our kernel while graphs are captured; there its answer is theirs at each replay."""

    def __init__(self) -> None:
        self.ours = False  # whether graphs were captured with our kernel
        self._told = False  # that some were not

    def __call__(
        self, original: Any, backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *rest: Any, **more: Any
    ) -> Any:
        """In place of `FlashAttentionBackend.forward_extend`: [tokens, query heads * head]."""
        if not _of_a_graph(backend):
            return original(backend, q, k, v, layer, batch, *rest, **more)
        if rest or not _plain(q, k, v, layer, batch, more):
            if not self._told:
                self._told = True
                logger.warning("qwen3emb plugin: graph_attention stands aside: not what an official model attends over")
            return original(backend, q, k, v, layer, batch, *rest, **more)
        import torch

        from qwen3emb_engine_plugin.attention_kernel import attend

        if not self.ours:
            self.ours = True
            logger.info("qwen3emb plugin: graphs attend by positions")
        queries, out = q.view(len(q), -1), getattr(batch, "_attn_output", None)
        out = torch.empty_like(queries) if out is None else out.view(queries.shape)
        attend(queries, k, v, batch.positions, out, layer.scaling, layer.tp_q_head_num, layer.tp_k_head_num)
        return out

    def short_enough(self, possible: bool, runner: Any, batch: Any) -> bool:
        """After `PrefillCudaGraphRunner.can_run_graph`: a long text is not for our kernel."""
        if self.ours and _skips_cache(runner):
            return possible and max(batch.extend_seq_lens_cpu or (0,)) <= LONGEST
        return possible


def _of_a_graph(backend: Any) -> bool:
    """Whether this pass is captured, or warms up for that: a live pass brings metadata of its own."""
    metadata = getattr(backend, "full_cg_prefill_metadata", None)
    return metadata is not None and backend.forward_metadata is metadata and backend.fa_skip_kv_cache


def _plain(q: Any, k: Any, v: Any, layer: Any, batch: Any, more: dict[str, Any]) -> bool:
    import torch

    if any(value is not None for name, value in more.items() if name != "save_kv_cache"):
        return False
    head, group = layer.head_dim, layer.tp_q_head_num // layer.tp_k_head_num
    return (
        q.dtype == k.dtype == v.dtype == torch.bfloat16
        and batch.positions is not None
        and batch.positions.dim() == 1
        and len(batch.positions) == len(q) == len(k) == len(v)
        and q.is_contiguous()
        and k.is_contiguous()
        and v.shape[1:] == (layer.tp_v_head_num, head)
        and v.stride()[1:] == (head, 1)
        and layer.v_head_dim == layer.qk_head_dim == head == 128
        and layer.tp_k_head_num * group == layer.tp_q_head_num
        and layer.tp_v_head_num == layer.tp_k_head_num
        and group in (1, 2, 4, 8)
        and layer.sliding_window_size == -1
        and not layer.logit_cap
        and not layer.is_cross_attention
        and layer.attn_type.value == "decoder"
        and _writable(getattr(batch, "_attn_output", None), q)
    )


def _writable(out: Any, q: Any) -> bool:
    """Whether SGLang's place for the answer, which the passes that it captures have, is one to write the rows to."""
    return out is None or (out.dtype == q.dtype and out.numel() == q.numel() and out.is_contiguous())
