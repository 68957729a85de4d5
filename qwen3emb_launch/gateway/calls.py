"""Engine calls in the air: what each carries, what is counted of them, and the tokens that an answer's total says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

from qwen3emb_launch.gateway.upstream import Upstream
from qwen3emb_launch.gateway.work import ESTIMATED, TOKEN_MASK, TRUNCATED, Item, Kind


@dataclass(eq=False, slots=True)
class Call:
    """One of them. `task` asks and gives the answers out."""

    upstream: Upstream
    batch: list[Item]
    kind: Kind
    began: float
    alone: bool  # when it took off
    made: int  # calls its engine had been sent then
    task: asyncio.Task[None] | None = None

    @property
    def to_itself(self) -> bool:
        """Whether its engine had nothing else all the while."""
        return self.alone and self.upstream.slots.made == self.made

    @property
    def wanted(self) -> bool:
        """Whether any request still waits for something in it."""
        return any(item.waiters for item in self.batch)

    def cancel(self) -> None:
        """Give it up; its items are queued again or dropped."""
        if self.task is not None:
            self.task.cancel()


class Calls:
    """Those of one batcher. `items` and `usual` are by kind: items in calls, seconds that a call took lately."""

    def __init__(self) -> None:
        self.air: set[Call] = set()
        self.items = dict.fromkeys(Kind, 0)
        self.usual = dict.fromkeys(Kind, 0.0)

    def take_off(self, upstream: Upstream, batch: list[Item], kind: Kind) -> Call:
        """Count a call that is about to be made; `land` must follow."""
        slots = upstream.slots
        slots.take_off(kind, len(batch))
        self.items[kind] += len(batch)
        call = Call(upstream, batch, kind, monotonic(), slots.total == 1, slots.made)
        self.air.add(call)
        for item in batch:
            item.call = call
        return call

    def land(self, call: Call) -> None:
        """It is over, however it went."""
        self.air.discard(call)
        call.upstream.slots.land(call.kind, len(call.batch))
        self.items[call.kind] -= len(call.batch)

    def took(self, call: Call, seconds: float) -> None:
        """How long a good one took."""
        self.usual[call.kind] += (seconds - self.usual[call.kind]) / 8


def token_flags(batch: Sequence[Item], total: int) -> list[tuple[int, int]]:
    """Each item's token count with its flags: to keep with its vector, and to tell its request now.

    Where nobody could count, an engine's total (0: it said none) is dealt out by the estimates. What is told is exact
    where all of a call is one request's: the parts are guessed, their sum is not.
    """
    tokens = [item.prepared.tokens for item in batch]
    guessed = [at for at, item in enumerate(batch) if not item.prepared.exact]
    kept = told = ESTIMATED
    if guessed:
        left = total - sum(item.prepared.tokens for item in batch if item.prepared.exact)
        if left >= len(guessed):
            _deal_out(left, guessed, tokens)
            kept = 0 if len(guessed) == 1 else ESTIMATED
            told = 0 if _of_one_request(batch) else kept
    out: list[tuple[int, int]] = []
    for item, count in zip(batch, tokens, strict=True):
        flags = min(count, TOKEN_MASK) | (TRUNCATED if item.prepared.truncated else 0)
        out.append((flags, flags) if item.prepared.exact else (flags | kept, flags | told))
    return out


def _deal_out(total: int, places: Sequence[int], tokens: list[int]) -> None:
    """Put parts of `total` in these places of `tokens`, by what is there; their sum is the total."""
    whole = sum(tokens[at] for at in places)
    seen = dealt = 0
    for at in places:
        seen += tokens[at]
        upto = total * seen // whole
        tokens[at], dealt = upto - dealt, upto


def _of_one_request(batch: Sequence[Item]) -> bool:
    first = batch[0].waiters[0][0] if batch[0].waiters else None
    return all(len(item.waiters) == 1 and item.waiters[0][0] is first for item in batch)
