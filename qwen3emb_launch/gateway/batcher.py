"""Texts of many requests become few engine calls; equal texts in the air become one.

Batches form by themselves: a text that finds an engine with a free slot leaves at once (a single client never waits),
and what arrives while calls are in the air leaves together. A further call waits for its equal part of all the items
there are, or until its oldest text has waited `wait` seconds (a call's usual time, where that is longer): an engine
with a full pass of work queued behind the one it runs never idles, and passes of equal size waste the least. Long texts
have slots of their own.

Embedding is idempotent: what an engine took down with it is sent again, to another one or when it is back. Each
failed or refused batch goes again in halves, so that one bad text is found and cannot fail its neighbours.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

import orjson

from qwen3emb_launch.gateway.answer import Vector
from qwen3emb_launch.gateway.api_errors import ApiError, from_engine
from qwen3emb_launch.gateway.cache import VectorCache
from qwen3emb_launch.gateway.http_client import Answer, EngineGoneError
from qwen3emb_launch.gateway.metrics import Metrics
from qwen3emb_launch.gateway.tokens import Prepared
from qwen3emb_launch.gateway.tracing import Tracing
from qwen3emb_launch.gateway.upstream import Upstream, UpstreamPool
from qwen3emb_launch.gateway.vectors_in import BadAnswerError, read_vectors
from qwen3emb_launch.gateway.waiting_room import WaitingRoom
from qwen3emb_launch.gateway.work import ESTIMATED, TOKEN_MASK, TRUNCATED, BatchLimits, Item, Wait

log = logging.getLogger(__name__)

SWEEP = 0.1
SMALL_BATCH = 4  # items that are not worth being divided among calls


class Batcher:
    """Takes items, makes calls, gives vectors. One to a process; not for threads."""

    def __init__(self, pool: UpstreamPool, cache: VectorCache, limits: BatchLimits, metrics: Metrics) -> None:
        self.pool = pool
        self.cache = cache
        self.limits = limits
        self.metrics = metrics
        self.tracing: Tracing | None = None
        self.on_vector: Any = None  # called with (key, vector, flags) of each new vector: the disk cache
        pool.on_change = self.kick
        self._room = WaitingRoom(limits)
        self._air: dict[bytes, Item] = {}
        self._waits: set[Wait] = set()
        self._flying = {False: 0, True: 0}  # items in calls, by kind
        self._usual = {False: 0.0, True: 0.0}  # seconds a call takes lately, by kind
        self._kicked = False
        self._timer: asyncio.TimerHandle | None = None
        self._calls: dict[asyncio.Task[None], tuple[Upstream, list[Item], float]] = {}
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.create_task(self._sweep())

    @property
    def queued(self) -> int:
        """Items waiting for a call."""
        return len(self._room)

    @property
    def waited_for(self) -> int:
        """Requests that wait for vectors."""
        return len(self._waits)

    @property
    def in_air(self) -> int:
        """Items in calls."""
        return self._flying[False] + self._flying[True]

    # -- in

    def admit(self, client: str, count: int) -> None:
        """Raise ApiError 429 when the queue, or the client's share of it, has no room for `count` more."""
        full = self._room.full_for(client, count)
        if full is not None:
            why, ahead = full
            seconds = min(60.0, ahead / max(1.0, self.metrics.items_per_second))
            raise ApiError(429, "overloaded", f"too much at once: {why}", retry_after=seconds)

    def submit(self, wait: Wait, index: int, key: bytes, prepared: Prepared) -> None:
        """Queue one input of a request, or join the equal one that is already on its way."""
        self._waits.add(wait)
        item = self._air.get(key)
        if item is not None:
            item.waiters.append((wait, index))
            wait.items.append(item)
            self.metrics.coalesced += 1
            return
        item = Item(key, prepared)
        item.waiters.append((wait, index))
        wait.items.append(item)
        self._air[key] = item
        self._room.push(item, wait)
        self.kick()

    def leave(self, wait: Wait) -> None:
        """The request is answered, failed or its client gone: what nobody else wants is dropped."""
        self._waits.discard(wait)
        if wait.left == 0:
            return
        for item in wait.items:
            item.waiters = [(w, i) for w, i in item.waiters if w is not wait]
        for item in self._room.drop(wait):
            if item.waiters:
                self._room.push(item, item.waiters[0][0])
            else:
                self._air.pop(item.key, None)
        for call in {item.call for item in wait.items if item.call is not None}:
            if call in self._calls and not any(item.waiters for item in self._calls[call][1]):
                call.cancel()
        wait.items.clear()

    # -- out

    def kick(self) -> None:
        """Look for calls to make once this round of the event loop is over: what arrives together leaves together."""
        if not self._kicked:
            self._kicked = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._kicked = False
        for long in (False, True):
            self._dispatch_kind(long)

    def _dispatch_kind(self, long: bool) -> None:
        queues = self._room.queues(long)
        while queues:
            queue = queues.pop(0)
            head, now = queue.peek(), monotonic()
            due = (head.queued_at if head else 0.0) + max(self.limits.wait, self._usual[long]) - now
            upstream = self.pool.pick(long, extra=due <= 0)
            part = self._room.part(long, self._flying[long], self.pool.calls * len(self.pool.up), now)
            if upstream is None or (due > 0 and upstream.slots.calls(long) and self._room.waiting(long) < part):
                if due > 0:
                    self._look_again_in(due)
                continue
            batch, unwanted = self._room.take(queue, max(part, SMALL_BATCH))
            for item in unwanted:
                self._air.pop(item.key, None)
            if batch:
                self._send(upstream, batch, long)
            if queue:
                queues.append(queue)

    def _look_again_in(self, seconds: float) -> None:
        """For the text that no ending call takes along before it has waited long enough."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._timer = None
        self._dispatch()

    def _send(self, upstream: Upstream, batch: list[Item], long: bool) -> None:
        slots = upstream.slots
        slots.items += len(batch)
        if long:
            slots.long += 1
        else:
            slots.short += 1
        self._flying[long] += len(batch)
        call = self._loop.create_task(self._call(upstream, batch, long))
        self._calls[call] = (upstream, batch, monotonic())
        for item in batch:
            item.call = call

    async def _call(self, upstream: Upstream, batch: list[Item], long: bool) -> None:
        """One engine call, from request to vectors given or items queued again."""
        inputs = [item.prepared.wire(upstream.takes_ids) for item in batch]
        body = orjson.dumps({"model": upstream.model, "input": inputs, "encoding_format": "base64"})
        began = monotonic()
        try:
            try:
                answer = await self._ask(upstream, batch, body)
            finally:
                self._landed(upstream, batch, long)
            took = monotonic() - began
            if answer.status == 200:
                self._dispatch()  # the engine first: what waits is on its way before the answers are written
                self._usual[long] += (took - self._usual[long]) / 8
            self._answered(upstream, batch, answer, began, took)
        except EngineGoneError as error:
            self.pool.gone(upstream, str(error))
            self._again(batch, error.sent, str(error))
        except TimeoutError:
            self.pool.gone(upstream, f"no answer within {self.limits.timeout:g} s")
            self._again(batch, True, "the engine did not answer in time")
        except BadAnswerError as error:
            self.pool.failed(upstream, str(error))
            self._again(batch, True, str(error))
        except asyncio.CancelledError:
            wanted = [item for item in batch if item.waiters]
            for item in batch:
                if not item.waiters:
                    self._air.pop(item.key, None)
            self._again(wanted, True, "the engine fell silent")
        except Exception:  # whatever it is, nobody may wait for ever
            log.exception("an engine call failed inside the gateway")
            self._again(batch, True, "the gateway failed; its log says why")
        self.kick()

    async def _ask(self, upstream: Upstream, batch: list[Item], body: bytes) -> Answer:
        """The call itself, in a span of its own when tracing is on."""
        if self.tracing is None:
            return await upstream.client.request("POST", "/embeddings", body, self.limits.timeout)
        causes = [wait.span for item in batch for wait, _ in item.waiters]
        tokens = sum(item.prepared.tokens for item in batch)
        span = self.tracing.call(upstream.url, upstream.model, len(batch), tokens, causes)
        error = ""
        try:
            header = self.tracing.header(span)
            answer = await upstream.client.request("POST", "/embeddings", body, self.limits.timeout, header)
            error = "" if answer.status == 200 else str(answer.status)
        except BaseException as exc:
            error = type(exc).__name__
            raise
        finally:
            self.tracing.call_ended(span, error)
        return answer

    def _landed(self, upstream: Upstream, batch: list[Item], long: bool) -> None:
        """A call is over, however it went."""
        upstream.slots.items -= len(batch)
        self._flying[long] -= len(batch)
        if long:
            upstream.slots.long -= 1
        else:
            upstream.slots.short -= 1
        call = asyncio.current_task()
        if call is not None:
            self._calls.pop(call, None)

    def _answered(self, upstream: Upstream, batch: list[Item], answer: Answer, began: float, took: float) -> None:
        status = answer.status
        if status == 200:
            vectors, total = read_vectors(answer.body, len(batch), self.pool.width)
            self.pool.answered(upstream)
            self.metrics.call(len(batch), sum(i.prepared.tokens for i in batch), took)
            for item, vector in zip(batch, vectors, strict=True):
                self._give(item, vector, self._flags(item, len(batch), total), began, took)
        elif status in (429, 503):
            self.pool.overloaded(upstream, _retry_after(answer))
            self._again(batch, False, f"the engine answered {status}")
        elif status in (400, 413, 422):
            self.pool.answered(upstream)
            self._refused(batch, from_engine(400 if status == 422 else status, _json(answer)))
        elif status >= 500:
            raise BadAnswerError(f"the engine answered {status}")
        else:  # 401, 403, 404: nothing the client could mend
            reason = from_engine(502, _json(answer))
            message = f"the engine refused the gateway itself ({status}): {reason.message}"
            self.pool.failed(upstream, message)
            for item in batch:
                self._fail(item, ApiError(502, "upstream_misconfigured", message, source="engine"))

    def _flags(self, item: Item, count: int, total: int) -> int:
        """An item's token count with its flags, as it is kept with the vector."""
        prepared = item.prepared
        tokens, exact = prepared.tokens, prepared.exact
        if not exact and count == 1 and total:
            tokens, exact = total, True
        return min(tokens, TOKEN_MASK) | (TRUNCATED if prepared.truncated else 0) | (0 if exact else ESTIMATED)

    def _give(self, item: Item, vector: Vector, flags: int, began: float, took: float) -> None:
        self._air.pop(item.key, None)
        self.cache.put(item.key, vector, flags)
        if self.on_vector is not None:
            self.on_vector(item.key, vector, flags)
        for wait, index in item.waiters:
            wait.give(index, vector, flags, began - item.queued_at, took)
        item.call = None

    def _refused(self, batch: list[Item], error: ApiError) -> None:
        """A refusal of a batch is one item's fault: halve until it is found. Its neighbours are answered."""
        if len(batch) == 1:
            self._fail(batch[0], error)
        else:
            self._again(batch, False, error.message, halved=True)

    def _wanted(self, item: Item) -> bool:
        item.waiters = [(w, i) for w, i in item.waiters if not w.future.done()]
        if not item.waiters:
            self._air.pop(item.key, None)
        return bool(item.waiters)

    def _again(self, batch: list[Item], counts: bool, reason: str, halved: bool = False) -> None:
        """Queue items again, in front, in smaller batches if they may be the cause; too many tries are a failure."""
        for item in reversed(batch):
            item.call = None
            if not self._wanted(item):
                continue
            if counts:
                item.attempts += 1
            if halved or item.attempts > 1:
                item.company = max(1, len(batch) // 2)
            if item.attempts >= self.limits.attempts:
                message = f"{item.attempts} tries failed, the last one: {reason}"
                self._fail(item, ApiError(502, "engine_failed", message, source="engine", retry_after=1))
                continue
            self.metrics.retries += 1
            self._room.push(item, item.waiters[0][0], front=True)

    def _fail(self, item: Item, error: ApiError) -> None:
        self._air.pop(item.key, None)
        item.call = None
        for wait, index in item.waiters:
            wait.fail(error.at(index, len(wait.results)))

    # -- time

    async def _sweep(self) -> None:
        """Deadlines of requests, the hold when no engine is up, engines that fell silent."""
        while True:
            await asyncio.sleep(SWEEP)
            now = monotonic()
            down_since = self.pool.unavailable_since
            for wait in list(self._waits):
                if now >= wait.deadline:
                    wait.fail(self._late(now - wait.started))
                elif down_since is not None and now - max(down_since, wait.started) >= self.limits.hold:
                    wait.fail(self._nobody(down_since, now))
            self._stalled(now)
            if self.queued:
                self.kick()

    def _late(self, waited: float) -> ApiError:
        return ApiError(504, "timeout", f"no vector within the {waited:.1f} s this request may take", retry_after=1)

    def _nobody(self, since: float, now: float) -> ApiError:
        states = "; ".join(f"{u.url} {u.state}: {u.reason}" for u in self.pool.upstreams.values()) or "there is none"
        log.warning("a request waited %.1f s in vain: %s", self.limits.hold, states)
        message = f"no engine has been up for {now - since:.0f} s; the request was held for {self.limits.hold:g} s"
        return ApiError(503, "no_engine", message, retry_after=5)

    def _stalled(self, now: float) -> None:
        """Calls of a silent engine are tried elsewhere, when there is an elsewhere."""
        for call, (upstream, _, began) in list(self._calls.items()):
            silent = now - max(upstream.last_answer, began)
            if silent > self.limits.stall and any(u is not upstream for u in self.pool.up):
                self.pool.gone(upstream, f"no answer for {silent:.0f} s with calls in the air")
                call.cancel()

    async def close(self) -> None:
        """Fail what is left and stop."""
        self._sweeper.cancel()
        for wait in list(self._waits):
            wait.fail(ApiError(503, "shutting_down", "the gateway is stopping", retry_after=1))
        for call in list(self._calls):
            call.cancel()
        if self._timer:
            self._timer.cancel()


def _json(answer: Answer) -> dict[str, Any] | None:
    try:
        data = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
    return data if isinstance(data, dict) else None


def _retry_after(answer: Answer) -> float:
    """Seconds to leave an overloaded engine alone: what it says, a tenth of a second otherwise."""
    said = answer.headers.get("retry-after", "")
    return min(5.0, float(said)) if said.isascii() and said.isdigit() and int(said) > 0 else 0.1
