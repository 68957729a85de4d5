"""Items waiting for an engine, taken in turns: by client first, by request within a client.

A client with a thousand texts queued and one with a single query wait alike: the query is in the next batch.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out within a request; round robin between requests and between clients."""

    def __init__(self) -> None:
        self._clients: OrderedDict[str, OrderedDict[Hashable, deque[T]]] = OrderedDict()
        self._count = 0
        self._waiting: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def client_names(self) -> Iterable[str]:
        """The clients that have something waiting."""
        return self._clients.keys()

    def waiting(self, client: str) -> int:
        """How many items a client has waiting."""
        return self._waiting.get(client, 0)

    def push(self, client: str, request: Hashable, item: T, *, front: bool = False) -> None:
        """Queue an item; `front` puts it before the rest of its request and its request first (a retry)."""
        requests = self._clients.setdefault(client, OrderedDict())
        items = requests.get(request)
        if items is None:
            items = requests[request] = deque()
        if front:
            items.appendleft(item)
            requests.move_to_end(request, last=False)
        else:
            items.append(item)
        self._count += 1
        self._waiting[client] = self._waiting.get(client, 0) + 1

    def peek(self) -> T | None:
        """The item that `pop` would take."""
        for requests in self._clients.values():
            for items in requests.values():
                return items[0]
        return None

    def pop(self) -> T:
        """The item whose turn it is. Raises IndexError when empty."""
        if not self._count:
            raise IndexError("pop from an empty queue")
        client, requests = next(iter(self._clients.items()))
        request, items = next(iter(requests.items()))
        item = items.popleft()
        if items:
            requests.move_to_end(request)
        else:
            del requests[request]
        if requests:
            self._clients.move_to_end(client)
        else:
            del self._clients[client]
        self._forget(client, 1)
        return item

    def drop(self, client: str, request: Hashable) -> list[T]:
        """Take out what is left of a request."""
        requests = self._clients.get(client)
        items = requests.pop(request, None) if requests else None
        if requests is None or items is None:
            return []
        if not requests:
            del self._clients[client]
        self._forget(client, len(items))
        return list(items)

    def _forget(self, client: str, count: int) -> None:
        self._count -= count
        left = self._waiting[client] - count
        if left:
            self._waiting[client] = left
        else:
            del self._waiting[client]


def share(limit: int, clients: int) -> int:
    """How many items one client may have waiting: alone three quarters of the queue, else an equal part of it.

    The free quarter is what lets a second client in at all.
    """
    return max(1, limit * 3 // 4 if clients <= 1 else limit // min(clients, 8))
