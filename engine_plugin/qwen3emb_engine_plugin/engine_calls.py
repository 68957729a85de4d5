"""From a plain request to vectors through the tokenizer manager's own functions, many requests at a time.

What the stock path does once a request happens here once a loop tick: all requests that arrived together are
tokenised in one call and go to the scheduler in one message. States are the engine's own `ReqState`, in its own
table, so aborts, metrics, dumps, health and the drain at shutdown work as they do without the plugin.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import time
from typing import Any

from qwen3emb_engine_plugin.asked import Asked
from qwen3emb_engine_plugin.tokens import encoder
from qwen3emb_engine_plugin.wire import OUR_RIDS

# Above this many characters a tick's texts are tokenised in a thread: the loop goes on serving meanwhile.
THREAD_ABOVE_CHARACTERS = 20_000


class NotPlainError(Exception):
    """The stock route has to answer: nothing was sent to the scheduler."""


class Waiting:
    """Stands in for the `asyncio.Event` of each item's state; the request is done when every item is."""

    __slots__ = ("asked", "future", "left", "states")

    def __init__(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asked
        self.states: list[Any] = []
        self.left = len(asked.texts or asked.ids or ())
        self.future: asyncio.Future[bool] = loop.create_future()

    def set(self) -> None:
        """Called by the engine for each finished item."""
        self.left -= 1
        if self.left == 0 and not self.future.done():
            self.future.set_result(True)

    def fail(self, error: BaseException) -> None:
        """Nothing of this request went out."""
        if not self.future.done():
            self.future.set_exception(error)

    async def done_within(self, seconds: float) -> bool:
        """True when every item is finished, False after `seconds`."""
        loop = asyncio.get_running_loop()
        handle = loop.call_later(seconds, self._tick)
        try:
            return await self.future
        finally:
            handle.cancel()

    def _tick(self) -> None:
        if not self.future.done():
            future = self.future
            self.future = asyncio.get_running_loop().create_future()
            future.set_result(False)


class EngineCalls:
    """The tokenizer manager, as the fast route uses it."""

    def __init__(self, manager: Any, request_type: type, wait_timeout: float) -> None:
        self.manager = manager
        self.wait_timeout = wait_timeout
        self._request_type = request_type
        self._encode = encoder(manager.tokenizer)
        self._queue: list[Waiting] = []
        self._numbers = itertools.count()
        self._base = f"{OUR_RIDS}{time.time_ns():x}-"
        self._settled = False

    def accepts(self) -> bool:
        """Whether the manager is in its everyday state; paused, logging or dumping requests it is left to itself."""
        manager = self.manager
        return not (manager.is_pause or manager.request_logger.log_requests or manager.dump_requests_folder)

    async def vectors(self, asked: Asked, is_disconnected: Any) -> tuple[list[Any], int]:
        """One vector an item, in order, and the prompt tokens of all.

        Raises NotPlainError before anything was sent; ValueError and HTTPException as the stock path does after.
        """
        manager = self.manager
        manager.auto_create_handle_loop()
        async with manager.model_update_lock.reader_lock:
            loop = asyncio.get_running_loop()
            waiting = Waiting(asked, loop)
            if not self._queue:
                loop.call_soon(self._start_flush, loop)
            self._queue.append(waiting)
            try:
                while not await waiting.done_within(self.wait_timeout):
                    if await is_disconnected():
                        raise ValueError("Request is disconnected from the client side. Abort request")
            except BaseException:
                self._abandon(waiting)
                raise
        if not self._settled:
            self._settled = True
            loop.call_soon(self._settle, loop)
        return await self._results(waiting)

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once, after the first answer: what start-up left alive is never looked at by a collection again.

        A full collection walks what torch and transformers left alive, and no answer goes out meanwhile.
        The engine's own call freezes all three processes.
        """
        gc.collect()
        task = loop.create_task(self.manager.freeze_gc())
        self.manager.asyncio_tasks.add(task)
        task.add_done_callback(self.manager.asyncio_tasks.discard)

    async def _results(self, waiting: Waiting) -> tuple[list[Any], int]:
        vectors, prompt_tokens = [], 0
        for state in waiting.states:
            out = state.out_list[-1]
            meta = out["meta_info"]
            if isinstance(meta.get("finish_reason"), dict):
                await self.manager._handle_abort_finish_reason(out, state, False)
            vectors.append(out["embedding"])
            prompt_tokens += meta.get("prompt_tokens", 0)
        return vectors, prompt_tokens

    def _abandon(self, waiting: Waiting) -> None:
        """Take the items back that the scheduler has not answered; it answers an abort by dropping its part."""
        for state in waiting.states:
            if not state.finished:
                self.manager.abort_request(state.obj.rid)
        waiting.states.clear()

    def _start_flush(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._queue = self._queue, []
        task = loop.create_task(self._flush(batch))
        self.manager.asyncio_tasks.add(task)
        task.add_done_callback(self.manager.asyncio_tasks.discard)

    async def _flush(self, batch: list[Waiting]) -> None:
        try:
            ids = await self._ids([text for waiting in batch for text in waiting.asked.texts or ()])
        except Exception as error:
            for waiting in batch:
                waiting.fail(NotPlainError(str(error)))
            return
        tokenized: list[Any] = []
        sent: list[Waiting] = []
        for waiting in batch:
            items = waiting.asked.ids or [next(ids) for _ in waiting.asked.texts or ()]
            if waiting.future.done():  # its client left meanwhile
                continue
            try:
                tokenized += self._prepare(waiting, items)
                sent.append(waiting)
            except Exception as error:  # too long, dimensions out of range: the stock route says it in its words
                for state in waiting.states:
                    self.manager.rid_to_state.pop(state.obj.rid, None)
                waiting.states.clear()
                waiting.fail(NotPlainError(str(error)))
        if not tokenized:
            return
        try:
            if len(tokenized) == 1:
                sending = self.manager._send_one_request(tokenized[0])
            else:
                sending = self.manager._send_batch_request(tokenized)
            if inspect.isawaitable(sending):  # a coroutine from 0.5.20 on
                await sending
        except Exception as error:
            for waiting in sent:
                for state in waiting.states:
                    self.manager.rid_to_state.pop(state.obj.rid, None)
                waiting.states.clear()
                waiting.fail(NotPlainError(str(error)))

    async def _ids(self, texts: list[str]) -> Any:
        if not texts:
            return iter(())
        if sum(map(len, texts)) > THREAD_ABOVE_CHARACTERS:
            return iter(await asyncio.get_running_loop().run_in_executor(None, self._encode, texts))
        return iter(self._encode(texts))

    def _prepare(self, waiting: Waiting, items: list[list[int]]) -> list[Any]:
        """The scheduler's messages for one request; its states are in the manager's table afterwards."""
        manager, asked = self.manager, waiting.asked
        received = time.perf_counter()
        tokenized = []
        for index, ids in enumerate(items):
            text = asked.texts[index] if asked.texts is not None else None
            one = self._request_type(
                rid=f"{self._base}{next(self._numbers):012x}",  # one width: an abort takes every id it is a prefix of
                text=text,
                input_ids=None if text is not None else ids,
                sampling_params={"max_new_tokens": 0},
                dimensions=asked.dimensions,
                received_time=received,
            )
            one.is_single, one.batch_size = True, 1
            manager._set_default_priority(one)
            manager._init_req_state(one, None)
            state = manager.rid_to_state[one.rid]
            state.event = waiting
            waiting.states.append(state)
            manager._validate_one_request(one, ids)
            tokenized.append(manager._create_tokenized_object(one, text, ids))
        return tokenized
