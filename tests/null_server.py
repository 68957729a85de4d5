"""An OpenAI-compatible embedding endpoint that computes nothing: what is measured against it is the client.

Run: python tests/null_server.py --port 18080 [--delay-ms 5] [--fault norm --fault-every 10]
It honours `dimensions` and `encoding_format`, counts tokens by words, and can misbehave on purpose.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import random
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_SINGLE = re.compile(rb'"input": ?"([^"\\]*)"\s*[,}]')
_DIMS = re.compile(rb'"dimensions": ?(\d+)')
FAULTS = ("nan", "norm", "count", "dims", "order", "malformed", "http_503", "reset", "hang")


@dataclass(frozen=True)
class Behaviour:
    """What the server does. `per_text` and `delay` are seconds; a serial server answers one request at a time.

    Every `fault_every`-th answer has the `fault`, after the first `fault_from`.
    `tokens_per_word` and `overhead` shape `usage`; 0 gives no usage.
    """

    dims: int = 256
    delay: float = 0.0
    serial: bool = False
    fault: str = ""
    fault_every: int = 1
    fault_from: int = 0
    tokens_per_word: int = 1
    overhead: int = 1
    api_key: str = ""


class NullEndpoint:
    """The state all connections share."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.answered = 0
        self.texts: list[str] | None = None  # set to a list to record what was asked
        self.bodies: list[bytes] | None = None
        self.open: set[asyncio.Transport] = set()
        self.free_at = 0.0
        self._vectors: dict[tuple[int, bool], bytes] = {}

    def vector(self, dims: int, as_base64: bool) -> bytes:
        """The same unit vector for everything, as JSON."""
        key = (dims, as_base64)
        if key not in self._vectors:
            source = random.Random(1)
            raw = [source.gauss(0, 1) for _ in range(dims)]
            norm = math.hypot(*raw)
            packed = struct.pack(f"<{dims}f", *(x / norm for x in raw))
            if as_base64:
                self._vectors[key] = b'"' + base64.b64encode(packed) + b'"'
            else:
                self._vectors[key] = json.dumps(struct.unpack(f"<{dims}f", packed)).encode()
        return self._vectors[key]

    def answer(self, head: bytes, body: bytes) -> tuple[int, bytes]:
        """(status, JSON)."""
        behaviour = self.behaviour
        self.answered += 1
        if behaviour.api_key and f"authorization: bearer {behaviour.api_key}".encode() not in head.lower():
            return 401, b'{"error": {"message": "no such key", "code": "invalid_api_key"}}'
        if self.bodies is not None:
            self.bodies.append(body)
        single = _SINGLE.search(body)
        if not single and not body.lstrip().startswith(b"{"):
            return 400, b'{"error": {"message": "no JSON object"}}'
        if single:
            words, count = single[1].count(b" "), 1
            texts = [single[1].decode()] if self.texts is not None else []
        else:
            given = json.loads(body)["input"]
            texts = given if isinstance(given, list) else [given]
            words, count = sum(t.count(" ") for t in texts), len(texts)
        if self.texts is not None:
            self.texts += texts
        wanted = _DIMS.search(body)
        dims = int(wanted[1]) if wanted else behaviour.dims
        as_base64 = b'"base64"' in body
        faulty = self.answered > behaviour.fault_from and self.answered % behaviour.fault_every == 0
        fault = behaviour.fault if faulty else ""
        if fault == "http_503":
            return 503, b'{"error": {"message": "overloaded"}}'
        if fault == "malformed":
            return 200, b'{"data": [{"embedd'
        vector = self.vector(dims + (fault == "dims"), as_base64)
        if fault == "nan":
            vector = b"[NaN" + b", 0.1" * (dims - 1) + b"]"
        elif fault == "norm":
            vector = b"[" + b", ".join([b"0.9"] * dims) + b"]"
        if fault == "count":
            count += 1
        items = b", ".join(
            b'{"object": "embedding", "index": %d, "embedding": %b}' % (i + (fault == "order"), vector)
            for i in range(count)
        )
        usage = b""
        if behaviour.tokens_per_word:
            tokens = words * behaviour.tokens_per_word + count * behaviour.overhead
            usage = b', "usage": {"prompt_tokens": %d, "total_tokens": %d}' % (tokens, tokens)
        return 200, b'{"object": "list", "data": [%b], "model": "null"%b}' % (items, usage)


class Connection(asyncio.Protocol):
    """Keep-alive HTTP/1.1, one request at a time."""

    def __init__(self, endpoint: NullEndpoint) -> None:
        self.endpoint = endpoint
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.endpoint.open.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.endpoint.open.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end]
            match = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            length = int(match[1]) if match else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.serve(head, body)

    def serve(self, head: bytes, body: bytes) -> None:
        endpoint, behaviour = self.endpoint, self.endpoint.behaviour
        if head.startswith(b"GET"):
            self.reply(200, b'{"object": "list", "data": [{"id": "null", "object": "model"}]}')
            return
        fault_now = behaviour.fault and (endpoint.answered + 1) % behaviour.fault_every == 0
        if fault_now and behaviour.fault == "reset":
            endpoint.answered += 1
            self.transport.abort()
            return
        if fault_now and behaviour.fault == "hang":
            endpoint.answered += 1
            return
        status, answer = endpoint.answer(head, body)
        if not behaviour.delay:
            self.reply(status, answer)
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        start = max(now, endpoint.free_at) if behaviour.serial else now
        endpoint.free_at = start + behaviour.delay
        loop.call_at(endpoint.free_at, self.reply, status, answer)

    def reply(self, status: int, body: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (status, len(body), body)
            )


@contextmanager
def null_server(behaviour: Behaviour | None = None) -> Iterator[tuple[str, NullEndpoint]]:
    """A server in a thread for tests: (base URL, endpoint)."""
    endpoint = NullEndpoint(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(loop.create_server(lambda: Connection(endpoint), "127.0.0.1", 0))
    port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1", endpoint
    finally:
        asyncio.run_coroutine_threadsafe(_end(server, endpoint), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _end(server: asyncio.Server, endpoint: NullEndpoint) -> None:
    """No connection is left half accepted, whose coroutine would never run, and none is left open."""
    while accepting := asyncio.all_tasks() - {asyncio.current_task()}:  # asyncio has a task for each
        await asyncio.gather(*accepting, return_exceptions=True)
    server.close()
    while endpoint.open:
        for transport in endpoint.open:
            transport.abort()
        await asyncio.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=18080)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--delay-ms", type=float, default=0)
    parser.add_argument("--serial", action="store_true")
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--fault-every", type=int, default=1)
    given = parser.parse_args()
    behaviour = Behaviour(given.dims, given.delay_ms / 1000, given.serial, given.fault, given.fault_every)

    async def serve() -> None:
        endpoint = NullEndpoint(behaviour)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(endpoint), "127.0.0.1", given.port, backlog=4096)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)  # noqa: T201
        await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
