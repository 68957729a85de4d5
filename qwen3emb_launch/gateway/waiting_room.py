"""Where items wait for a call: who may wait, in which lane, whose turn it is, and how many are worth a call."""

from __future__ import annotations

from qwen3emb_launch.gateway.fair_queue import FairQueue, share
from qwen3emb_launch.gateway.work import BatchLimits, Item, Level, Wait

Queue = FairQueue[Item]


class WaitingRoom:
    """Short and long texts wait apart, so that these never hold those back; strings and ids too, since a call cannot
    mix them."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._lanes: dict[tuple[bool, bool], Queue] = {
            (long, ids): FairQueue() for long in (False, True) for ids in (False, True)
        }
        self._level = {False: Level(), True: Level()}

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def full_for(self, client: str, count: int) -> tuple[str, int] | None:
        """Why there is no room for `count` more of a client, and how many are ahead of it; None when there is."""
        limit = self._limits.queue
        if len(self) + count > limit:
            return f"{len(self)} inputs are waiting, the queue takes {limit}", len(self)
        mine = sum(lane.waiting(client) for lane in self._lanes.values())
        others = len({c for lane in self._lanes.values() for c in lane.client_names()} | {client})
        fair = share(limit, others)
        if mine and mine + count > fair:
            return f"{mine} of your inputs are waiting already, your share of the queue is {fair}", mine
        return None

    def push(self, item: Item, wait: Wait, front: bool = False) -> None:
        """`front` puts it first: it was on its way already."""
        lane = (item.prepared.tokens > self._limits.long_tokens, isinstance(item.prepared.payload, list))
        self._lanes[lane].push(wait.client, wait, item, front=front)

    def drop(self, wait: Wait) -> list[Item]:
        """Take out what waits for a request."""
        return [item for lane in self._lanes.values() for item in lane.drop(wait.client, wait)]

    def queues(self, long: bool) -> list[Queue]:
        """Those of a kind in which something waits."""
        return [lane for lane in (self._lanes[long, False], self._lanes[long, True]) if lane]

    def waiting(self, long: bool) -> int:
        """Items of a kind that wait."""
        return len(self._lanes[long, False]) + len(self._lanes[long, True])

    def part(self, long: bool, in_air: int, slots: int, now: float) -> int:
        """Items worth a call, so that all slots of all engines get equal calls: one big call with little beside it
        leaves engines idle while its answers are read and the next texts come in."""
        level = self._level[long].see(self.waiting(long) + in_air, now)
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
        return batch, unwanted
