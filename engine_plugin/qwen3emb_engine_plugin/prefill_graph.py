"""A whole prefill pass as one CUDA graph, for an engine that keeps no KV cache.

SGLang's `full` prefill backend (0.5.16+) replays one graph where `breakable` replays one a layer with attention
launched from Python in between. Its attention metadata is written for a KV cache. An embedding server without one
(`--prefill-only-disable-kv-cache`, or its three flags) attends over the raw keys instead, and that kernel wants its
segments to cover every row of the padded batch: otherwise the last real token, the pooled one, is spoilt (as in
sgl-project/sglang#27343, there for the piecewise backend). Here the padding becomes a segment of its own.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit

RUNNER = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner"
BACKEND = "sglang.srt.layers.attention.flashattention_backend.FlashAttentionBackend"


def compiled(arguments: Any) -> bool:
    """Whether this server's prefill is cut out of the model by torch's compiler, which does not know our layers."""
    prefill = getattr(getattr(arguments, "cuda_graph_config", None), "prefill", None)
    return str(getattr(prefill, "backend", "")) == "tc_piecewise"


def _skips_cache(runner: Any) -> bool:
    return bool(runner._is_full_backend) and bool(getattr(runner.model_runner.attn_backend, "fa_skip_kv_cache", False))


def full_graph() -> str | None:
    """Hook the runner and the attention backend; both act only for the full backend without a KV cache."""
    import torch

    if not torch.cuda.is_available():
        return NOT_NEEDED
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    fill = getattr(FlashAttentionBackend, "_init_full_cg_prefill_metadata", None)
    if fill is None:
        return "this release has no full prefill graph"
    prepare = PrefillCudaGraphRunner._prepare_forward_metadata_for_replay
    start = "self forward_batch static_forward_batch"
    marks = ("_is_full_backend", "_capture_req_slots", "init_forward_metadata_out_graph(padded_view)")
    problem = (
        (misfit(prepare, f"{start} num_tokens", *marks) and misfit(prepare, f"{start} shape_key", *marks))
        or misfit(PrefillCudaGraphRunner.can_run_graph, "self forward_batch")
        or misfit(fill, "self forward_batch in_capture", "m.cu_seqlens_q[1:].copy_(", "m.max_seq_len_q")
        or misfit(FlashAttentionBackend.forward_extend, None, "metadata.fa_skip_cu_seqlens_q = cu_seqlens_q")
    )
    if problem:
        return problem
    HookRegistry.register(f"{RUNNER}._prepare_forward_metadata_for_replay", _prepare, HookType.AROUND)
    HookRegistry.register(f"{RUNNER}.can_run_graph", _can_run, HookType.AROUND)
    HookRegistry.register(f"{BACKEND}._init_full_cg_prefill_metadata", _fill, HookType.AROUND)
    return None


def _can_run(original: Any, self: Any, forward_batch: Any) -> bool:
    """One request slot stays free for the padding."""
    if _skips_cache(self) and forward_batch.batch_size >= self._capture_req_slots:
        return False
    return bool(original(self, forward_batch))


def _prepare(original: Any, self: Any, forward_batch: Any, static_forward_batch: Any, shape: Any) -> Any:
    """After the real lengths are in place, end the last slot's segment at the padded row count."""
    result = original(self, forward_batch, static_forward_batch, shape)
    if _skips_cache(self):
        rows = shape if isinstance(shape, int) else shape.size
        self.model_runner.attn_backend.full_cg_prefill_metadata.cu_seqlens_q[-1:].fill_(rows)
    return result


def _fill(original: Any, self: Any, forward_batch: Any, in_capture: bool) -> None:
    """At replay only the query offsets are read: no page table of a cache that is not there.

    At capture each size gets its own longest segment (the engine keeps the first, largest one for all), and attention
    over one size is not split along the keys: with that longest segment, the kernel's heuristic splits small batches
    dozens of ways, and 33 tokens took 58 ms.
    """
    if in_capture or not self.fa_skip_kv_cache:
        original(self, forward_batch, in_capture)
        if in_capture and self.fa_skip_kv_cache:
            self.full_cg_prefill_metadata.fa_skip_cu_seqlens_q = None
            self.full_cg_prefill_metadata.fa_skip_max_seqlen_q = None
            self.num_splits = 1
        return
    metadata = self.full_cg_prefill_metadata
    metadata.cu_seqlens_q[1:].copy_(forward_batch.extend_seq_lens[: forward_batch.batch_size].cumsum(dim=0))
    self.forward_metadata = metadata
