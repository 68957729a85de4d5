"""A gateway in the test's own event loop, before null engines, with a client that is nobody's SDK."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import orjson

from qwen3emb_launch.gateway.config import GatewayConfig, UpstreamConfig
from qwen3emb_launch.gateway.http_client import Address, Answer, HttpClient
from qwen3emb_launch.gateway.service import Service
from tests.null_engine import Served


@dataclass
class Bench:
    """The gateway and a client for it."""

    service: Service
    client: HttpClient
    headers: dict[str, str]

    async def post(self, body: object, **headers: str) -> Answer:
        """POST /v1/embeddings with any body, on a connection of the client's pool."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        return await self.request("POST", "/v1/embeddings", raw, **headers)

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """Any request, a connection each."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
        lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", "connection: close"]
        lines += [f"{k.replace('_', '-')}: {v}" for k, v in {**self.headers, **headers}.items()]
        try:
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            return parse_answer(await asyncio.wait_for(reader.read(), 60))
        finally:
            writer.close()

    async def vectors(self, inputs: object, **more: object) -> np.ndarray:
        """Embed, as rows; the answer must be a good one."""
        answer = await self.post({"model": self.service.endpoint.names[0], "input": inputs, **more})
        assert answer.status == 200, answer.body[:500]
        return rows(answer)


def parse_answer(raw: bytes) -> Answer:
    """A whole HTTP answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return Answer(int(first.split()[1]), {k.lower(): v for k, v in (x.split(": ", 1) for x in lines)}, body)


def rows(answer: Answer) -> np.ndarray:
    """The vectors of an answer, in order."""
    data = orjson.loads(answer.body)["data"]
    assert [d["index"] for d in data] == list(range(len(data)))
    decoded = [
        np.frombuffer(base64.b64decode(d["embedding"]), "<f4") if isinstance(d["embedding"], str) else d["embedding"]
        for d in data
    ]
    return np.array(decoded, dtype=np.float32)


def error(answer: Answer) -> dict:
    """The error of an answer; its form is checked."""
    body = orjson.loads(answer.body)
    assert set(body) == {"error"}, body
    assert {"message", "type", "param", "code", "source"} <= set(body["error"]), body
    assert body["error"]["source"] == answer.headers["x-qwen3emb-error-source"]
    return body["error"]


@asynccontextmanager
async def gateway(*engines: Served | str, wait: bool = True, **settings: object) -> AsyncIterator[Bench]:
    """Started, its upstreams proved, closed."""
    headers = settings.pop("headers", {})
    tracing = settings.pop("tracing", None)
    urls = tuple(UpstreamConfig(e if isinstance(e, str) else e.url) for e in engines)
    config = replace(GatewayConfig(upstreams=urls, port=0, drain=1.0), **settings)
    service = Service(config, tracing=tracing)
    await service.start()
    try:
        if wait:
            async with asyncio.timeout(20):
                while len(service.pool.up) < len(urls) or service.endpoint.model is None:
                    await asyncio.sleep(0.005)
        client = HttpClient(Address.parse(f"http://127.0.0.1:{service.port}/v1"))
        yield Bench(service, client, headers)
    finally:
        await service.close()
