"""HTTP/1.1 for the gateway: llhttp (through httptools) under an asyncio.Protocol.

Chosen by measurement (docs/gateway.md): a framework's own cost is several times that of answering a cached vector.
What a server must do besides is here: keep-alive, pipelining in order, Expect, limits on line, headers and body,
time-outs for slow senders and slow readers, a bound on connections, a graceful end.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING

import httptools

from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.http_messages import REASONS, Handler, HttpLimits, Request, Response, error_response

if TYPE_CHECKING:
    from ssl import SSLContext

log = logging.getLogger(__name__)

LINGER = 2.0  # seconds a refused client may go on sending into the void
HIGH_WATER = 1 << 20  # bytes a connection may have unsent before its requests wait


@dataclass
class HttpServer:
    """A listener and its connections. `handler` answers at once, or later with an awaitable."""

    handler: Handler
    limits: HttpLimits = field(default_factory=HttpLimits)
    cors_origins: tuple[str, ...] = ()
    connections: set[HttpConnection] = field(default_factory=set)
    closing: bool = False
    _servers: list[asyncio.Server] = field(default_factory=list)
    _sweeper: asyncio.Task[None] | None = None

    async def listen(
        self, host: str, port: int, *, tls: SSLContext | None = None, reuse_port: bool = False, backlog: int = 2048
    ) -> int:
        """Listen on a TCP address; the port, which the system chose if 0 was given. Raises OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: HttpConnection(self), host, port, ssl=tls, reuse_port=reuse_port or None, backlog=backlog
        )
        self._started(server)
        return int(server.sockets[0].getsockname()[1])

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


