"""The other workers of one gateway, asked through their admin sockets.

Whichever worker is told to change something tells the others; what is asked for is gathered from all. A worker that
does not answer is being started again, and takes over the others' settings before it listens to clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from qwen3emb_launch.gateway.admin_client import ask

ANSWER_TIMEOUT = 2.0  # seconds for what a worker knows at once


class Peers:
    """Admin sockets of the other workers; none for a gateway of one."""

    def __init__(self, sockets: Sequence[str] = ()) -> None:
        self.sockets = tuple(sockets)

    async def all(
        self, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = ANSWER_TIMEOUT
    ) -> list[dict[str, Any]]:
        """The answers of those that gave a good one."""
        asked = (ask(socket, method, route, body, timeout, own=True) for socket in self.sockets)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, (OSError, TimeoutError)):
                raise answer
        return [a for a in answers if isinstance(a, dict)]

    async def first(self, route: str) -> dict[str, Any] | None:
        """What the first that answers says; None when nobody does (all are just being started)."""
        for socket in self.sockets:
            try:
                answer: dict[str, Any] = await ask(socket, "GET", route, None, ANSWER_TIMEOUT, own=True)
            except (OSError, TimeoutError):
                continue
            return answer
        return None
