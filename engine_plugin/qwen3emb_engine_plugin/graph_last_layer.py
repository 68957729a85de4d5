"""The last layer's second half for the pooled tokens alone (`last_layer`), in whole-pass graphs too.

A graph keeps the texts' offsets in one place (`prefill_graph`): picked there, its rows are as many as it has places for
texts, 129, whichever batch it is replayed for. The first of them are the batch's, in order; the pooler is told so. Of
few rows it saves nothing, since a product of few rows takes as long as reading its weights.

Off unless QWEN3EMB_PLUGIN_GRAPH_LAST_LAYER=1: no GPU has run it yet (docs/benchmarks/notes.md).
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.layer import _no_gpu_or_version
from qwen3emb_engine_plugin.prefill_graph import RUNNER, _skips_cache
from qwen3emb_engine_plugin.switches import misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

FROM = 528  # rows of a graph; products of 129 rows and of 264 take about as long


def graph_last_layer() -> str | None:
    """Hook the pass that is captured and its replay; both act for what `last_layer` has found plain."""
    problem = _no_gpu_or_version()
    if problem:
        return problem
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner

    problem = (
        misfit(
            PrefillCudaGraphRunner.capture_one_shape, "self size",
            "attn_backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)",
            "self._run_forward(forward_batch, num_tokens)",
        )
        or misfit(PrefillCudaGraphRunner._run_forward, "self forward_batch num_tokens")
        or misfit(
            PrefillCudaGraphRunner._execute_body_capture,
            "self forward_batch static_forward_batch static_num_tokens raw_num_tokens kwargs",
            "return hs[:raw_num_tokens] if full_path else hs",
            "tail_batch = forward_batch if full_path else static_forward_batch",
        )
    )  # fmt: skip
    if problem:
        return problem
    graphs = Graphs()
    HookRegistry.register(f"{RUNNER}._run_forward", graphs.capture, HookType.AROUND)
    HookRegistry.register(f"{RUNNER}._execute_body_capture", graphs.replay, HookType.AROUND)
    return None


class Graphs:
    """Which sizes were captured with the picked rows."""

    def __init__(self) -> None:
        self.picking: set[int] = set()

    def capture(self, original: Any, runner: Any, batch: Any, size: int) -> Any:
        """In place of `PrefillCudaGraphRunner._run_forward`, which under the full backend warms up and is captured."""
        last = getattr(runner.model_runner, "_qwen3emb_last", None)
        if last is None or size < FROM or not _skips_cache(runner):
            return original(runner, batch, size)
        if not self.picking:
            logger.info("qwen3emb plugin: graphs of %d rows and more end with the pooled tokens", FROM)
        self.picking.add(size)
        last.ends = runner.model_runner.attn_backend.full_cg_prefill_metadata.cu_seqlens_q[1:]
        try:
            return original(runner, batch, size)
        finally:
            last.ends = None

    def replay(self, original: Any, runner: Any, batch: Any, static: Any, size: int, tokens: int, **more: Any) -> Any:
        """In place of `PrefillCudaGraphRunner._execute_body_capture`: what comes out is a row a text already."""
        last = getattr(runner.model_runner, "_qwen3emb_last", None)
        if last is None or size not in self.picking:
            return original(runner, batch, static, size, tokens, **more)
        last.picked = batch
        try:
            return original(runner, batch, static, size, tokens, **more)
        finally:
            last.picked = None
