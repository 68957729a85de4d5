"""An HTTP/1.1 keep-alive connection for a load generator: one request at a time, callbacks, no allocation it can spare.

General clients spend 0.3 to 1 ms a request; this one spends about 30 microseconds, so that what is measured is the
server. Bodies by Content-Length or chunked; anything else is a `protocol` failure, not a guess. Standard library.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from qwen3emb_launch.addresses import web_address

# (status, body, failure): status 0 and a failure word (connect, reset, timeout, protocol) when there was no answer.
Done = Callable[[int, bytes, str], None]

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close[ \t]*\r\n", re.IGNORECASE)
_HEADER_LIMIT = 65536
_IDLE = 0.5  # seconds without a request after which a server may be about to close; the shortest time-out met is 1 s


@dataclass(frozen=True)
class Target:
    """Where requests go, worked out once."""

    host: str
    port: int
    tls: ssl.SSLContext | None
    head: bytes  # request line and headers, up to the Content-Length value

    @classmethod
    def of(cls, url: str, path: str, headers: dict[str, str], verify_tls: bool = True) -> Target:
        """From a base URL such as `https://host/v1` and `/embeddings`. Raises ValueError for anything but http(s)."""
        parts = web_address(url)
        if parts is None or not parts.hostname:
            raise ValueError(f"no http(s) URL: {url!r}")
        context = None
        if parts.scheme == "https":
            context = ssl.create_default_context()
            if not verify_tls:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
        lines = [f"POST {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc.rpartition('@')[2]}"]
        for name, value in {"Content-Type": "application/json", "Accept": "application/json", **headers}.items():
            if re.search(r"[\r\n]", name + value):
                raise ValueError(f"header {name!r} holds a line break")
            lines.append(f"{name}: {value}")
        head = ("\r\n".join(lines) + "\r\nContent-Length: ").encode("latin-1")
        return cls(parts.hostname, parts.port or (443 if context else 80), context, head)

    def request(self, body: bytes) -> bytes:
        """The bytes on the wire."""
        return b"%b%d\r\n\r\n%b" % (self.head, len(body), body)


class Connection:
    """One TCP (or TLS) connection. `send` starts a request; its `done` is called exactly once.

    A connection kept idle that the server closes before the first byte of an answer is reopened once, as every client
    does: the server's keep-alive time-out may cross a request on the wire. One in steady use is not: that is a failure.
    """

    def __init__(self, target: Target, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._opening = 0  # counts attempts: a late success of an abandoned one is dropped
        self._buffer = bytearray()
        self._need = -1  # total bytes of head and body once known; -2 while chunks arrive
        self._body_at = 0
        self._status = 0
        self._closing = False
        self._done: Done | None = None
        self._data = b""
        self._answered_at = math.inf  # loop time of this transport's last answer
        self._was_idle = False
        self.deadline = 0.0
        self.reopened = 0

    def send(self, data: bytes, done: Done, deadline: float) -> None:
        """Send one request. `deadline` is `loop.time()` seconds; the owner calls `expire` past it."""
        self._data, self._done, self.deadline = data, done, deadline
        self._was_idle = self._loop.time() - self._answered_at > _IDLE
        if self._transport is None or self._transport.is_closing():
            self._open()
        else:
            self._transport.write(data)

    @property
    def busy(self) -> bool:
        """Whether a request is on its way."""
        return self._done is not None

    def expire(self) -> None:
        """Give the request up: its deadline has passed. The connection is closed, its answer would be misread."""
        self._fail("timeout")

    def close(self) -> None:
        """Drop the connection; a request on its way is not answered."""
        self._done = None
        self._opening += 1
        if self._transport:
            self._transport.abort()
            self._transport = None

    def _open(self) -> None:
        self._transport = None
        self._answered_at, self._was_idle = math.inf, False
        self._reset()
        self._opening += 1
        task = self._loop.create_task(self._connect(self._opening))
        _TASKS.add(task)
        task.add_done_callback(_TASKS.discard)

    async def _connect(self, attempt: int) -> None:
        target = self._target
        try:
            await self._loop.create_connection(
                lambda: _Link(self, attempt),
                target.host,
                target.port,
                ssl=target.tls,
                server_hostname=target.host if target.tls else None,
            )
        except (OSError, ssl.SSLError) as exc:
            if attempt == self._opening:
                self._finish(0, str(exc).encode(), "connect")

    def connected(self, transport: asyncio.Transport, attempt: int) -> None:
        """The link is up: send what waits, unless it was given up meanwhile."""
        if self._done is None or attempt != self._opening:
            transport.abort()
            return
        self._transport = transport
        transport.write(self._data)

    def received(self, transport: asyncio.Transport, data: bytes) -> None:
        """Bytes of an answer."""
        if transport is not self._transport or self._done is None:
            return
        buffer = self._buffer
        buffer += data
        if self._need == -1 and not self._head():
            return
        if self._need == -2:
            self._chunks()
        elif len(buffer) >= self._need:
            self._finish(self._status, bytes(memoryview(buffer)[self._body_at : self._need]), "")

    def lost(self, transport: asyncio.Transport) -> None:
        """The server closed the connection."""
        if transport is not self._transport:
            return
        self._transport = None
        if self._done is None:
            return
        if self._was_idle and not self._buffer:
            self.reopened += 1
            self._open()
        else:
            self._fail("reset")

    def _head(self) -> bool:
        """Read status and framing once the whole head is there."""
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > _HEADER_LIMIT:
                self._fail("protocol")
            return False
        head = bytes(buffer[: end + 2])
        if head[:7] != b"HTTP/1." or not head[9:12].isdigit():
            self._fail("protocol")
            return False
        self._status = int(head[9:12])
        if self._status < 200:  # 100 Continue: the answer follows
            del buffer[: end + 4]
            return self._head()
        self._closing = _CLOSE.search(head) is not None or head[:8] == b"HTTP/1.0"
        self._body_at = end + 4
        length = _LENGTH.search(head)
        if length:
            self._need = self._body_at + int(length[1])
        elif _CHUNKED.search(head):
            self._need = -2
        elif self._status in (204, 304):
            self._need = self._body_at
        else:
            self._fail("protocol")
            return False
        return True

    def _chunks(self) -> None:
        """Join the chunks once the last one is there; answers come in few chunks, so starting again is cheap."""
        buffer, at = self._buffer, self._body_at
        parts: list[bytes] = []
        while True:
            line = buffer.find(b"\r\n", at)
            if line < 0:
                return
            try:
                size = int(bytes(buffer[at:line]).split(b";")[0], 16)
            except ValueError:
                self._fail("protocol")
                return
            end = line + 2 + size + 2
            if len(buffer) < end:
                return
            if size == 0:
                self._finish(self._status, b"".join(parts), "")
                return
            parts.append(bytes(buffer[line + 2 : end - 2]))
            at = end

    def _reset(self) -> None:
        self._buffer = bytearray()
        self._need, self._body_at, self._status, self._closing = -1, 0, 0, False

    def _fail(self, failure: str) -> None:
        transport, self._transport = self._transport, None
        self._opening += 1
        if transport:
            transport.abort()
        self._finish(0, b"", failure)

    def _finish(self, status: int, body: bytes, failure: str) -> None:
        done, self._done = self._done, None
        self._data = b""
        if not failure:
            self._answered_at = self._loop.time()
            if self._closing and self._transport:
                self._transport.close()
                self._transport = None
        self._reset()
        if done:
            done(status, body, failure)


class _Link(asyncio.Protocol):
    """One transport's callbacks: a late byte of an abandoned transport must not reach its successor's request."""

    def __init__(self, owner: Connection, attempt: int) -> None:
        self._owner = owner
        self._attempt = attempt

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - what create_connection makes
        self._transport = transport
        self._owner.connected(transport, self._attempt)

    def data_received(self, data: bytes) -> None:
        self._owner.received(self._transport, data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self._transport)


_TASKS: set[asyncio.Task[None]] = set()  # the loop keeps weak references only
