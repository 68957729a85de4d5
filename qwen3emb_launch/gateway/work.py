"""What travels through the batcher: a request that waits, a text on its way, and the bounds on both."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import IntEnum
from math import exp
from time import monotonic
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.gateway.answer import Vector
from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.tokens import Prepared

if TYPE_CHECKING:
    from qwen3emb_launch.gateway.calls import Call

TRUNCATED = 1 << 31  # flag in the token count that goes with a cached vector
ESTIMATED = 1 << 30
TOKEN_MASK = ESTIMATED - 1


class Kind(IntEnum):
    """What a call is made of; the order is the order in which they are looked at."""

    SUSPECT = 0  # was with an engine that died: one call at a time, alone there, so that its death proves something
    SHORT = 1
    LONG = 2


@dataclass(frozen=True)
class BatchLimits:
    """The bounds. Tokens include EOS, times are seconds.

    `hold` is how long a request waits for an engine when none is up; `stall` how long an engine may be silent with
    calls in the air before they are tried elsewhere.
    """

    items: int = 128
    tokens: int = 16_384
    long_tokens: int = 512
    wait: float = 0.05
    queue: int = 8_192
    attempts: int = 5
    hold: float = 30.0
    timeout: float = 120.0
    stall: float = 30.0


class Level:
    """How many items are about: waiting, in calls, or with clients that were just answered and ask again in a moment.

    A peak that fades: of the last ones nothing is seen, so what was there a moment ago stands for them.
    """

    FADES = 0.05  # seconds until a peak is a third of its height

    def __init__(self) -> None:
        self._height = 0.0
        self._at = 0.0

    def see(self, count: int, now: float) -> int:
        """Items seen at a moment (seconds, not going back); how many are about."""
        faded = count + (self._height - count) * exp((self._at - now) / self.FADES)
        self._height, self._at = max(float(count), faded), now
        return round(self._height)


class Wait:
    """A request waiting for vectors. `future` resolves to the list of (vector, token flags), in order, or to the error.

    The error is handed over, not set to be raised: its traceback would know the frame that waits, which knows the
    future, and such a circle keeps the request's texts until the garbage collector comes round.
    """

    __slots__ = (
        "client", "deadline", "engine", "future", "items", "left", "queued", "results", "span", "started", "submitted",
    )  # fmt: skip

    def __init__(self, client: str, count: int, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self.results: list[tuple[Vector, int] | None] = [None] * count
        self.left = count
        self.items: list[Item] = []
        self.future: asyncio.Future[list[Any] | ApiError] = loop.create_future()
        self.started = self.submitted = monotonic()
        self.deadline = deadline
        self.span: Any = None
        self.queued = 0.0
        self.engine = 0.0

    def give(self, index: int, vector: Vector, flags: int, began: float, ended: float) -> None:
        """One of the vectors is there, of an engine call from `began` to `ended`."""
        if self.future.done():
            return
        if self.results[index] is not None:
            return  # an answer that was read in part, and asked for again
        self.results[index] = (vector, flags)
        self.left -= 1
        if not self.left:
            # The last one's are the request's: those of others went by meanwhile. A call that it joined is not its own
            # before it came.
            self.queued = max(0.0, began - self.submitted)
            self.engine = ended - max(began, self.submitted)
            self.future.set_result(self.results)

    def fail(self, error: ApiError) -> None:
        """The whole request fails with its first error."""
        if not self.future.done():
            self.future.set_result(error)


class Item:
    """One text, or list of ids, on its way; wanted by one or more requests."""

    __slots__ = ("attempts", "call", "company", "deaths", "key", "prepared", "queued_at", "waiters")

    def __init__(self, key: bytes, prepared: Prepared) -> None:
        self.key = key
        self.prepared = prepared
        self.waiters: list[tuple[Wait, int]] = []
        self.attempts = 0
        self.company = 1 << 30  # the largest batch it may be part of
        self.deaths = 0  # of engines with it in the air
        self.queued_at = monotonic()
        self.call: Call | None = None  # the last one it was in

    @property
    def suspect(self) -> bool:
        """Whether it may be what ends engines."""
        return self.deaths > 0
