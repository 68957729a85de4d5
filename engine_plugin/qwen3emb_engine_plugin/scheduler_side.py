"""The hooks of the scheduler process: vectors as arrays, straight to the HTTP process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.ahead import ahead
from qwen3emb_engine_plugin.cpu_pass import heap, norms
from qwen3emb_engine_plugin.few_rows import few_rows
from qwen3emb_engine_plugin.gated import gated
from qwen3emb_engine_plugin.graph_attention import graph_attention
from qwen3emb_engine_plugin.graph_inputs import graph_inputs
from qwen3emb_engine_plugin.graph_last_layer import graph_last_layer
from qwen3emb_engine_plugin.housekeeping import freeing, idle, snapshots
from qwen3emb_engine_plugin.last_layer import last_layer
from qwen3emb_engine_plugin.layer import attention, fp8_layer
from qwen3emb_engine_plugin.prebuild import await_builders
from qwen3emb_engine_plugin.prefill_graph import full_graph
from qwen3emb_engine_plugin.switches import misfit
from qwen3emb_engine_plugin.unsampled import unsampled
from qwen3emb_engine_plugin.wire import OUR_RIDS

COMPONENTS = "sglang.srt.managers.scheduler_components"


def vectors() -> str | None:
    """A batch's vectors become one float32 array; requests of the stock paths still get their list of floats."""
    import torch
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    if not getattr(io_struct, "_USE_PICKLE_IPC", True):
        return "messages between the processes are msgpack, which has no place for an array"
    problem = misfit(SchedulerBatchResultProcessor._convert_embeddings, "self result", "tolist()") or misfit(
        SchedulerOutputStreamer._stream_output_embedding, "self reqs", "embeddings.append(req.embedding)"
    )
    if problem:
        return problem

    def convert(original: Any, self: Any, *, result: Any) -> Any:
        found = result.embeddings
        if isinstance(found, torch.Tensor) and found.dim() == 2 and not found.is_sparse:
            return list(found.detach().float().cpu().numpy())
        if isinstance(found, list) and all(isinstance(one, torch.Tensor) and one.dim() == 1 for one in found):
            return [one.detach().float().cpu().numpy() for one in found]
        return original(self, result=result)

    def stream(original: Any, self: Any, reqs: list[Any]) -> Any:
        for req in reqs:
            if isinstance(req.embedding, np.ndarray) and not req.rid.startswith(OUR_RIDS):
                req.embedding = req.embedding.tolist()
        return original(self, reqs)

    HookRegistry.register(
        f"{COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor._convert_embeddings",
        convert,
        HookType.AROUND,
    )
    HookRegistry.register(
        f"{COMPONENTS}.output_streamer.SchedulerOutputStreamer._stream_output_embedding", stream, HookType.AROUND
    )
    return None


def direct() -> str | None:
    """Vectors go to the HTTP process without passing through the detokenizer, which only hands them on."""
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.io_struct import BatchEmbeddingOutput
    from sglang.srt.managers.scheduler_components.ipc_channels import SchedulerIpcChannels
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper

    fields = {field.name for field in dataclasses.fields(SchedulerIpcChannels)}
    problem = misfit(DetokenizerManager.handle_batch_embedding_out, "self recv_obj", "return recv_obj") or misfit(
        SenderWrapper.send_output, "self output recv_obj", "self.socket"
    )
    if problem or not {"send_to_tokenizer", "send_to_detokenizer"} <= fields:
        return problem or "SchedulerIpcChannels has other channels"

    class Shortcut(SenderWrapper):
        """The detokenizer's sender, except for vectors of the single HTTP worker."""

        def __init__(self, stock: Any, tokenizer: Any) -> None:
            super().__init__(stock.socket)
            self._tokenizer = tokenizer

        def send_output(self, output: Any, recv_obj: Any = None) -> None:
            if type(output) is BatchEmbeddingOutput and not any(output.http_worker_ipcs or ()):
                self._tokenizer.send_output(output, recv_obj)
            else:
                super().send_output(output, recv_obj)

    def create(channels: Any, *_: Any, **__: Any) -> Any:
        shortcut = Shortcut(channels.send_to_detokenizer, channels.send_to_tokenizer)
        return dataclasses.replace(channels, send_to_detokenizer=shortcut)

    HookRegistry.register(f"{COMPONENTS}.ipc_channels.SchedulerIpcChannels.create", create, HookType.AFTER)
    return None


PARTS = [
    ("vectors", True, vectors),
    ("direct", True, direct),
    ("idle", True, idle),
    ("snapshots", True, snapshots),
    ("freeing", True, freeing),
    ("unsampled", True, unsampled),
    ("ahead", True, ahead),
    ("full_graph", True, full_graph),
    ("graph_inputs", True, graph_inputs),
    ("graph_attention", False, graph_attention),
    ("few_rows", False, few_rows),
    ("attention", True, attention),
    ("fp8_layer", True, fp8_layer),
    ("last_layer", True, last_layer),
    ("graph_last_layer", False, graph_last_layer),
    ("gated", True, gated),
    ("heap", True, heap),
    ("norms", True, norms),
    ("prebuild", True, await_builders),
]
