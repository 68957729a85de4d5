"""One client's connection: what it may send and how slowly, and its answers in the order of its requests."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable
from time import monotonic
from typing import TYPE_CHECKING

import httptools

from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.http_messages import REASONS, Request, Response, error_response

if TYPE_CHECKING:
    from qwen3emb_launch.gateway.http_server import HttpServer

log = logging.getLogger(__name__)

LINGER = 2.0  # seconds a refused client may go on sending into the void
DAWDLING_HEAD, DAWDLING_BODY = 1.0, 10.0  # seconds
OFFERS = ("upgrade", "http2-settings")
HIGH_WATER = 1 << 20  # bytes a connection may have unsent before its requests wait


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
        self._head: bytes | None = None  # of a request that offers another protocol, without the offer
        self._reset()
        self._begun = 0  # requests
        self._held = 0  # bytes of bodies of this connection in memory
        self.since = monotonic()  # of the last change: a request begun, read or answered
        self._blocked_since: float | None = None
        self._busy = False

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._bodiless = 0  # bytes since the head's beginning or the body's last
        self._header_bytes = 0
        self._header_count = 0
        self._body: bytes | bytearray = b""
        self._request: Request | None = None
        self._reading = False

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self._peer = str(peer[0])
        server = self._server
        full = len(server.connections) >= self._limits.connections and not server.make_room()
        if server.closing or full:
            error = ApiError(503, "too_many_connections", "the gateway's connection limit is reached", retry_after=1)
            self._write(error_response(error), keep_alive=False)
            transport.close()
            return
        server.connections.add(self)
        transport.set_write_buffer_limits(high=HIGH_WATER)  # type: ignore[attr-defined]

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._let_go(self._held)
        self._waiting.clear()
        self._transport = None
        if self._task is not None:
            self._task.cancel()  # nobody is left to read the answer

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        try:
            begun, body = self._begun, len(self._body)
            rest = None
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                rest = memoryview(data)[offer.args[0] :]
            if rest is not None:
                self._decline(rest)
            if begun == self._begun and body == len(self._body):
                self._count_bodiless(len(data))
        except ApiError as error:
            self._refuse(error)
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            if isinstance(cause, ApiError):
                self._refuse(cause)
            else:
                self._refuse(ApiError(400, "bad_http", "that was not a well-formed HTTP/1.1 request"))

    def _decline(self, rest: memoryview) -> None:
        """A client has offered another protocol before `rest`: read on as if it had not.

        Java's own HTTP client offers HTTP/2 with its first request, whose body comes as HTTP/1.1; the parser skips it.
        """
        more: memoryview | None = rest
        while more is not None:
            rest, more = more, None
            if self._head is None:
                self._deaf = True  # CONNECT is answered; what follows would be anything
                return
            head, self._head = self._head, None
            self._parser = httptools.HttpRequestParser(self)
            self._parser.feed_data(head)
            try:
                self._parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                more = rest[offer.args[0] :]

    def _head_without_offer(self) -> bytes:
        kept = [(name, value) for name, value in self._headers.items() if name not in ("connection", *OFFERS)]
        if not self._parser.should_keep_alive():
            kept.append(("connection", "close"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in kept).encode("latin-1")
        return b"%b %b HTTP/1.1\r\n%b\r\n" % (self._parser.get_method(), self._url, lines)

    def _count_bodiless(self, size: int) -> None:
        """A header or trailer that never ends is kept by the parser, empty lines before a request are skipped by it,
        and both told to nobody: their bytes are counted here."""
        self._bodiless += size
        if self._bodiless > self._limits.line + self._limits.header_bytes:
            raise self._headers_too_large()

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
        self._begun += 1
        self._reading = True
        self.since = monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self._limits.line:
            raise ApiError(414, "uri_too_long", f"the request line is longer than {self._limits.line} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._request is not None:
            return  # behind a chunked body: nothing here needs trailers, and nothing of the head may be changed by them
        self._header_bytes += len(name) + len(value) + 4
        self._header_count += 1
        if self._header_count > self._limits.header_count or self._header_bytes > self._limits.header_bytes:
            raise self._headers_too_large()
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        known = self._headers.get(key)
        self._headers[key] = text if known is None else f"{known}, {text}"

    def _headers_too_large(self) -> ApiError:
        limits = self._limits
        message = f"more than {limits.header_count} headers or {limits.header_bytes} bytes of them"
        return ApiError(431, "headers_too_large", message)

    def on_headers_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        method = self._parser.get_method().decode("latin-1")
        if self._parser.should_upgrade() and method != "CONNECT":
            self._head = self._head_without_offer()
            return
        request = Request(method, path, query, self._headers, self._peer)
        request.keep_alive = self._parser.should_keep_alive() and not self._parser.should_upgrade()
        self._request = request
        self._bodiless = 0
        self.since = monotonic()
        host = self._headers.get("host")
        if (host is None and self._parser.get_http_version() == "1.1") or (host is not None and "," in host):
            raise ApiError(400, "bad_host", "an HTTP/1.1 request has exactly one Host header")
        request.body_limit = self._limits.body
        if self._server.early is not None:
            self._server.early(request)
        length = self._headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > request.body_limit:
            raise self._too_large(int(length), request.body_limit)
        expect = self._headers.get("expect")
        if expect is not None:
            if expect.lower() != "100-continue":
                raise ApiError(417, "expectation_failed", f"cannot meet `Expect: {expect[:50]}`")
            old = self._parser.get_http_version() == "1.0"  # such a client would take it for the answer
            if not (self._busy or old) and self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        size = len(self._body) + len(body)
        limit = self._request.body_limit if self._request is not None else 0
        if size > limit:
            raise self._too_large(size, limit)
        self._held += len(body)
        self._server.held += len(body)
        if self._server.held > self._limits.memory:
            raise ApiError(503, "overloaded", "too many large requests at once", retry_after=1)
        self._bodiless = 0
        if not self._body:
            self._body = body
            return
        if isinstance(
            self._body, bytes
        ):  # one buffer: an object for each chunk of a byte or two takes twenty times that
            self._body = bytearray(self._body)
        self._body += body

    def on_message_complete(self) -> None:
        request = self._request
        if request is None:
            return
        request.body = self._body
        request.received = monotonic()
        self._reset()
        self._waiting.append(request)
        if len(self._waiting) >= self._limits.pipelined and self._transport is not None:
            self._transport.pause_reading()
        self._next()

    def _too_large(self, seen: int, limit: int) -> ApiError:
        return ApiError(413, "body_too_large", f"the body is {seen} bytes or more; {limit} are taken here")

    def _let_go(self, size: int) -> None:
        """So much of the bodies is in memory no longer."""
        self._held -= size
        self._server.held -= size

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
        self.since = monotonic()
        self._let_go(len(request.body))
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
        size = sum(map(len, body))
        parts = [
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n"
            % (response.status, REASONS.get(response.status, b"Status"), response.content_type.encode(), size)
        ]
        if response.headers:
            parts += [f"{k}: {v}\r\n".encode("latin-1", "replace") for k, v in response.headers.items()]
        if origin is not None and (origin in self._server.cors_origins or "*" in self._server.cors_origins):
            allowed = "*" if "*" in self._server.cors_origins else origin
            parts.append(f"access-control-allow-origin: {allowed}\r\n".encode("latin-1", "replace"))
            parts.append(b"access-control-expose-headers: *\r\nvary: origin\r\n")
        parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if not head:
            parts += body
        self._transport.write(b"".join(parts))

    def _refuse(self, error: ApiError) -> None:
        """What follows on this connection cannot be trusted: answer what came before, then the error, then close."""
        self._refused, self._deaf = error, True
        if not self._busy and not self._waiting:
            self._say_refused()

    def _say_refused(self) -> None:
        if self._transport is None or self._refused is None or self._lingers:
            return
        origin = self._headers.get("origin") if self._server.cors_origins else None
        self._write(error_response(self._refused), keep_alive=False, origin=origin)
        if self._transport.can_write_eof():
            # Closed at once, a client still sending would get a reset and never see why.
            self._transport.write_eof()
            self._lingers, self.since = True, monotonic()
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

    @property
    def idle(self) -> bool:
        """Between two requests, the last answer fetched."""
        return not (self._reading or self._busy or self._waiting or self._blocked_since)

    @property
    def dawdles(self) -> bool:
        """Sending a request for longer than a client takes that is in earnest."""
        if not self._reading or self._busy or self._waiting:
            return False
        return monotonic() - self.since > (DAWDLING_HEAD if self._request is None else DAWDLING_BODY)

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not fetched."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def check_timeouts(self, now: float) -> None:
        """Called once a second by the server."""
        if self._transport is None:
            return
        if self._blocked_since is not None:
            if now - self._blocked_since > self._limits.write_timeout:
                self.abort()
            return
        if self._lingers:
            if now - self.since > LINGER:
                self._transport.close()
            return
        if self._busy or self._waiting:
            return
        waited = now - self.since
        if self._reading:
            limit = self._limits.head_timeout if self._request is None else self._limits.body_timeout
            if waited > limit:
                self._refuse(ApiError(408, "request_timeout", f"the request was not complete after {limit:g} s"))
        elif waited > self._limits.idle_timeout:
            self._transport.close()

    def finish(self) -> None:
        """Close as soon as the requests in work are answered, one whose body is on its way included."""
        self._stop_after = True
        uploading = self._request is not None and not self._lingers
        if not (self._busy or self._waiting or uploading) and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now."""
        if self._transport is not None:
            self._transport.abort()
