"""A small OpenAI-compatible endpoint with vectors from hashes of the texts, for checks that need no model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import orjson

WIDTH = 64


@cache
def hashed(text: str, width: int = WIDTH) -> list[float]:
    """A unit vector that the text decides. Not to be changed by the caller."""
    seed = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big")
    values = np.random.default_rng(seed).standard_normal(width)
    return (values / np.linalg.norm(values)).tolist()


@cache
def cut(vector: tuple[float, ...], dims: int | None) -> list[float]:
    """Its first components, at length 1."""
    length = math.hypot(*vector[:dims])
    return [x / length for x in vector[:dims]]


class SmallEndpoint:
    """An OpenAI-compatible endpoint without a model. `vectors` overrides the hash; `key` is required when set."""

    def __init__(self) -> None:
        self.vectors: dict[str, list[float]] = {}
        self.width = WIDTH
        self.key: str | None = None
        self.model: dict[str, Any] = {"id": "hash", "object": "model", "owned_by": "test"}

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [self.model]}
        return 404, {"error": {"message": "no such route"}}

    def embed(self, body: Any) -> tuple[int, Any]:
        def refuse(why: str) -> tuple[int, Any]:
            return 400, {"error": {"message": why, "type": "invalid_request_error", "code": "bad"}}

        if not isinstance(body, dict) or "input" not in body:
            return refuse("no input")
        given, dims = body["input"], body.get("dimensions")
        inputs = [given] if isinstance(given, str) else given
        if not isinstance(inputs, list) or not inputs or not all(isinstance(t, str) and t.strip() for t in inputs):
            return refuse("bad input")
        if dims is not None and (not isinstance(dims, int) or not 1 <= dims <= self.width):
            return refuse("bad dimensions")
        if body.get("model") != self.model["id"]:
            return 404, {"error": {"message": "no such model", "type": "invalid_request_error", "code": "model"}}
        data = []
        for i, text in enumerate(inputs):
            vector = self.vectors.get(text) or hashed(text, self.width)
            data.append({"index": i, "embedding": cut(tuple(vector), dims)})
        tokens = sum(len(t.encode()) + 1 for t in inputs)
        return 200, {"data": data, "model": "hash", "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms an answer otherwise
    endpoint: SmallEndpoint

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.endpoint.key and self.headers.get("authorization") != f"Bearer {self.endpoint.key}":
            self.reply(401, {"error": {"message": "wrong key"}})
        else:
            self.reply(*self.endpoint.get(self.path))

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        if self.path != "/v1/embeddings":
            self.reply(404, {"error": {"message": "no such route"}})
            return
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        self.reply(*self.endpoint.embed(body))

    def reply(self, status: int, value: Any) -> None:
        data = orjson.dumps(value)
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # sixteen clients connect at once; five may, by default


@contextmanager
def serving(endpoint: SmallEndpoint, handler: type[_Handler] = _Handler) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), type("Handler", (handler,), {"endpoint": endpoint}))
    server.daemon_threads = True
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
