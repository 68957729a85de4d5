"""Where items wait for a call: who may wait, in which lane, whose turn it is, and how many are worth a call."""

from __future__ import annotations

from qwen3emb_launch.gateway.fair_queue import FairQueue, share
from qwen3emb_launch.gateway.work import BatchLimits, Item, Kind, Level, Wait

Queue = FairQueue[Item]


class WaitingRoom:
    """Each kind waits apart, so that long texts never hold short ones back; strings and ids too, since a call cannot
    mix them."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._lanes: dict[tuple[Kind, bool], Queue] = {(k, ids): FairQueue() for k in Kind for ids in (False, True)}
        self._busy: dict[tuple[Kind, bool], Queue] = {}  # lanes in which something waits: mostly one, or none
        self._level = {kind: Level() for kind in Kind}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def full_for(self, client: str, count: int) -> tuple[str, int] | None:
        """Why there is no room for `count` more of a client, and how many are ahead of it; None when there is."""
        limit = self._limits.queue
        if self._count + count <= share(limit, limit):
            return None  # all that wait are fewer than the smallest share there is
        if self._count + count > limit:
            return f"{self._count} inputs are waiting, the queue takes {limit}", self._count
        lanes = self._busy.values()
        mine = sum([lane.waiting(client) for lane in lanes])
        if not mine:
            return None
        others = len({c for lane in lanes for c in lane.client_names()})
        fair = share(limit, others)
        if mine + count > fair:
            return f"{mine} of your inputs are waiting already, your share of the queue is {fair}", mine
        return None

    def push(self, item: Item, wait: Wait, front: bool = False) -> None:
        """`front` puts it first: it was on its way already."""
        long = item.prepared.tokens > self._limits.long_tokens
        kind = Kind.SUSPECT if item.suspect else Kind.LONG if long else Kind.SHORT
        key = kind, isinstance(item.prepared.payload, list)
        lane = self._busy[key] = self._lanes[key]
        lane.push(wait.client, wait, item, front=front)
        self._count += 1

    def drop(self, wait: Wait) -> list[Item]:
        """Take out what waits for a request."""
        dropped = [item for lane in self._busy.values() for item in lane.drop(wait.client, wait)]
        self._taken(len(dropped))
        return dropped

    def _taken(self, count: int) -> None:
        self._count -= count
        self._busy = {key: lane for key, lane in self._busy.items() if lane}

    def kinds(self) -> list[Kind]:
        """Those of which something waits, in their order."""
        return sorted({kind for kind, _ in self._busy})

    def queues(self, kind: Kind) -> list[Queue]:
        """Those of a kind in which something waits."""
        return [lane for (of, _), lane in self._busy.items() if of is kind]

    def waiting(self, kind: Kind) -> int:
        """Items of a kind that wait."""
        return sum([len(lane) for (of, _), lane in self._busy.items() if of is kind])

    def part(self, kind: Kind, in_air: int, slots: int, now: float) -> int:
        """Items worth a call, so that all slots of all engines get equal calls: one big call with little beside it
        leaves engines idle while its answers are read and the next texts come in."""
        if kind is Kind.SUSPECT:
            return self._limits.items  # as many as the items themselves bear
        level = self._level[kind].see(self.waiting(kind) + in_air, now)
        return min(self._limits.items, -(-level // max(1, slots)))

    def take(self, queue: Queue, size: int) -> tuple[list[Item], list[Item]]:
        """A batch within the bounds, at least one item if there is any, and those found that nobody wants any more."""
        batch: list[Item] = []
        unwanted: list[Item] = []
        tokens, company = 0, min(size, self._limits.items)
        while len(batch) < company and (head := queue.peek()) is not None:
            if not head.waiters:
                unwanted.append(queue.pop())
                continue
            company = min(company, head.company)
            if batch and (len(batch) >= company or tokens + head.prepared.tokens > self._limits.tokens):
                break
            batch.append(queue.pop())
            tokens += head.prepared.tokens
        self._taken(len(batch) + len(unwanted))
        return batch, unwanted