class HttpConnection(asyncio.Protocol):
    """One client. Requests are answered in the order they came; at most `pipelined` wait."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._peer = "unix"
        self._waiting: deque[Request] = deque()
        self._task: asyncio.Task[None] | None = None
        self._stop_after = False
        self._refused: ApiError | None = None
        self._deaf = False
        self._lingers = False
        self._reset()
        self._since = monotonic()
        self._blocked_since: float | None = None
        self._busy = False

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._header_count = 0
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._request: Request | None = None
        self._reading = False

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer = str(peer[0])
        server = self._server
        if server.closing or len(server.connections) >= self._limits.connections:
            error = ApiError(503, "too_many_connections", "the gateway's connection limit is reached", retry_after=1)
            self._write(error_response(error), keep_alive=False)
            transport.close()
            return
        server.connections.add(self)
        transport.set_write_buffer_limits(high=HIGH_WATER)  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._waiting.clear()
        self._transport = None
        if self._task is not None:
            self._task.cancel()  # nobody is left to read the answer

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._deaf = True  # the request is answered as HTTP/1.1; what follows would be another protocol
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            if isinstance(cause, ApiError):
                self._refuse(cause)
            else:
                self._refuse(ApiError(400, "bad_http", "that was not a well-formed HTTP/1.1 request"))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._blocked_since = monotonic()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._blocked_since = None
        if self._transport is not None:
            self._resume_reading()
            self._next()

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        self._reset()
        self._reading = True
        self._since = monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._limits.line:
            raise ApiError(414, "uri_too_long", f"the request line is longer than {self._limits.line} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + 4
        self._header_count += 1
        if self._header_count > self._limits.header_count or self._header_bytes > self._limits.header_bytes:
            raise ApiError(
                431, "headers_too_large",
                f"more than {self._limits.header_count} headers or {self._limits.header_bytes} bytes of them",
            )  # fmt: skip
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        known = self._headers.get(key)
        self._headers[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        request = Request(self._parser.get_method().decode("latin-1"), path, query, self._headers, self._peer)
        request.keep_alive = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        self._request = request
        self._since = monotonic()
        length = self._headers.get("content-length")
        if length is not None and length.isdigit() and int(length) > self._limits.body:
            raise self._too_large(int(length))
        expect = self._headers.get("expect")
        if expect is not None:
            if expect.lower() != "100-continue":
                raise ApiError(417, "expectation_failed", f"cannot meet `Expect: {expect[:50]}`")
            if not self._busy and self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body:
            raise self._too_large(self._body_bytes)
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = self._request
        if request is None:
            return
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request.received = monotonic()
        self._reset()
        self._waiting.append(request)
        if len(self._waiting) >= self._limits.pipelined and self._transport is not None:
            self._transport.pause_reading()
        self._next()

    def _too_large(self, seen: int) -> ApiError:
        return ApiError(
            413, "body_too_large", f"the body is {seen} bytes or more; this gateway takes {self._limits.body}"
        )

    # -- answering

    def _next(self) -> None:
        """Answer the oldest waiting request, and go on while answers are at hand."""
        while self._waiting and not self._busy and self._blocked_since is None and self._transport is not None:
            request = self._waiting.popleft()
            self._busy = True
            try:
                answer = self._server.handler(request)
            except ApiError as error:
                answer = error_response(error)
            except Exception:
                log.exception("a request failed inside the gateway")
                answer = error_response(ApiError(500, "internal_error", "the gateway failed; its log says why"))
            if isinstance(answer, Response):
                self._answered(request, answer)
            else:
                self._task = asyncio.get_running_loop().create_task(self._later(request, answer))
        if self._refused is not None and not self._busy and not self._waiting:
            self._say_refused()
        elif self._transport is not None and not self._waiting:
            self._resume_reading()

    async def _later(self, request: Request, answer: Awaitable[Response]) -> None:
        try:
            response = await answer
        except ApiError as error:
            response = error_response(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("a request failed inside the gateway")
            response = error_response(ApiError(500, "internal_error", "the gateway failed; its log says why"))
        self._task = None
        self._answered(request, response)
        self._next()

    def _answered(self, request: Request, response: Response) -> None:
        self._busy = False
        self._since = monotonic()
        keep = request.keep_alive and not self._stop_after and not self._server.closing
        origin = request.headers.get("origin") if self._server.cors_origins else None
        self._write(response, keep_alive=keep, origin=origin, head=request.method == "HEAD")
        if not keep and self._transport is not None:
            self._waiting.clear()
            self._transport.close()

    def _write(self, response: Response, *, keep_alive: bool, origin: str | None = None, head: bool = False) -> None:
        if self._transport is None:
            return
        body = response.body
        parts = [
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n"
            % (response.status, REASONS.get(response.status, b"Status"), response.content_type.encode(), len(body))
        ]
        if response.headers:
            parts += [f"{k}: {v}\r\n".encode("latin-1", "replace") for k, v in response.headers.items()]
        if origin is not None and (origin in self._server.cors_origins or "*" in self._server.cors_origins):
            allowed = "*" if "*" in self._server.cors_origins else origin
            parts.append(f"access-control-allow-origin: {allowed}\r\nvary: origin\r\n".encode("latin-1", "replace"))
        parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if not head:
            parts.append(body)
        self._transport.write(b"".join(parts))

    def _refuse(self, error: ApiError) -> None:
        """What follows on this connection cannot be trusted: answer what came before, then the error, then close."""
        self._refused, self._deaf = error, True
        if not self._busy and not self._waiting:
            self._say_refused()

    def _say_refused(self) -> None:
        if self._transport is None or self._refused is None or self._lingers:
            return
        self._write(error_response(self._refused), keep_alive=False)
        if self._transport.can_write_eof():
            # Closed at once, a client still sending would get a reset and never see why.
            self._transport.write_eof()
            self._lingers, self._since = True, monotonic()
            self._resume_reading()
        else:
            self._transport.close()

    def _resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            try:
                self._transport.resume_reading()
            except RuntimeError:  # TLS transports of some versions refuse a second resume
                return

    # -- ends

    def check_timeouts(self, now: float) -> None:
        """Called once a second by the server."""
        if self._transport is None:
            return
        if self._blocked_since is not None:
            if now - self._blocked_since > self._limits.write_timeout:
                self.abort()
            return
        if self._lingers:
            if now - self._since > LINGER:
                self._transport.close()
            return
        if self._busy or self._waiting:
            return
        waited = now - self._since
        if self._reading:
            limit = self._limits.head_timeout if self._request is None else self._limits.body_timeout
            if waited > limit:
                self._refuse(ApiError(408, "request_timeout", f"the request was not complete after {limit:g} s"))
        elif waited > self._limits.idle_timeout:
            self._transport.close()

    def finish(self) -> None:
        """Close as soon as the requests in work are answered."""
        self._stop_after = True
        if not self._busy and not self._waiting and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()
