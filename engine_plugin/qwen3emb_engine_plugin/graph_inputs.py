"""The inputs of a whole-pass graph, written by one kernel instead of some twenty.

SGLang's runner copies a batch into eleven buffers, clears the rest of each, and rebuilds the attention's offsets from
copies of copies: kernels of a microsecond or two that cost a slow host ten times that to launch, before the pass can
begin. A graph without a KV cache (`prefill_graph`) reads three of those buffers: token ids, positions, and the offsets
at which texts begin. The rest is written for what such an engine never does.

With `unsampled` an H200 answers a single query in 0.92 to 0.95 of the time, and 64 or 256 clients as before; `verify
--level full` gave the same figures with both and without (docs/benchmarks).
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.prefill_graph import RUNNER, _skips_cache
from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

READ = ("input_ids", "positions", "out_cache_loc")  # the last is filled for a cache, which is not there
# What `ModelRunner` hands on to the model's forward with each batch of embeddings, through `load_batch` too.
HANDED_ON = {"get_embedding", "pp_proxy_tensors"}


class Filled:
    """One runner's graphs; of each size the batch that the stock way made for it, of which nobody reads the texts."""

    def __init__(self) -> None:
        self._runner: Any = None
        self._fits = False
        self._made: dict[int, Any] = {}

    def __call__(self, original: Any, runner: Any, batch: Any, **more: Any) -> Any:
        """In place of `PrefillCudaGraphRunner.load_batch`."""
        if runner is not self._runner:  # another one's buffers lie elsewhere
            self._runner, self._fits, self._made = runner, _fits(runner), {}
            if not self._fits:
                logger.info("qwen3emb plugin: a graph's inputs are not written by one kernel")
        if not self._fits or not _plain(batch, more):
            return original(runner, batch, **more)
        tokens = len(batch.input_ids)
        size = runner._pad_to_bucket(tokens, runner.capture_num_tokens)
        made = self._made.get(size)
        if made is None:
            if not self._made:
                logger.info("qwen3emb plugin: a graph's inputs are written by one kernel")
            made = self._made[size] = original(runner, batch, **more)
        runner.raw_num_tokens, runner.raw_bs, runner._static_num_tokens = tokens, batch.batch_size, size
        backend = runner.model_runner.attn_backend
        backend.forward_metadata = backend.full_cg_prefill_metadata
        _fill(batch, made, backend.full_cg_prefill_metadata.cu_seqlens_q)
        return made


def _fill(batch: Any, made: Any, offsets: Any) -> None:
    from qwen3emb_engine_plugin.kernels import fill_inputs

    lengths = batch.extend_seq_lens[: batch.batch_size]
    fill_inputs(batch.input_ids, batch.positions, lengths, made.input_ids, made.positions, offsets)


def _plain(batch: Any, more: dict[str, Any]) -> bool:
    return (
        more.keys() <= HANDED_ON
        and more.get("pp_proxy_tensors") is None
        and batch.mrope_positions is None
        and batch.spec_info is None
    )


def _fits(runner: Any) -> bool:
    return (
        _skips_cache(runner)
        and type(runner.layer_model).__name__ == "Qwen3Model"  # what another one's graph reads was not looked at
        and not runner.model_runner.is_generation  # the logits have a buffer of their own
        and runner.static_draft_hidden_states is None
        and set(runner.buffer_registry.slot_names()) == set(READ)
        and len(runner.model_runner.attn_backend.full_cg_prefill_metadata.cu_seqlens_q) == runner._capture_req_slots + 1
    )


def graph_inputs() -> str | None:
    """Hook what loads a batch into a graph's buffers."""
    import torch

    if not torch.cuda.is_available():
        return NOT_NEEDED
    from sglang.srt.model_executor.cuda_graph_buffer_registry import CudaGraphBufferRegistry
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner
    from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

    problem = (
        misfit(
            PrefillCudaGraphRunner.load_batch, "self forward_batch kwargs", "self.buffer_registry.fill_from(",
            "r = self._capture_req_slots", "self._static_num_tokens = static_num_tokens", "return static_forward_batch",
        )
        or misfit(PrefillCudaGraphRunner._execute_body_capture, None, "return hs[:raw_num_tokens] if full_path else hs")
        or misfit(FullCudaGraphBackend.replay, None, "self._graphs[shape_key].replay()")
        or misfit(PrefillCudaGraphRunner._pad_to_bucket, "raw_size buckets")
        or (None if hasattr(CudaGraphBufferRegistry, "slot_names") else "slots have no names")
    )  # fmt: skip
    if not problem:
        HookRegistry.register(f"{RUNNER}.load_batch", Filled(), HookType.AROUND)
    return problem
