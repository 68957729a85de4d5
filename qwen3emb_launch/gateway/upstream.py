"""The engines behind the gateway: which are alive, which has the least to do, and whether they mean the same vectors.

An upstream is proved by a real embedding before it gets traffic, and again after every failure. Its probe vector must
agree with the one that the first upstream gave: a different model on a restarted port is refused, not mixed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from time import monotonic
from typing import Any

import numpy as np
import orjson

from qwen3emb_launch.gateway.answer import Vector
from qwen3emb_launch.gateway.http_client import Address, Answer, EngineGoneError, HttpClient, Watch
from qwen3emb_launch.gateway.tokens import Prepared
from qwen3emb_launch.gateway.vectors_in import BadAnswerError, read_vectors
from qwen3emb_launch.gateway.work import Kind

log = logging.getLogger(__name__)

PROBE_TEXT = "Which vectors do you make?"
SAME_MODEL_COSINE = 0.99
# Float8 roundings fall otherwise in a batch: 0.037 apart by random weights of the 8B's shape, on an H200. What
# `verify` warns of up to (verify/noise.py).
SAME_MODEL_COSINE_FP8 = 0.92
SAME_IDS_COSINE = 0.999  # a text and its own ids; bf16 batches of other shapes differ by less
PROBE_FIRST, PROBE_LONGEST, PROBE_TIMEOUT = 0.1, 1.0, 30.0
INFO_TIMEOUT = 2.0  # what an engine says of itself is not waited for like its vectors
FAILURES_TO_DOWN = 3
DOUBT = 0.05  # seconds in which a process that ends loses all its connections
PATIENCE = 2.0  # seconds: for calls of suspects to have an engine to themselves, and for all others to leave it to them


WORSE = ("up", "draining", "down", "refused")
COUNTS = ("calls", "items", "answered", "failed")


@dataclass(frozen=True)
class Arithmetic:
    """What an engine says that it computes in; None is not told."""

    dtype: str | None = None
    quantization: str | None = None


class UpstreamState(StrEnum):
    """Whether an upstream gets traffic."""

    DOWN = "down"  # not proved yet, or failed; probed until it answers
    UP = "up"
    DRAINING = "draining"  # finishes what it has, gets nothing new
    REFUSED = "refused"  # alive, but its vectors are another model's


@dataclass
class Slots:
    """Calls in the air of one upstream, each kind apart, so that long texts never hold short ones back."""

    calls: list[int] = field(default_factory=lambda: [0] * len(Kind))  # by kind
    total: int = 0
    items: int = 0
    made: int = 0  # calls so far
    alone_since: float = 0.0  # when the last call of suspects took off

    def take_off(self, kind: Kind, items: int) -> None:
        """One more call."""
        self.calls[kind] += 1
        self.total += 1
        self.items += items
        self.made += 1
        if kind is Kind.SUSPECT:
            self.alone_since = monotonic()

    def land(self, kind: Kind, items: int) -> None:
        """One call less."""
        self.calls[kind] -= 1
        self.total -= 1
        self.items -= items


class Upstream:
    """One engine."""

    def __init__(self, address: Address, api_key: str | None, verify_tls: bool = True) -> None:
        self.address = address
        self.client = HttpClient(address, api_key, verify_tls)
        self.state = UpstreamState.DOWN
        self.reason = "not probed yet"
        self.slots = Slots()
        self.model = ""
        self.context_length: int | None = None
        self.arithmetic = Arithmetic()
        self.takes_ids = False  # it makes the same ids of a text as this gateway's tokenizer, and takes them
        self.failures = 0
        self.not_before = 0.0  # an overloaded engine is left alone until then
        self.last_answer = monotonic()
        self.answered_calls = 0
        self.failed_calls = 0
        self.prober: asyncio.Task[None] | None = None
        self.watch: Watch | None = None
        self.doubter: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The base URL, as it was given."""
        return self.address.url

    @property
    def load(self) -> tuple[int, int]:
        """What the next call goes by: items in the air, then calls so far."""
        return self.slots.items, self.answered_calls

    def describe(self) -> dict[str, Any]:
        """For `/ready`, the admin socket and the status page."""
        return {
            "url": self.url,
            "state": str(self.state),
            "reason": self.reason,
            "model": self.model,
            "takes_ids": self.takes_ids,
            "calls": self.slots.total,
            "items": self.slots.items,
            "answered": self.answered_calls,
            "failed": self.failed_calls,
        }


