"""`POST /v1/embeddings`: from a request's bytes to an answer's, by the shortest way there is.

All inputs cached: answered within this call, no task, no await. Otherwise the missing ones are counted, checked,
batched and waited for. What is large is done in steps, so that it holds nobody else back for longer than one takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from qwen3emb_launch.gateway.answer import Encoding, Vector, embeddings, encode, shrink
from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.gateway.batcher import Batcher
from qwen3emb_launch.gateway.cache import Keyer, VectorCache
from qwen3emb_launch.gateway.http_messages import JSON, Request, Response
from qwen3emb_launch.gateway.keys import Client
from qwen3emb_launch.gateway.large_body import parse_large
from qwen3emb_launch.gateway.metrics import Metrics
from qwen3emb_launch.gateway.request import EmbeddingRequest, parse
from qwen3emb_launch.gateway.tasks import Chosen, TaskTable
from qwen3emb_launch.gateway.tokens import Prepared, TokenRules, estimate
from qwen3emb_launch.gateway.work import ESTIMATED, TOKEN_MASK, TRUNCATED, Wait

MAX_SHOWN = 200  # indexes of truncated inputs a header lists
STEP = 32  # inputs looked up or answered in one go: a wide vector as text takes 0.1 ms
LARGE = 512 << 10  # bytes of a body that are parsed in one go
INLINE_IDS = 1_000  # token ids that are checked on the event loop


class SecondLevel(Protocol):
    """The cache on disk."""

    def get(self, key: bytes) -> tuple[Vector, int] | None:
        """The vector and its flags."""

    def put(self, key: bytes, vector: Vector, flags: int) -> None:
        """Keep it, some time soon."""


@dataclass
class Model:
    """What is known once the first engine has proved itself."""

    width: int
    cache: VectorCache
    keyer: Keyer
    batcher: Batcher
    disk: SecondLevel | None = None


@dataclass
class Served:
    """For the access log and the metrics: what a request came to."""

    items: int = 0
    tokens: int = 0
    hits: int = 0
    task: str = ""
    span: Any = None  # OpenTelemetry's, when tracing is on


@dataclass(slots=True)
class Job:
    """One request on its way."""

    request: Request
    asked: EmbeddingRequest
    chosen: Chosen
    client: Client
    served: Served
    refresh: bool = False  # computed anew, whatever the caches know
    counted: bool = False  # in the rates and metrics: one that is begun anew is not counted again


class Embeddings:
    """The endpoint. `model` is set once an engine is up; until then requests wait for `known`."""

    def __init__(
        self, rules: TokenRules, metrics: Metrics, *, names: tuple[str, ...], min_dims: int, max_items: int,
        hold: float, timeout: float,
    ) -> None:  # fmt: skip
        self.rules = rules
        self.metrics = metrics
        self.names = names
        self.min_dims = min_dims
        self.max_items = max_items
        self.hold = hold
        self.timeout = timeout
        self.tasks = TaskTable({})
        self.model: Model | None = None
        self.known = asyncio.Event()

    def handle(self, request: Request, client: Client, served: Served) -> Response | Awaitable[Response]:
        """Answer now or later. Raises ApiError."""
        if len(request.body) > LARGE:
            return self._handle_large(request, client, served)
        return self._handle(request, parse(request.body, self.max_items), client, served)

    async def _handle_large(self, request: Request, client: Client, served: Served) -> Response:
        answer = self._handle(request, await parse_large(request.body, self.max_items), client, served)
        return answer if isinstance(answer, Response) else await answer

    def _handle(
        self, request: Request, asked: EmbeddingRequest, client: Client, served: Served
    ) -> Response | Awaitable[Response]:
        served.items = asked.count
        headers = request.headers
        chosen = self.tasks.choose(asked.model, headers.get("x-embedding-task"), headers.get("x-embedding-role"))
        if self.names and chosen.model not in self.names:
            known = ", ".join(self.names)
            raise ApiError(
                404, "model_not_found", f"no model {chosen.model[:80]!r} here: there is {known}", param="model"
            )
        served.task = chosen.task.name if chosen.task else ""
        job = Job(request, asked, chosen, client, served, headers.get("x-qwen3emb-cache") == "refresh")
        return self._when_known(job) if self.model is None else self._embed(self.model, job)

    async def _when_known(self, job: Job) -> Response:
        """No engine has been up yet, or none of the new model: not even the width is known."""
        try:
            async with asyncio.timeout(max(0.0, job.request.received + self.hold - monotonic())):
                await self.known.wait()
        except TimeoutError:
            message = f"no engine has been up yet; the request was held for {self.hold:g} s"
            raise ApiError(503, "no_engine", message, retry_after=5) from None
        if self.model is None:  # the model was changed within this very turn of the loop
            raise ApiError(503, "model_changes", "the model is being changed", retry_after=1)
        answer = self._embed(self.model, job)
        return answer if isinstance(answer, Response) else await answer

    def _embed(self, model: Model, job: Job) -> Response | Awaitable[Response]:
        asked, chosen = job.asked, job.chosen
        reply = _Reply(asked.encoding, self._dims(asked, chosen, model.width), asked.count)
        if asked.count > STEP or (asked.ids and sum(map(len, asked.ids)) > INLINE_IDS):
            return self._embed_in_steps(model, job, reply)
        payloads = self._payloads(asked, chosen)
        self._look_up(model, job, reply, payloads, 0)
        return self._rest(model, job, reply, payloads)

    async def _embed_in_steps(self, model: Model, job: Job, reply: _Reply) -> Response:
        asked, chosen = job.asked, job.chosen
        if asked.ids:  # each list is turned into text and back, to see whose ids they are
            payloads = await asyncio.to_thread(self._payloads, asked, chosen)
        else:
            payloads = self._payloads(asked, chosen)
        for start in range(0, asked.count, STEP):
            self._look_up(model, job, reply, payloads[start : start + STEP], start)
            await asyncio.sleep(0)
        answer = self._rest(model, job, reply, payloads)
        return answer if isinstance(answer, Response) else await answer

    def _look_up(self, model: Model, job: Job, reply: _Reply, payloads: Sequence[str | Prepared], start: int) -> None:
        """What the caches know of some inputs, the first of which is the request's input number `start`."""
        keyer, cache, disk = model.keyer, model.cache, model.disk
        hits, hit = self.metrics.hits, 0 if job.counted else 1
        for index, payload in enumerate(payloads, start):
            key = keyer.text(payload) if isinstance(payload, str) else keyer.prepared(payload)
            if job.refresh:
                reply.missing.append((index, key))
                continue
            found = cache.get(key)
            if found is not None:
                hits["memory"] += hit
            elif disk is not None and (found := self._on_disk(disk, key, payload)) is not None:
                hits["disk"] += hit
                cache.put(key, *found)
            if found is None:
                reply.missing.append((index, key))
            else:
                reply.add(index, found[0], _flags(payload, found[1]))

    def _on_disk(self, disk: SecondLevel, key: bytes, payload: str | Prepared) -> tuple[Vector, int] | None:
        """A text that was cut at another length in an earlier run, or would not be cut now, has another vector now."""
        found = disk.get(key)
        if found is None or not found[1] & TRUNCATED or not isinstance(payload, str):
            return found
        same = self.rules.overflow == "truncate" and found[1] & TOKEN_MASK == self.rules.max_tokens
        return found if same else None

    def _rest(
        self, model: Model, job: Job, reply: _Reply, payloads: Sequence[str | Prepared]
    ) -> Response | Awaitable[Response]:
        """After the caches: the answer, or what will bring it. Raises ApiError 429."""
        client, served, missing = job.client, job.served, reply.missing
        served.hits = len(payloads) - len(missing)
        if not job.counted:
            job.counted = True
            self.metrics.cached_tokens += reply.tokens
            if client.requests.per_minute or client.tokens.per_minute:
                client.check_rate(sum(estimate(p) if isinstance(p, str) else p.tokens for p in payloads))
            self.metrics.misses += len(missing)
        if missing:
            wait = self._wait(model, client, job.request, len(missing))
            wait.span = served.span
            return self._misses(model, wait, job, reply, [payloads[i] for i, _ in missing])
        received = job.request.received
        self.metrics.answered(monotonic() - received, 0.0, 0.0, received)
        return self._answer(job.asked, reply, served)

    def _wait(self, model: Model, client: Client, request: Request, count: int) -> Wait:
        """A place in the queue. Raises ApiError 429."""
        whose = client.name or request.peer  # without keys, fair shares go by address
        model.batcher.admit(whose, count)
        return Wait(whose, count, request.received + self.timeout, asyncio.get_running_loop())

    async def _misses(
        self, model: Model, wait: Wait, job: Job, reply: _Reply, payloads: Sequence[str | Prepared]
    ) -> Response:
        """The rest of a request: `payloads` are the missing inputs."""
        count, batcher, missing = job.asked.count, model.batcher, reply.missing
        if batcher.closed:  # the model was changed since this was put off
            return await self._when_known(job)
        try:
            batcher.enter(wait)
            prepared = await self._prepare(wait, batcher, payloads, reply, count)
            try:
                if not wait.future.done():
                    wait.submitted = monotonic()
                    for slot, (_, key) in enumerate(missing):
                        batcher.submit(wait, slot, key, prepared[slot])
                results = await wait.future
                if isinstance(results, ApiError):
                    raise results.again()  # the one that the future holds is never raised: see Wait
            except ApiError as error:
                raise (error if error.index is None else error.at(missing[error.index][0], count)) from None
        finally:
            batcher.leave(wait)
        for slot, (vector, flags) in enumerate(results, 1):
            reply.add(missing[slot - 1][0], vector, _flags(payloads[slot - 1], flags))
            if not slot % STEP:
                await asyncio.sleep(0)
        received = job.request.received
        self.metrics.answered(monotonic() - received, wait.queued, wait.engine, received)
        return self._answer(job.asked, reply, job.served)

    async def _prepare(
        self, wait: Wait, batcher: Batcher, payloads: Sequence[str | Prepared], reply: _Reply, count: int
    ) -> list[Prepared]:
        """Token counts of the missing texts; the first that is too long is the request's error, named by index."""
        ready = [p for p in payloads if isinstance(p, Prepared)]
        if ready:
            return ready
        out: list[Prepared] = []
        texts = [p for p in payloads if isinstance(p, str)]
        if self.rules.quick(texts):
            counted = self.rules.texts_now(texts)
        else:
            counted = await asyncio.to_thread(self.rules.texts_now, texts)
            batcher.admit(wait.client, len(texts))  # again: others came in meanwhile
        for (index, _), one in zip(reply.missing, counted, strict=True):
            if isinstance(one, ApiError):
                raise one.at(index, count)
            out.append(one)
        return out

    def _dims(self, asked: EmbeddingRequest, chosen: Chosen, width: int) -> int | None:
        """Numbers wanted, None for the full width."""
        dims, whose = asked.dimensions, "'dimensions'"
        if dims is None and chosen.task is not None and chosen.task.dims is not None:
            dims, whose = chosen.task.dims, f"task {chosen.task.name!r}: dims"
        if dims is None or dims == width:
            return None
        least = min(self.min_dims, width)
        if not least <= dims <= width:
            raise invalid(f"{whose} {dims} is outside {least}..{width}", "dimensions", "bad_dimensions")
        return dims

    def _payloads(self, asked: EmbeddingRequest, chosen: Chosen) -> Sequence[str | Prepared]:
        """The exact texts with their instruction, or checked token ids with their EOS."""
        task = chosen.task
        if asked.texts:
            return asked.texts if task is None else [task.apply(text, chosen.role) for text in asked.texts]
        if task is not None and task.instruction is not None and (chosen.role or task.role) == "query":
            raise invalid(
                f"task {task.name!r} puts an instruction before the text, which token ids do not allow: send text",
                "input",
                "ids_with_task",
            )
        out: list[Prepared] = []
        for index, ids in enumerate(asked.ids):
            try:
                out.append(self.rules.ids(ids))
            except ApiError as error:
                raise error.at(index, len(asked.ids)) from None
        return out

    def _answer(self, asked: EmbeddingRequest, reply: _Reply, served: Served) -> Response:
        count = len(reply.encoded)
        served.tokens = reply.tokens
        self.metrics.items += count
        self.metrics.tokens += reply.tokens
        word = "hit" if served.hits == count else "partial" if served.hits else "miss"
        headers = {"x-qwen3emb-cache": word, "x-qwen3emb-cache-hits": f"{served.hits}/{count}"}
        if reply.cut:
            shown = sorted(reply.cut)[:MAX_SHOWN]
            headers["x-qwen3emb-truncated"] = ",".join(map(str, shown)) + (",..." if len(reply.cut) > MAX_SHOWN else "")
        if reply.flags & ESTIMATED:
            headers["x-qwen3emb-usage"] = "estimated"
        return Response(200, embeddings(reply.encoded, asked.model, reply.tokens), JSON, headers)


def _flags(payload: str | Prepared, kept: int) -> int:
    """The flags of one input. Token ids that were cut are those of a list that fits: which it was, each says itself."""
    if isinstance(payload, str):
        return kept
    return kept | TRUNCATED if payload.truncated else kept & ~TRUNCATED


class _Reply:
    """An answer as it fills: encoded vectors in their places, tokens, what was cut, and what no cache knows."""

    __slots__ = ("_dims", "_encoding", "cut", "encoded", "flags", "missing", "tokens")

    def __init__(self, encoding: Encoding, dims: int | None, count: int) -> None:
        self._encoding: Encoding = encoding
        self._dims = dims
        self.encoded = [b""] * count
        self.tokens = 0
        self.flags = 0
        self.cut: list[int] = []
        self.missing: list[tuple[int, bytes]] = []  # its index and cache key

    def add(self, index: int, vector: Vector, flags: int) -> None:
        """A vector found its place."""
        self.encoded[index] = encode(shrink(vector, self._dims), self._encoding)
        self.tokens += flags & TOKEN_MASK
        self.flags |= flags
        if flags & TRUNCATED:
            self.cut.append(index)
