"""HTTP/1.1 for the gateway: llhttp (through httptools) under an asyncio.Protocol.

Chosen by measurement (docs/gateway.md): a framework's own cost is several times that of answering a cached vector.
What a server must do besides is here and in http_connection: keep-alive, pipelining in order, Expect, limits on line,
headers and body, time-outs for slow senders and slow readers, bounds on connections and memory, a graceful end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING

from qwen3emb_launch.gateway.http_connection import HttpConnection
from qwen3emb_launch.gateway.http_messages import Handler, HttpLimits, Request
from qwen3emb_launch.listening import BACKLOG

if TYPE_CHECKING:
    from socket import socket
    from ssl import SSLContext

TLS_TIMEOUT = 10.0  # seconds a client may take for its handshake
LOOKED_AT = 256  # connections among which an idle one is looked for


@dataclass
class HttpServer:
    """A listener and its connections. `handler` answers at once, or later with an awaitable.

    `early` sees a request once its headers are there and may refuse it (ApiError) before its body is read.
    """

    handler: Handler
    limits: HttpLimits = field(default_factory=HttpLimits)
    cors_origins: tuple[str, ...] = ()
    connections: set[HttpConnection] = field(default_factory=set)
    closing: bool = False
    early: Callable[[Request], None] | None = None
    held: int = 0  # bytes of bodies in memory, of all connections
    _servers: list[asyncio.Server] = field(default_factory=list)
    _sweeper: asyncio.Task[None] | None = None

    async def listen(self, host: str, port: int, *, tls: SSLContext | None = None) -> int:
        """Listen on a TCP address; the port, which the system chose if 0 was given. Raises OSError."""
        handshake = TLS_TIMEOUT if tls else None
        server = await asyncio.get_running_loop().create_server(
            lambda: HttpConnection(self), host, port, ssl=tls, backlog=BACKLOG, ssl_handshake_timeout=handshake
        )
        self._started(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_on(self, sockets: Sequence[socket], *, tls: SSLContext | None = None) -> int:
        """Accept from sockets that somebody made; their port. Raises OSError."""
        handshake = TLS_TIMEOUT if tls else None
        for one in sockets:
            server = await asyncio.get_running_loop().create_server(
                lambda: HttpConnection(self), sock=one, ssl=tls, backlog=BACKLOG, ssl_handshake_timeout=handshake
            )
            self._started(server)
        return int(sockets[0].getsockname()[1])

    async def listen_unix(self, path: str) -> None:
        """Listen on a Unix socket; its folder decides who may call."""
        self._started(await asyncio.get_running_loop().create_unix_server(lambda: HttpConnection(self), path))

    def _started(self, server: asyncio.Server) -> None:
        self._servers.append(server)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())

    async def close(self, grace: float = 10.0) -> None:
        """Stop listening, let requests in work finish for `grace` seconds, then cut what is left."""
        self.closing = True
        for server in self._servers:
            server.close()
        deadline = monotonic() + grace
        for connection in list(self.connections):
            connection.finish()
        while self.connections and monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        if self._sweeper:
            self._sweeper.cancel()

    async def _sweep(self) -> None:
        """One pass a second over all connections is cheaper than a timer each."""
        while True:
            await asyncio.sleep(1.0)
            now = monotonic()
            for connection in list(self.connections):
                connection.check_timeouts(now)
            self._shed_unsent()

    def _shed_unsent(self) -> None:
        """Answers that their clients do not fetch: beyond the bound, the largest are given up."""
        unsent = sorted(((c.unsent, id(c), c) for c in self.connections if c.unsent), reverse=True)
        total = sum(size for size, _, _ in unsent)
        for size, _, connection in unsent:
            if total <= self.limits.memory:
                return
            connection.abort()
            total -= size

    def make_room(self) -> bool:
        """At the limit of connections: give one up for a new one, that idles between requests or else dawdles over
        sending one, if there is any. So whoever opens all of them and sends next to nothing keeps nobody out."""
        seen = list(islice(self.connections, LOOKED_AT))
        spare = [c for c in seen if c.idle] or [c for c in seen if c.dawdles]
        if spare:
            min(spare, key=lambda c: c.since).abort()
        return bool(spare)
