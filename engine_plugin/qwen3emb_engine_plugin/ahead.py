"""The next batch is launched while the running one still runs, with a good part of what will come.

SGLang's overlap loop launches a batch while the one before it runs, if there is anything to launch. If there is not, it
waits for the running one's results, and takes nothing in until they are there. Clients who wait for their answers ask
again while the others' batch runs: their texts are then read, batched and launched while the GPU stands still. By an
H200's log 64 clients are some 49 batches a second, most of them of 32 texts: about 0.7 s of passes in each second.

Here what comes is taken in while a batch runs. The loop goes on, and launches, when what waits is worth half the
running batch, or when the last third of that batch has begun: any sooner a few texts would go alone, and the rest wait
for two batches. Where a pass takes less than two launches, launching is what there is too little time for, and the loop
is the stock one. What passes and launches take is learnt by size. `benchmarks/serving_model.py` runs these hooks in
a model of the whole way.

On an H200 it gave 7 to 17% behind the gateway, by load and weights, and nothing to an engine alone with 256 clients or
with float8 (docs/benchmarks). From 0.5.20 on the loop reads its requests elsewhere, and this part stands aside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import log2
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from qwen3emb_engine_plugin.switches import misfit

logger = logging.getLogger("qwen3emb_engine_plugin")

SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
LOOK_EVERY = 0.0001  # seconds between two looks for requests: one takes some 10 microseconds
ENOUGH = 0.5  # of the running batch's tokens: what waits is worth a batch
LAST = 0.3  # of the running batch's time: what waits goes, however little
MARGIN = 0.002  # seconds besides what a launch takes, before the end
WORTH = 2.0  # launches that a pass has to take, for there to be something to gain


class Pace:
    """Seconds that something takes by the number of tokens, learnt from the last ones of about that size."""

    STEPS = 6  # sizes to a doubling
    FORGETS = 0.25  # share of the newest one
    AT_MOST = 4.0  # times what was expected, that one is counted for

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def seen(self, tokens: int, seconds: float) -> None:
        """One took so long."""
        size = self._size(tokens)
        before = self._seconds.get(size, seconds)
        # One that took very long (a kernel compiled, weights replaced) says nothing of the next.
        self._seconds[size] = before + self.FORGETS * (min(seconds, self.AT_MOST * before) - before)

    def expected(self, tokens: int) -> float | None:
        """What one will take; None for a size that was never seen."""
        return self._seconds.get(self._size(tokens))

    def _size(self, tokens: int) -> int:
        return round(self.STEPS * log2(max(1, tokens)))


class Ahead:
    """Three hooks of one scheduler: requests come in, a batch is launched, its results are wanted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._passes, self._launches = Pace(), Pace()
        self._ended = float("-inf")  # the last batch, as far as is known
        self._released: float | None = None  # since when the loop is on its way to a launch
        self._fits: bool | None = None

    def come_in(self, original: Callable[[Any, Any], Any], scheduler: Any, requests: Any) -> None:
        """In place of `Scheduler.process_input_requests`: comes back when there is something for the loop to do."""
        original(scheduler, requests)
        if self._fits is None:
            self._fits = _fits(scheduler)
            logger.info("qwen3emb plugin: batches are %slaunched ahead", "" if self._fits else "not ")
        # The rest of a text that runs in chunks is in no queue, and can go at once.
        if self._fits and scheduler.result_queue and scheduler.chunked_req is None:
            self._while_it_runs(original, scheduler, scheduler.result_queue[-1][1])
        self._released = self._clock() if scheduler.waiting_queue else None

    def launched(self, result: Any, scheduler: Any, batch: Any, *_: Any, **__: Any) -> Any:
        """After `Scheduler.run_batch`."""
        now, tokens = self._clock(), getattr(batch, "extend_num_tokens", None)
        if self._fits and tokens and getattr(result, "copy_done", None) is not None:
            result._qwen3emb_ahead = tokens, now
            if self._released is not None:
                self._launches.seen(tokens, now - self._released)
        self._released = None
        return result

    def wanted(self, original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
        """In place of `Scheduler.process_batch_result`: when the pass ended is known here at the latest."""
        if hasattr(result, "_qwen3emb_ahead"):
            result.copy_done.synchronize()
            self._over(result)
        return original(scheduler, batch, result)

    def _while_it_runs(self, original: Callable[[Any, Any], Any], scheduler: Any, running: Any) -> None:
        if not hasattr(running, "_qwen3emb_ahead"):
            return
        tokens, begun = running._qwen3emb_ahead
        takes, launch = self._passes.expected(tokens), self._launches.expected(tokens)
        if takes is not None and launch is not None and takes < WORTH * launch:
            return
        end = None if takes is None or launch is None else max(begun, self._ended) + takes
        last = float("-inf") if end is None else end - max(launch + MARGIN, LAST * takes)  # type: ignore[operator]
        enough = ENOUGH * tokens
        looked, waiting = self._clock(), _waiting(scheduler, enough)
        while not running.copy_done.query():
            now = self._clock()
            if (waiting and (now >= last or waiting >= enough)) or _stops(scheduler):
                return
            if now - looked >= LOOK_EVERY:
                looked = now
                if more := scheduler.request_receiver.recv_requests():
                    original(scheduler, more)
                    waiting = _waiting(scheduler, enough)
        if hasattr(running, "_qwen3emb_ahead"):  # what came in may have wanted its results: a pause that retracts
            self._over(running)

    def _over(self, result: Any) -> None:
        tokens, begun = result._qwen3emb_ahead
        del result._qwen3emb_ahead
        now = self._clock()
        self._passes.seen(tokens, now - max(begun, self._ended))
        self._ended = now


def _waiting(scheduler: Any, enough: float) -> int:
    """Tokens of the texts that wait for a batch. Counted until there are enough: a queue may be thousands long."""
    tokens = 0
    for request in scheduler.waiting_queue:
        tokens += len(request.origin_input_ids)
        if tokens >= enough:
            break
    return tokens


def _stops(scheduler: Any) -> bool:
    return getattr(scheduler, "_engine_paused", False) or getattr(scheduler, "gracefully_exit", False)


def _fits(scheduler: Any) -> bool:
    """Whether this is a server of embeddings in one process, with the overlap loop."""
    arguments = scheduler.server_args
    return (
        not scheduler.is_generation
        and scheduler.enable_overlap
        and arguments.tp_size == arguments.pp_size == arguments.dp_size == 1
    )


def ahead() -> str | None:
    """Hook the scheduler's loop at these three places."""
    from sglang.srt.managers.scheduler import Scheduler

    problem = (
        misfit(
            Scheduler.event_loop_overlap,
            "self",
            "self.process_input_requests(recv_reqs)",
            "self.result_queue.append((batch.copy(), batch_result))",
            "self.process_batch_result(tmp_batch, tmp_result)",
        )
        or misfit(Scheduler.process_input_requests, "self recv_reqs")
        or misfit(Scheduler.run_batch, None, "ret.copy_to_cpu()")
        or misfit(Scheduler.process_batch_result, "self batch result")
    )
    if not problem:
        hooks = Ahead()
        HookRegistry.register(f"{SCHEDULER}.process_input_requests", hooks.come_in, HookType.AROUND)
        HookRegistry.register(f"{SCHEDULER}.run_batch", hooks.launched, HookType.AFTER)
        HookRegistry.register(f"{SCHEDULER}.process_batch_result", hooks.wanted, HookType.AROUND)
    return problem