class UpstreamPool:
    """All upstreams. `on_change` is called whenever one may have become usable, or all have gone."""

    def __init__(
        self,
        *,
        calls: int = 4,
        extra_calls: int = 4,
        model: str | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls = calls
        self.extra_calls = extra_calls
        self.on_change = on_change
        self.upstreams: dict[str, Upstream] = {}
        self.width: int | None = None
        self.reference: Vector | None = None
        self.unavailable_since: float | None = monotonic()
        self._model = model
        self.samples: Callable[[], list[Prepared]] = list  # texts with their ids, empty when ids are not to be sent

    # -- membership

    def add(self, address: Address, api_key: str | None = None, verify_tls: bool = True) -> Upstream:
        """Add an engine, or bring a draining one back; it gets traffic once it has proved itself."""
        known = self.upstreams.get(address.url)
        if known is not None:
            if known.state is UpstreamState.DRAINING:
                self._down(known, "brought back")
            return known
        upstream = Upstream(address, api_key, verify_tls)
        self.upstreams[address.url] = upstream
        self._down(upstream, "not probed yet")
        return upstream

    async def drain(self, url: str, timeout: float) -> bool:
        """Give it nothing new and wait for what it has; True when nothing is left in the air."""
        upstream = self.upstreams.get(url)
        if upstream is None:
            return True
        if upstream.prober is not None:
            upstream.prober.cancel()  # nor may its vector become the reference of a model that comes meanwhile
        self._move(upstream, UpstreamState.DRAINING, "asked to drain")
        deadline = monotonic() + timeout
        while upstream.slots.total and monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not upstream.slots.total

    async def remove(self, url: str, timeout: float) -> bool:
        """Drain it and forget it."""
        drained = await self.drain(url, timeout)
        upstream = self.upstreams.pop(url, None)
        if upstream is not None:
            self._close(upstream)
            self._availability()
        return drained

    def forget_reference(self) -> None:
        """The model is about to change on purpose: the next upstream to prove itself sets the reference."""
        self.reference = None
        self.width = None
        for upstream in self.upstreams.values():
            if upstream.state is not UpstreamState.DRAINING:
                self._down(upstream, "the model changes")

    def close(self) -> None:
        """Stop probing, close connections."""
        for upstream in self.upstreams.values():
            self._close(upstream)

    def _close(self, upstream: Upstream) -> None:
        for task in (upstream.prober, upstream.doubter):
            if task is not None:
                task.cancel()
        self._unwatch(upstream)
        upstream.client.close()

    def _unwatch(self, upstream: Upstream) -> None:
        if upstream.watch is not None:
            upstream.watch.close()
            upstream.watch = None

    def _lost(self, upstream: Upstream) -> None:
        """The watching connection ended: the process did, or something on the way dislikes idle connections."""
        if upstream.state is UpstreamState.UP and (upstream.doubter is None or upstream.doubter.done()):
            upstream.doubter = asyncio.get_running_loop().create_task(self._doubt(upstream))

    async def _doubt(self, upstream: Upstream) -> None:
        """Watch it anew where other connections show that its process lives; else prove it again."""
        alive = await upstream.client.same_process(DOUBT)
        if upstream.state is not UpstreamState.UP:
            return
        watch = None
        if alive:
            with contextlib.suppress(EngineGoneError):
                watch = await upstream.client.watch(lambda: self._lost(upstream))
        if upstream.state is not UpstreamState.UP:
            if watch is not None:
                watch.close()
        elif watch is None or not watch.alive:
            self._down(upstream, "it closed the watching connection")
        else:
            self._unwatch(upstream)
            upstream.watch = watch

    # -- choice

    @property
    def up(self) -> list[Upstream]:
        """Those that get traffic."""
        return [u for u in self.upstreams.values() if u.state is UpstreamState.UP]

    @property
    def arithmetic(self) -> Arithmetic:
        """What those that get traffic compute in, where they all say the same."""
        said = {u.arithmetic for u in self.up}
        return said.pop() if len(said) == 1 else Arithmetic()

    def pick(self, kind: Kind, extra: bool = False, but: Upstream | None = None) -> Upstream | None:
        """The upstream with the fewest items in the air among those with a free slot; None when all are full.

        `extra` lends slots beyond the usual ones: what waited too long goes out now. A call of suspects wants an idle
        upstream, or with `extra` one without suspects, and keeps others away for a while. `but` is not taken.
        """
        limit = self.calls + (self.extra_calls if extra else 0)
        best: Upstream | None = None
        now = 0.0
        for upstream in self.upstreams.values():
            slots = upstream.slots
            if upstream.state is not UpstreamState.UP or upstream is but or slots.calls[kind] >= limit:
                continue
            if slots.total and kind is Kind.SUSPECT and (slots.calls[Kind.SUSPECT] or not extra):
                continue
            if slots.calls[Kind.SUSPECT] and monotonic() - slots.alone_since < PATIENCE:
                continue
            if upstream.not_before:
                now = now or monotonic()
                if upstream.not_before > now:
                    continue
                upstream.not_before = 0.0
            if best is None or upstream.load < best.load:
                best = upstream
        return best

    def quietest(self) -> Upstream | None:
        """The upstream with the fewest items in the air, full or not."""
        return min(self.up, key=lambda u: u.load, default=None)

    # -- health

    def answered(self, upstream: Upstream) -> None:
        """A call was answered."""
        upstream.failures = 0
        upstream.answered_calls += 1
        upstream.last_answer = monotonic()

    def gone(self, upstream: Upstream, reason: str) -> None:
        """Its connection broke or it did not answer in time: nothing more until it has proved itself again."""
        upstream.failed_calls += 1
        if upstream.state is UpstreamState.UP:
            log.warning("upstream %s is down: %s", upstream.url, reason)
            self._down(upstream, reason)

    def failed(self, upstream: Upstream, reason: str) -> None:
        """It answered with a fault of its own (5xx, nonsense)."""
        upstream.failures += 1
        upstream.failed_calls += 1
        if upstream.failures >= FAILURES_TO_DOWN and upstream.state is UpstreamState.UP:
            log.warning("upstream %s is down after %d faults: %s", upstream.url, upstream.failures, reason)
            self._down(upstream, reason)

    def overloaded(self, upstream: Upstream, seconds: float) -> None:
        """It asked for less: leave it alone for a moment."""
        upstream.not_before = monotonic() + seconds
        asyncio.get_running_loop().call_later(seconds + 0.001, self.on_change)

    def _down(self, upstream: Upstream, reason: str) -> None:
        self._move(upstream, UpstreamState.DOWN, reason)
        self._unwatch(upstream)
        upstream.client.close()
        if upstream.prober is not None:
            upstream.prober.cancel()  # what it is being answered may be the vector of the model before
        upstream.prober = asyncio.get_running_loop().create_task(self._probe_until_up(upstream))

    def _move(self, upstream: Upstream, state: UpstreamState, reason: str) -> None:
        if upstream.state is not state:
            log.info("upstream %s: %s -> %s (%s)", upstream.url, upstream.state, state, reason)
        upstream.state, upstream.reason = state, reason
        self._availability()

    def _availability(self) -> None:
        if self.up:
            self.unavailable_since = None
        elif self.unavailable_since is None:
            self.unavailable_since = monotonic()

    async def _probe_until_up(self, upstream: Upstream) -> None:
        pause = PROBE_FIRST
        while True:
            try:
                state, reason = await self._probe(upstream)
            except (EngineGoneError, BadAnswerError, TimeoutError) as exc:
                state, reason = UpstreamState.DOWN, str(exc) or f"no answer to a probe within {PROBE_TIMEOUT:g} s"
            except Exception as exc:  # whatever it is, an engine that nobody probes would stay down for ever
                log.exception("a probe of %s failed inside the gateway", upstream.url)
                state, reason = UpstreamState.DOWN, f"a probe failed inside the gateway: {exc!r}"
            if state is UpstreamState.REFUSED and upstream.state is not UpstreamState.REFUSED:
                log.error("upstream %s is refused: %s", upstream.url, reason)
            self._move(upstream, state, reason)
            if state is UpstreamState.UP:
                upstream.failures = 0
                upstream.last_answer = monotonic()
                self.on_change()
                return
            await asyncio.sleep(pause)
            pause = min(PROBE_LONGEST, pause * 2)

    async def _probe(self, upstream: Upstream) -> tuple[UpstreamState, str]:
        """One real embedding, compared with the reference; watched from before, so that it is this process's."""
        self._unwatch(upstream)
        watch = upstream.watch = await upstream.client.watch(lambda: self._lost(upstream))
        if self._model:
            upstream.model = self._model
        else:
            await self._ask_model(upstream)
        body = orjson.dumps({"model": upstream.model, "input": [PROBE_TEXT], "encoding_format": "base64"})
        answer = await upstream.client.request("POST", "/embeddings", body, PROBE_TIMEOUT)
        if answer.status != 200:
            return UpstreamState.DOWN, f"a probe was answered {answer.status}{_why(answer)}"
        vectors, _ = read_vectors(answer.body, 1, self.width)
        vector = vectors[0]
        upstream.takes_ids = await self._takes_ids(upstream)
        upstream.arithmetic = await self._ask_arithmetic(upstream)
        if not watch.alive:
            return UpstreamState.DOWN, "it closed the watching connection"
        if self.reference is None:
            self.reference, self.width = vector, int(vector.shape[0])
            return UpstreamState.UP, "proved"
        cosine = _cosine(vector, self.reference)
        fp8 = upstream.arithmetic.quantization == "fp8"
        if cosine < (SAME_MODEL_COSINE_FP8 if fp8 else SAME_MODEL_COSINE):
            return (
                UpstreamState.REFUSED,
                f"its vectors are another model's: cosine {cosine:.3f} to the others on the probe text",
            )
        return UpstreamState.UP, "proved"

    async def _takes_ids(self, upstream: Upstream) -> bool:
        """Whether it answers our ids of some texts as it answers the texts: then it need not tokenise any more."""
        samples = self.samples()
        if not samples:
            return False
        found = []
        for inputs in ([s.payload for s in samples], [s.ids for s in samples]):
            body = orjson.dumps({"model": upstream.model, "input": inputs, "encoding_format": "base64"})
            answer = await upstream.client.request("POST", "/embeddings", body, PROBE_TIMEOUT)
            if answer.status != 200:
                log.info("upstream %s gets texts: it answered %d to sample inputs", upstream.url, answer.status)
                return False
            found.append(read_vectors(answer.body, len(samples), self.width))
        (by_text, text_tokens), (by_ids, id_tokens) = found
        if text_tokens != id_tokens or any(map(lambda a, b: _cosine(a, b) < SAME_IDS_COSINE, by_text, by_ids)):
            log.info("upstream %s gets texts: it makes other ids of them than the model's tokenizer", upstream.url)
            return False
        return True

    async def _ask_model(self, upstream: Upstream) -> None:
        """The name under which it wants to be called, and its context length where it tells: SGLang and vLLM do, and
        another of these gateways, of the longest input, which is one token less.
        """
        answer = await upstream.client.request("GET", "/models", b"", PROBE_TIMEOUT)
        if answer.status != 200:
            raise BadAnswerError(f"GET /models was answered {answer.status}{_why(answer)}")
        try:
            first = orjson.loads(answer.body)["data"][0]
            upstream.model = str(first["id"])
            length, longest = first.get("max_model_len"), first.get("max_input_tokens")
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError) as exc:
            raise BadAnswerError(f"GET /models answered no list of models: {exc!r}") from exc
        if type(length) is not int and type(longest) is int:
            length = longest + 1
        upstream.context_length = length if type(length) is int else None

    async def _ask_arithmetic(self, upstream: Upstream) -> Arithmetic:
        """Number format and quantisation from SGLang's `/server_info`; other engines have none, and need none.

        `verify` judges by them what comes out of this gateway. The answer holds the engine's admin key too, to whoever
        may call the engine at all: nothing else of it is kept.
        """
        try:
            answer = await upstream.client.request("GET", "/server_info", b"", INFO_TIMEOUT, root=True)
        except (EngineGoneError, BadAnswerError, TimeoutError):
            return Arithmetic()
        info = (answer.json() if answer.status == 200 else None) or {}
        return Arithmetic(_word(info.get("dtype")), _word(info.get("quantization")))


def described_by_all(workers: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What several workers say of the first one's upstreams: counts added up, states as far as the last of them."""
    out: list[dict[str, Any]] = []
    for row in workers[0]:
        rows = [u for worker in workers for u in worker if u["url"] == row["url"]]
        worst = max(rows, key=lambda u: WORSE.index(u["state"]))
        if len(rows) < len(workers):  # one was told later, or not yet
            worst = {**row, "state": "down", "reason": "not known to all workers yet"}
        out.append({**worst, **{name: sum(u[name] for u in rows) for name in COUNTS}})
    return out


def _cosine(a: Vector, b: Vector) -> float:
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b) or 1.0))


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and value not in ("", "auto", "none") else None


def _why(answer: Answer) -> str:
    if answer.status in (401, 403):
        return ": it wants an API key (--upstream-api-key)"
    return ""
