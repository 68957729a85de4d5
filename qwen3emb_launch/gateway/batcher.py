"""Texts of many requests become few engine calls; equal texts in the air become one.

Batches form by themselves: a text that finds an engine with a free slot leaves at once (a single client never waits),
and what arrives while calls are in the air leaves together. A further call waits for its equal part of all the items
there are, or until its oldest text has waited `wait` seconds (a call's usual time, where that is longer): an engine
with a full pass of work queued behind the one it runs never idles, and passes of equal size waste the least. Long texts
have slots of their own.

Embedding is idempotent: what an engine took down with it is sent again, to another one or when it is back, but alone
there and in small parts, so that a text which ends engines is found after three deaths and fails by itself. A failed
batch goes again in parts, a refused one in halves.
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
from qwen3emb_launch.gateway.calls import Call, Calls, token_flags
from qwen3emb_launch.gateway.http_client import Answer, EngineGoneError
from qwen3emb_launch.gateway.killers import DEATHS, Killers
from qwen3emb_launch.gateway.metrics import Metrics
from qwen3emb_launch.gateway.tokens import Prepared
from qwen3emb_launch.gateway.tracing import Tracing
from qwen3emb_launch.gateway.upstream import PATIENCE, Upstream, UpstreamPool, UpstreamState
from qwen3emb_launch.gateway.vectors_in import BadAnswerError, most_bytes, read_vectors
from qwen3emb_launch.gateway.waiting_room import WaitingRoom
from qwen3emb_launch.gateway.work import BatchLimits, Item, Kind, Wait

log = logging.getLogger(__name__)

SWEEP = 0.1
SMALL_BATCH = 4  # items that are not worth being divided among calls
PARTS = 16  # a failed batch goes again in so many: the bad text of 128 is alone at the third try


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
        self._calls = Calls()
        self._killers = Killers()
        self._kicked = False
        self._timer: asyncio.TimerHandle | None = None
        self._clearing: float | None = None  # since when suspects wait for an engine to themselves
        self._preferred: float | None = None  # since when there have been suspects waiting, who go first
        self._owed: set[Kind] = set()  # those of which a call goes before the next one of suspects
        self.closed = False
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
        return sum(self._calls.items.values())

    # -- in

    def admit(self, client: str, count: int) -> None:
        """Raise ApiError 429 when the queue, or the client's share of it, has no room for `count` more."""
        full = self._room.full_for(client, count)
        if full is not None:
            why, ahead = full
            seconds = min(60.0, ahead / max(1.0, self.metrics.items_per_second))
            raise ApiError(429, "overloaded", f"too much at once: {why}", retry_after=seconds)

    def enter(self, wait: Wait) -> None:
        """A request that will submit its inputs: from now on its deadline is kept. `leave` must follow."""
        self._waits.add(wait)

    def submit(self, wait: Wait, index: int, key: bytes, prepared: Prepared) -> None:
        """Queue one input of a request, or join the equal one that is already on its way.

        Raises ApiError 502 for one that was seen to end engines a while ago.
        """
        if self._killers.known(key):
            raise self._killers.error(again=False).at(index, 1)
        item = self._air.get(key)
        if item is not None:
            item.waiters.append((wait, index))
            wait.items.append(item)
            self.metrics.coalesced += 1
            return
        item = Item(key, prepared)
        item.deaths = self._killers.deaths(key)  # of an earlier request with it
        if item.suspect:
            item.company = max(1, self.limits.items // PARTS**item.deaths)
        item.waiters.append((wait, index))
        wait.items.append(item)
        self._air[key] = item
        self._room.push(item, wait)
        self.kick()

    def leave(self, wait: Wait) -> None:
        """The request is answered, failed or its client gone: what nobody else wants is dropped."""
        self._waits.discard(wait)
        if wait.left == 0:
            wait.items.clear()  # each knows the other: left so, text and vector stay until cycles are looked for
            return
        for item in wait.items:
            item.waiters = [(w, i) for w, i in item.waiters if w is not wait]
        for item in self._room.drop(wait):
            if item.waiters:
                self._room.push(item, item.waiters[0][0])
            else:
                self._air.pop(item.key, None)
        for call in {item.call for item in wait.items if item.call is not None}:
            if call in self._calls.air and not call.wanted:
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
        if self._room:
            impatient = self._impatient()
            for kind in self._room.kinds():
                self._dispatch_kind(kind, impatient)

    def _dispatch_kind(self, kind: Kind, impatient: bool) -> None:
        queues = self._room.queues(kind)
        while queues:
            cleared = None
            if kind is Kind.SUSPECT:
                if any(self._room.waiting(other) for other in self._owed):
                    return
            elif not impatient and kind not in self._owed and self._room.waiting(Kind.SUSPECT):
                cleared = self.pool.quietest()  # left to fall idle, for them
            queue = queues.pop(0)
            head, now = queue.peek(), monotonic()
            due = (head.queued_at if head else 0.0) + max(self.limits.wait, self._calls.usual[kind]) - now
            upstream = self.pool.pick(kind, extra=impatient if kind is Kind.SUSPECT else due <= 0, but=cleared)
            part = self._room.part(kind, self._calls.items[kind], self.pool.calls * len(self.pool.up), now)
            if upstream is None or (due > 0 and upstream.slots.calls[kind] and self._room.waiting(kind) < part):
                if due > 0:
                    self._look_again_in(due)
                continue
            batch, unwanted = self._room.take(queue, max(part, SMALL_BATCH))
            for item in unwanted:
                self._air.pop(item.key, None)
            if batch:
                self._send(upstream, batch, kind)
            if queue:
                queues.append(queue)

    def _impatient(self) -> bool:
        """Whether suspects have waited for too long for an engine to fall idle: then they go where others are."""
        if not (self._room.waiting(Kind.SUSPECT) and self.pool.up):
            self._clearing = self._preferred = None
            self._owed.clear()
        else:
            self._clearing = self._clearing or monotonic()
            self._preferred = self._preferred or self._clearing
        return self._clearing is not None and monotonic() - self._clearing > PATIENCE

    def _look_again_in(self, seconds: float) -> None:
        """For the text that no ending call takes along before it has waited long enough."""
        if self._timer is None:
            self._timer = self._loop.call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._timer = None
        self._dispatch()

    def _send(self, upstream: Upstream, batch: list[Item], kind: Kind) -> None:
        self._owed.discard(kind)
        if kind is Kind.SUSPECT:
            self._clearing = None
            if self._preferred is not None and monotonic() - self._preferred > PATIENCE:
                self._owed = {Kind.SHORT, Kind.LONG}  # suspects may be many: from now on they take turns with others
        call = self._calls.take_off(upstream, batch, kind)
        call.task = self._loop.create_task(self._make(call))
        call.task.add_done_callback(lambda _: self._over(call))

    def _over(self, call: Call) -> None:
        """One that was given up before its first step has nobody else to clean up after it."""
        if call in self._calls.air:
            self._calls.land(call)
            self._again(call.batch, False, "given up")

    async def _make(self, call: Call) -> None:
        """One engine call, from request to vectors given or items queued again."""
        upstream, batch = call.upstream, call.batch
        began = monotonic()
        try:
            try:
                inputs = [item.prepared.wire(upstream.takes_ids) for item in batch]
                body = orjson.dumps({"model": upstream.model, "input": inputs, "encoding_format": "base64"})
                most, timeout = most_bytes(len(batch), self.cache.width), self.limits.timeout
                if self.tracing is None:
                    answer = await upstream.client.request("POST", "/embeddings", body, timeout, most=most)
                else:
                    answer = await self.tracing.traced(upstream.client, upstream.model, body, timeout, most, batch)
            finally:
                self._calls.land(call)
            took = monotonic() - began
            if answer.status == 200:
                self._dispatch()  # the engine first: what waits is on its way before the answers are written
                self._calls.took(call, took)
            self._answered(upstream, batch, answer, began, took)
        except EngineGoneError as error:
            self.pool.gone(upstream, str(error))
            self._again(batch, error.sent, str(error), died=error.sent, alone=call.to_itself)
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
                    item.call = None  # which knows its items
                    self._air.pop(item.key, None)
            self._again(wanted, True, "the engine fell silent")
        except Exception:  # whatever it is, nobody may wait for ever
            log.exception("an engine call failed inside the gateway")
            self._again(batch, True, "the gateway failed; its log says why")
        if self._room:
            self.kick()

    def _answered(self, upstream: Upstream, batch: list[Item], answer: Answer, began: float, took: float) -> None:
        status = answer.status
        if status == 200:
            vectors, total = read_vectors(answer.body, len(batch), self.pool.width)
            self.pool.answered(upstream)
            self.metrics.call(len(batch), sum(i.prepared.tokens for i in batch), took)
            for item, vector, (kept, told) in zip(batch, vectors, token_flags(batch, total), strict=True):
                self._give(item, vector, kept, told, began, took)
        elif status in (429, 503):
            self.pool.overloaded(upstream, answer.retry_after())
            self._again(batch, False, f"the engine answered {status}")
        elif status == 408:  # a proxy took the connection for idle
            self._again(batch, True, "the engine answered 408")
        elif status in (400, 413, 422):
            self.pool.answered(upstream)
            self._refused(batch, from_engine(400 if status == 422 else status, answer.json()))
        elif status >= 500:
            raise BadAnswerError(f"the engine answered {status}")
        else:  # 401, 403, 404: nothing the client could mend
            reason = from_engine(status, answer.json())
            message = f"the engine refused the gateway itself ({status}): {reason.message}"
            self.pool.failed(upstream, message)
            for item in batch:
                self._fail(item, ApiError(502, "upstream_misconfigured", message, source="engine"))

    def _give(self, item: Item, vector: Vector, kept: int, told: int, began: float, took: float) -> None:
        self._air.pop(item.key, None)
        if item.suspect:
            self._killers.clear(item.key)
        self.cache.put(item.key, vector, kept)
        if self.on_vector is not None:
            self.on_vector(item.key, vector, kept)
        for wait, index in item.waiters:
            wait.give(index, vector, told, began, began + took)
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

    def _again(
        self, batch: list[Item], counts: bool, reason: str, *, halved: bool = False, died: bool = False,
        alone: bool = False,
    ) -> None:  # fmt: skip
        """Queue items again, in front, in smaller batches if they may be the cause; too many tries are a failure.

        `died`: the engine went with them, `alone`: and with nothing else. Who was there before then is the cause.
        """
        for item in reversed(batch):
            item.call = None
            if died and self._ended(item, alone and len(batch) == 1):
                self._fail(item, self._killers.error(again=True))
                continue
            if not self._wanted(item):
                continue
            item.attempts += counts
            if halved or counts:
                item.company = max(1, len(batch) // (2 if halved else PARTS))
            if item.attempts >= self.limits.attempts:
                message = f"{item.attempts} tries failed, the last one: {reason}"
                self._fail(item, ApiError(502, "engine_failed", message, source="engine", retry_after=1))
                continue
            self.metrics.retries += 1
            self._room.push(item, item.waiters[0][0], front=True)

    def _ended(self, item: Item, alone: bool) -> bool:
        """An engine ended with it; whether it is proved to be why. Noted even when nobody wants it any more: clients
        give up after a while and ask again."""
        item.deaths += 1
        if alone and item.deaths >= DEATHS:
            self._killers.add(item.key)
            return True
        self._killers.suspect(item.key, item.deaths)
        return False

    def _fail(self, item: Item, error: ApiError) -> None:
        self._air.pop(item.key, None)
        item.call = None
        for wait, index in item.waiters:
            wait.fail(error.at(index, 1))  # its place in the whole request is named there

    # -- time

    async def _sweep(self) -> None:
        """Deadlines of requests, the hold when no engine is up, engines that fell silent."""
        while True:
            await asyncio.sleep(SWEEP)
            try:
                self._look(monotonic())
            except Exception:  # a sweep that ended would leave every deadline unkept
                log.exception("a look at the deadlines failed inside the gateway")

    def _look(self, now: float) -> None:
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
        refused = next((u.reason for u in self.pool.upstreams.values() if u.state is UpstreamState.REFUSED), None)
        if refused:
            message += f"; one that lives is refused: {refused}"
        return ApiError(503, "no_engine", message, retry_after=5)

    def _stalled(self, now: float) -> None:
        """Calls of a silent engine are tried elsewhere, when there is an elsewhere."""
        for call in list(self._calls.air):
            upstream = call.upstream
            silent = now - max(upstream.last_answer, call.began)
            if silent > self.limits.stall and any(u is not upstream for u in self.pool.up):
                self.pool.gone(upstream, f"no answer for {silent:.0f} s with calls in the air")
                call.cancel()

    async def close(self) -> None:
        """Fail what is left and stop."""
        self.closed = True
        self._sweeper.cancel()
        for wait in list(self._waits):
            wait.fail(ApiError(503, "shutting_down", "the gateway is stopping", retry_after=1))
        for call in list(self._calls.air):
            call.cancel()
        if self._timer:
            self._timer.cancel()
