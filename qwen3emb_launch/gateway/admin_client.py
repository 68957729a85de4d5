"""Calls to a gateway's admin socket: what `up` and rolling restarts use."""

from __future__ import annotations

import asyncio
import http.client
import socket
from pathlib import Path
from typing import Any

import orjson

from qwen3emb_launch.errors import CheckFailedError, NetworkError

OWN = "x-qwen3emb-own"  # header of a call from another worker, which is not passed on again


def call(path: str | Path, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> Any:
    """One call; its JSON answer. Raises NetworkError when nobody answers, CheckFailedError when the answer is no."""
    connection = _UnixConnection(str(path), timeout)
    try:
        data = orjson.dumps(body) if body is not None else None
        connection.request(method, route, data, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = orjson.loads(response.read())
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as exc:
        raise NetworkError(
            "gateway_silent", f"the gateway's admin socket {path} does not answer: {exc}", "is it running?"
        ) from exc
    finally:
        connection.close()
    if response.status != 200:
        raise CheckFailedError(
            "gateway_refused", str(answer.get("error", {}).get("message", answer)), "qwen3emb gateway --help"
        )
    return answer


async def ask(
    path: str | Path, method: str, route: str, body: dict[str, Any] | None, timeout: float, *, own: bool = False
) -> Any:
    """A call from within an event loop. `own`: of this worker alone, not of all. Raises OSError, TimeoutError."""
    data = orjson.dumps(body) if body is not None else b""
    only = f"{OWN}: 1\r\n" if own else ""
    head = f"{method} {route} HTTP/1.1\r\nhost: admin\r\n{only}content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(head.encode() + data)
            seen, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
    if b" 200 " not in seen[:20]:
        raise ConnectionError(f"{method} {route} was answered {seen[:40]!r}")
    return orjson.loads(answer)


class _UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
