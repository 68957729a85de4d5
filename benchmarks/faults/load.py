"""Steady load: one request every 1/rate seconds whatever happened to the ones before, each answer compared.

Before the real engine the gateway's cache is off, and a short run asks no text twice: a cache would hide an outage. A
request is asked once and never repeated: what a client library would hide by its own retries is counted here.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

import httpx

ALIKE = 0.9995  # cosine: batches of another size move a bfloat16 vector by less, another text's is further away
WIDTH = 64  # numbers asked for, by `dimensions`
TIMEOUT = 120.0


@dataclass(frozen=True)
class Sample:
    """One request: when it was sent and ended (monotonic seconds), and what came: right, wrong or failed, and why."""

    sent: float
    done: float
    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Tally:
    """What became of the requests of one fault. `gap` is the longest time without a right answer, in seconds."""

    sent: int
    failed: int
    wrong: int
    gap: float
    reasons: tuple[str, ...]


def texts(count: int) -> list[str]:
    """Different texts of different lengths."""
    return [f"text {n}: " + " ".join(f"{(n * 7919 + k * 104729) % 9973}" for k in range(n % 23)) for n in range(count)]


class Reference:
    """What the engine answers to each text while nothing is wrong with it.

    Asked of the engine itself: no gateway between, no copy of its own answer to compare with.
    """

    def __init__(self, base_url: str, key: str | None, model: str, count: int) -> None:
        self.texts = texts(count)
        self.vectors: list[list[float]] = []
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(trust_env=False, timeout=TIMEOUT, headers=headers) as client:
            for begin in range(0, count, 64):
                body = {"model": model, "input": self.texts[begin : begin + 64], "dimensions": WIDTH}
                answer = client.post(f"{base_url}/embeddings", json=body)
                answer.raise_for_status()
                self.vectors += [row["embedding"] for row in answer.json()["data"]]
        closest = max(cosine(a, b) for a, b in pairwise(self.vectors[:200]))
        if closest >= ALIKE:
            raise SystemExit(f"different texts are as alike as {closest:.5f}: a wrong vector could not be told")

    def fault(self, number: int, vector: Sequence[float]) -> str:
        """What is wrong with an answer to text `number`; empty when nothing is."""
        if len(vector) != WIDTH:
            return f"{len(vector)} numbers instead of {WIDTH}"
        alike = cosine(vector, self.vectors[number])
        return "" if alike >= ALIKE else f"cosine {alike:.4f} to the right vector"


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Cosine of two vectors of one width; NaN where one has no length."""
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else math.nan


class Load:
    """`with Load(...) as load:` sends in a thread of its own until left; then waits for what is still in the air."""

    def __init__(self, base_url: str, model: str, reference: Reference, *, rate: float, first: int = 0) -> None:
        self.samples: list[Sample] = []
        self.next_text = first
        self._url = f"{base_url}/embeddings"
        self._model = model
        self._reference = reference
        self._pause = 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT + 10)

    def right_since(self, begin: float) -> int:
        """Right answers to requests that were sent after `begin`."""
        return sum(s.outcome == "right" and s.sent >= begin for s in list(self.samples))

    def tally(self, begin: float) -> Tally:
        """Of the requests that were in the air at `begin` or sent after it. To be called after the load has ended."""
        mine = [s for s in self.samples if s.done >= begin]
        right = sorted(s.done for s in self.samples if s.outcome == "right")
        last = max((s.done for s in mine), default=begin)
        marks = [begin, *(t for t in right if t > begin), last]
        reasons = Counter(s.why for s in mine if s.why)
        return Tally(
            sent=len(mine),
            failed=sum(s.outcome == "failed" for s in mine),
            wrong=sum(s.outcome == "wrong" for s in mine),
            gap=max(b - a for a, b in pairwise(marks)),
            reasons=tuple(f"{count} x {why}" for why, count in reasons.most_common(3)),
        )

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT, limits=limits) as client:
            asked: set[asyncio.Task[None]] = set()
            due = time.monotonic()
            while not self._stop.is_set():
                task = asyncio.create_task(self._ask(client, self.next_text))
                self.next_text += 1
                asked.add(task)
                task.add_done_callback(asked.discard)
                due += self._pause
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            if asked:
                await asyncio.wait(asked)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        place = number % len(self._reference.texts)
        body = {"model": self._model, "input": self._reference.texts[place], "dimensions": WIDTH}
        sent = time.monotonic()
        try:
            answer = await client.post(self._url, json=body)
            if answer.status_code == 200:
                why = self._reference.fault(place, answer.json()["data"][0]["embedding"])
                outcome = "wrong" if why else "right"
            else:
                outcome, why = "failed", f"HTTP {answer.status_code}: {message(answer)}"
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            outcome, why = "failed", f"{type(error).__name__}"
        self.samples.append(Sample(sent, time.monotonic(), outcome, why))


def message(answer: httpx.Response) -> str:
    """The words of an error answer, in whichever of the two shapes."""
    try:
        body = answer.json()
        error = body.get("error", body)
        return str(error["message"] if isinstance(error, dict) else error)[:90]
    except (ValueError, KeyError, AttributeError):
        return answer.text[:90]
