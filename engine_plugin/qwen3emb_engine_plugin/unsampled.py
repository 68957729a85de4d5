"""A batch of embeddings is given the sampling parameters of an earlier one of as many texts: nothing samples from it.

SGLang makes four tensors of temperatures and limits for every batch, each through pinned memory to the device, and
four penalties, before the pass can be launched. The fields stay there, so that whatever filters, merges or copies a
batch finds them.

On a CPU, where nothing is pinned or sent, it gives nothing. What an H200 gains by it was measured together with
`graph_inputs` alone.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

SAMPLING = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
KEPT = 1024  # numbers of texts; batches of more are rare, and long


class Unsampled:
    """Sampling parameters by the number of texts, each batch with an object of its own: a batch assigns to its fields.

    The tensors behind are shared, which no batch writes: filtering and merging put new ones in their places. So are the
    penalties, which have none: a batch that is merged into another (the overlap loop does that with each) would have
    them made for both, from a list of requests that is gone.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, int, int], Any] = {}

    def __call__(self, original: Any, cls: Any, batch: Any, vocab_size: int) -> Any:
        """In place of `SamplingBatchInfo.from_schedule_batch`, for models that do not generate."""
        if batch.model_config.is_generation:
            return original(cls, batch, vocab_size)
        key = str(batch.device), vocab_size, len(batch.reqs)
        if key not in self._made:
            made = original(cls, batch, vocab_size)
            _nobodys(made)
            if len(self._made) >= KEPT:
                return made
            if not self._made:
                logger.info("qwen3emb plugin: batches of as many texts share what sampling would need")
            self._made[key] = made
        own = cls.__new__(cls)
        own.__dict__.update(self._made[key].__dict__)
        return own


def _nobodys(made: Any) -> None:
    """Take out what is of the requests themselves: `/encode` takes penalties and biases, which apply to nothing."""
    made.penalizer_orchestrator.release()
    made.logit_bias = made.custom_params = made.custom_logit_processor = None
    made.has_custom_logit_processor = False
    if "return_sampling_masks" in made.__dict__:
        made.return_sampling_masks, made.sampling_mask_max_top_k = None, 0


def unsampled() -> str | None:
    """Hook what makes them."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.penaltylib.orchestrator import BatchedPenalizerOrchestrator
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    problem = (
        misfit(SamplingBatchInfo.from_schedule_batch, "batch vocab_size", "penalizer_orchestrator=")
        or misfit(SamplingBatchInfo.filter_batch, None, "setattr(self, item, value[keep_indices_device])")
        or misfit(SamplingBatchInfo.copy_for_forward, "self", "dataclasses.replace(")
        or misfit(BatchedPenalizerOrchestrator.filter, None, "if not self.is_required:")
        or misfit(BatchedPenalizerOrchestrator.merge, None, "if not self.is_required and not their.is_required:")
        or misfit(BatchedPenalizerOrchestrator.release, "self", "self.is_required = False")
        or misfit(ScheduleBatch.prepare_for_extend, "self", "SamplingBatchInfo.from_schedule_batch(")
    )
    if not problem:
        HookRegistry.register(f"{SAMPLING}.from_schedule_batch", Unsampled(), HookType.AROUND)
    return problem
