"""The scheduler's idle and reporting work, done at a rate that a person can read instead of once a loop turn.

An idle scheduler checks every memory pool and publishes its load on every turn of its loop, and a request that comes
meanwhile waits for it. The load snapshot is also written before each batch's answers go out. And before 0.5.23 each
text of a batch gives its places in the KV pool back alone, which copies the list of all free places every time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.readahead import cores_to_spare
from qwen3emb_engine_plugin.switches import NOT_NEEDED, misfit, switched_on

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
COMPONENTS = "sglang.srt.managers.scheduler_components"
PROCESSOR = f"{COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor"
STREAMER = f"{COMPONENTS}.output_streamer.SchedulerOutputStreamer"
LINGER = 0.005  # seconds after a batch without sleep or housekeeping
IDLE_EVERY = 0.05  # seconds between two rounds of idle housekeeping
SNAPSHOT_EVERY = 0.02  # seconds between two load snapshots under load


class IdleRounds:
    """A round of idle housekeeping some time after a batch, then every IDLE_EVERY seconds.

    Until then the loop turns without sleeping, where sleeping is on: who waited for the batch's answer asks again
    within milliseconds, and finds a process that neither has to be woken nor is at its housekeeping. On a CPU one
    client had 1.15 to 1.26x the texts/s (`plugin_cpu.py --clients 1 --without linger --flag=--sleep-on-idle`).
    """

    def __init__(self, linger: float = LINGER, clock: Callable[[], float] = time.monotonic) -> None:
        self._linger, self._clock = linger, clock
        self._last, self._batches = float("-inf"), -1
        self._since, self._due = float("-inf"), True  # the last batch, and whether a round is owed since

    def __call__(self, original: Callable[[Any], None], scheduler: Any) -> None:
        """In place of `Scheduler.on_idle`, which ends with sleeping."""
        now = self._clock()
        if scheduler.forward_ct != self._batches:
            self._batches, self._since, self._due = scheduler.forward_ct, now, True
        lingers = now - self._since < self._linger
        if (self._due and not lingers) or now - self._last >= IDLE_EVERY:
            with _awake(scheduler) if lingers else nullcontext():
                original(scheduler)
            self._last, self._due = self._clock(), False
        elif not lingers and scheduler.is_fully_idle():
            scheduler.maybe_sleep_on_idle()


@contextmanager
def _awake(scheduler: Any) -> Iterator[None]:
    sleeper, scheduler.idle_sleeper = scheduler.idle_sleeper, None
    try:
        yield
    finally:
        scheduler.idle_sleeper = sleeper


class Snapshots:
    """Load snapshots at most every SNAPSHOT_EVERY seconds while there is work; an idle one writes at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = float("-inf")

    def __call__(self, original: Callable[..., Any], scheduler: Any, force: bool = False) -> Any:
        """In place of `Scheduler.publish_load_snapshot`, which says None too when it writes nothing."""
        now = self._clock()
        if now - self._last < SNAPSHOT_EVERY and not scheduler.is_fully_idle():
            return None
        self._last = now
        return original(scheduler, force)


class FreedTogether:
    """A batch's places in the KV pool, given back at once, when its answers are on their way.

    Embeddings only. What is held back are views of the request table, and a prefix cache writes there for a text that
    goes on to be decoded: it would be the cache's own places that are given back.
    """

    def __init__(self) -> None:
        self._open: Any = None  # the pool whose places are being held back

    def __call__(self, original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
        """In place of `SchedulerBatchResultProcessor.process_batch_result_prefill`."""
        places = processor.token_to_kv_pool_allocator
        if processor.is_generation or not places.is_not_in_free_group:
            return original(processor, batch, result)
        places.free_group_begin()
        self._open = places
        try:
            return original(processor, batch, result)
        finally:
            self.end()

    def end(self, *_: Any, **__: Any) -> None:
        """After `SchedulerOutputStreamer.stream_output`; the batch's report, which follows, counts what is held."""
        places, self._open = self._open, None
        if places is not None:
            places.free_group_end()


def idle() -> str | None:
    """Hook the idle housekeeping."""
    from sglang.srt.managers.scheduler import Scheduler

    problem = (
        misfit(Scheduler.on_idle, "self", "self.maybe_sleep_on_idle()")
        or misfit(Scheduler.maybe_sleep_on_idle, "self", "self.idle_sleeper is not None")
        or misfit(Scheduler.run_batch, None, "self.forward_ct += 1")
    )
    # On few cores the others need the one that it would turn on: 16 clients on two had 1 to 6% less by it.
    lingers = switched_on("linger", default=cores_to_spare())
    if not problem:
        HookRegistry.register(f"{SCHEDULER}.on_idle", IdleRounds(LINGER if lingers else 0.0), HookType.AROUND)
    return problem


def snapshots() -> str | None:
    """Hook the load snapshots."""
    from sglang.srt.managers.scheduler import Scheduler

    problem = misfit(Scheduler.publish_load_snapshot, "self force", "get_loads(")
    if not problem:
        HookRegistry.register(f"{SCHEDULER}.publish_load_snapshot", Snapshots(), HookType.AROUND)
    return problem


def freeing() -> str | None:
    """Hook what follows a batch, on releases that free text by text."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator

    after = SchedulerBatchResultProcessor.process_batch_result_prefill
    if not misfit(after, None, "free_group_begin()"):
        return NOT_NEEDED
    problem = (
        misfit(
            after,
            "self batch result",
            "if self.is_generation:",
            "release_kv_cache(req, self.tree_cache)",
            "self.output_streamer.stream_output(",
        )
        or misfit(SchedulerOutputStreamer.stream_output, "self reqs return_logprob skip_req")
        or misfit(BaseTokenToKVPoolAllocator.free_group_begin, "self", "self.is_not_in_free_group = False")
        or misfit(BaseTokenToKVPoolAllocator.free_group_end, "self", "self.free(torch.cat(self.free_group))")
    )
    if not problem:
        together = FreedTogether()
        HookRegistry.register(f"{PROCESSOR}.process_batch_result_prefill", together, HookType.AROUND)
        HookRegistry.register(f"{STREAMER}.stream_output", together.end, HookType.AFTER)
    return problem
