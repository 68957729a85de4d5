"""A request, a response, and what one connection may take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import orjson

from qwen3emb_launch.gateway.api_errors import ApiError

REASONS = {
    200: b"OK", 204: b"No Content", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found",
    405: b"Method Not Allowed", 408: b"Request Timeout", 409: b"Conflict", 413: b"Content Too Large",
    414: b"URI Too Long", 417: b"Expectation Failed", 421: b"Misdirected Request", 429: b"Too Many Requests",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 502: b"Bad Gateway",
    503: b"Service Unavailable", 504: b"Gateway Timeout",
}  # fmt: skip
JSON = "application/json"


@dataclass(frozen=True)
class HttpLimits:
    """What one connection may take. Bytes and seconds."""

    body: int = 32 << 20
    header_bytes: int = 32 << 10
    header_count: int = 100
    line: int = 8 << 10
    head_timeout: float = 10.0
    body_timeout: float = 60.0
    idle_timeout: float = 120.0
    write_timeout: float = 60.0
    connections: int = 4096
    memory: int = 1 << 30  # of bodies, and of unsent answers, over all connections
    pipelined: int = 16


class Request:
    """One request, whole. `headers` has lower-case names; a repeated one is joined by a comma."""

    __slots__ = ("body", "body_limit", "headers", "keep_alive", "method", "path", "peer", "query", "received")

    def __init__(self, method: str, path: str, query: str, headers: dict[str, str], peer: str) -> None:
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.peer = peer
        self.body: bytes | bytearray = b""
        self.body_limit = 0
        self.keep_alive = True
        self.received = monotonic()


class Response:
    """One answer, ready to be written. A body in pieces is put together once, with its head."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(
        self, status: int, body: bytes | list[bytes], content_type: str = JSON, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status = status
        self.body = [body] if isinstance(body, bytes) else body
        self.content_type = content_type
        self.headers = headers


Handler = Callable[[Request], "Response | Awaitable[Response]"]


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Any plain value as JSON."""
    return Response(status, orjson.dumps(value), JSON, headers)


def error_response(error: ApiError) -> Response:
    """An error in OpenAI's form."""
    return json_response(error.body(), error.status, error.headers())
