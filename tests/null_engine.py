"""An OpenAI-compatible engine that computes nothing, gives each text its own vector, and can misbehave.

    python tests/null_engine.py --port 18080 --dims 2560 [--delay-ms 20] [--per-item-ms 1]
    python tests/null_engine.py --port 18080 --dims 2560 --pass-ms 1.7 --per-item-ms 0.42 --request-us 300 --item-us 150

Unlike null_server.py its vectors depend on the text, so that a swapped or stale answer is seen. A text that contains
REFUSE is answered 400, POISON kills the process, SLOW takes a second. The second form takes its time as an engine on a
GPU does: one pass at a time over all that waits, and work of the HTTP process for each request and text.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import queue
import random
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from zlib import crc32

import httptools
import numpy as np
import orjson

DISTINCT = 1024  # vectors; a text's is chosen by its checksum
PASS_ITEMS = 128  # what one pass takes at most


class Passes:
    """A GPU with one queue, as a thread that sleeps: a pass takes what waits and lasts longer the more that is."""

    def __init__(self, seconds: float, per_item: float) -> None:
        self.seconds, self.per_item = seconds, per_item
        self.sizes: list[int] = []
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    async def take(self, items: int) -> None:
        """Until a pass over these is done."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._waiting.put((items, loop, done))
        await done

    def _run(self) -> None:
        ends = time.perf_counter()
        kept = None
        while True:
            batch = [kept or self._waiting.get()]
            kept, size = None, batch[0][0]
            while kept is None and not self._waiting.empty():
                one = self._waiting.get()
                if size + one[0] > PASS_ITEMS:
                    kept = one
                else:
                    batch.append(one)
                    size += one[0]
            ends = max(ends, time.perf_counter()) + self.seconds + self.per_item * size
            self.sizes.append(size)
            time.sleep(max(0.0, ends - time.perf_counter()))
            for _, loop, done in batch:
                loop.call_soon_threadsafe(lambda done=done: done.done() or done.set_result(None))


def spin(seconds: float) -> None:
    """Hold this process's CPU."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class NullEngine:
    """State and behaviour. Seconds; `calls` and `items` count what was asked of it."""

    def __init__(
        self, dims: int = 256, delay: float = 0.0, per_item: float = 0.0, floats: bool = False, model: str = "null",
        seed: int = 1, max_model_len: int = 8192, serial: bool = False, pass_time: float = 0.0,
        request_cpu: float = 0.0, item_cpu: float = 0.0,
    ) -> None:  # fmt: skip
        rows = np.random.default_rng(seed).standard_normal((DISTINCT, dims)).astype(np.float32)
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.floats = floats  # whatever is asked for, as engines did before they knew base64
        self._base64 = [b'"' + base64.b64encode(r.tobytes()) + b'"' for r in self.rows]
        self._lists: dict[int, bytes] = {}
        self.delay, self.per_item, self.model, self.max_model_len = delay, per_item, model, max_model_len
        self.calls = self.items = self.in_air = 0
        self.sizes: list[int] = []
        self.bodies: list[dict] = []
        self.decode: Callable[[list[int]], str] | None = None  # with it, ids get the vector of the text they are of
        self.info: dict | None = {}  # what it says of itself at other routes, over the usual; None: it hangs up
        self.status: tuple[int, bytes] | None = None  # answer this instead
        self.raw: bytes | None = None  # the body of a 200 instead
        self.hang = False
        self.serial = asyncio.Lock() if serial else None
        self.passes = Passes(pass_time, per_item) if pass_time else None
        self.request_cpu, self.item_cpu = request_cpu, item_cpu
        self.links: set[Link] = set()
        self.aborted = 0

    def vector(self, text: str | list[int]) -> np.ndarray:
        """What this engine answers for a text or token ids."""
        return self.rows[self.index(text)]

    def index(self, text: str | list[int]) -> int:
        if self.decode:  # texts as tokenizers see them
            text = unicodedata.normalize("NFC", text if isinstance(text, str) else self.decode(text))
        raw = text.encode() if isinstance(text, str) else b"ids" + repr(text).encode()
        return crc32(raw) % DISTINCT

    def encoded(self, row: int, asked: dict) -> bytes:
        """A vector as JSON."""
        if not self.floats and asked.get("encoding_format") != "float":
            return self._base64[row]
        found = self._lists.get(row)
        if found is None:
            found = self._lists[row] = orjson.dumps(self.rows[row], option=orjson.OPT_SERIALIZE_NUMPY)
        return found

    async def embed(self, body: bytes) -> tuple[int, bytes]:
        asked = orjson.loads(body)
        inputs = asked["input"]
        if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
            inputs = [inputs]
        self.calls += 1
        self.items += len(inputs)
        self.sizes.append(len(inputs))
        self.bodies.append(asked)
        if self.hang:
            await asyncio.Event().wait()
        pause = self.delay + self.per_item * len(inputs)
        if any(isinstance(t, str) and "SLOW" in t for t in inputs):
            pause += 1.0
        spin(self.request_cpu + self.item_cpu * len(inputs))
        if self.passes:
            await self.passes.take(len(inputs))
        elif self.serial:
            async with self.serial:
                await asyncio.sleep(pause)
        elif pause:
            await asyncio.sleep(pause)
        if self.status:
            return self.status
        if any(isinstance(t, str) and "POISON" in t for t in inputs):
            os._exit(9)
        if any(isinstance(t, str) and "REFUSE" in t for t in inputs):
            message = "refused by /usr/lib/python3/site-packages/engine/serve.py"
            return 400, orjson.dumps({"object": "error", "message": message, "type": "BadRequest", "code": 400})
        if self.raw is not None:
            return 200, self.raw
        parts = [
            b'{"object":"embedding","index":%d,"embedding":%b}' % (i, self.encoded(self.index(t), asked))
            for i, t in enumerate(inputs)
        ]
        texts = [t if isinstance(t, str) or not self.decode else self.decode(t) for t in inputs]
        tokens = sum(len(t.split()) + 1 if isinstance(t, str) else len(t) for t in texts)
        usage = b'"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
        return 200, b'{"object":"list","data":[' + b",".join(parts) + b'],"model":"null",' + usage + b"}"


class Link(asyncio.Protocol):
    """One connection."""

    def __init__(self, engine: NullEngine) -> None:
        self.engine, self.parser, self.body, self.url = engine, httptools.HttpRequestParser(self), [], b""
        self.task: asyncio.Task | None = None

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.engine.links.add(self)

    def connection_lost(self, exc) -> None:
        self.engine.links.discard(self)
        if self.task:
            self.engine.aborted += 1
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url = url

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        body, self.body = b"".join(self.body), []
        if self.url == b"/v1/models":
            row = {"id": self.engine.model, "object": "model", "max_model_len": self.engine.max_model_len}
            self.write(200, orjson.dumps({"object": "list", "data": [row]}))
        elif self.url != b"/v1/embeddings" and self.engine.info is None:
            self.transport.abort()
        elif self.url != b"/v1/embeddings":  # what a router asks a worker: health, model and server information
            name = self.engine.model
            about = {"model_path": name, "served_model_name": name, "model_id": name, "is_generation": False}
            self.write(200, orjson.dumps(about | self.engine.info))
        else:
            self.task = asyncio.ensure_future(self.answer(body))

    async def answer(self, body: bytes) -> None:
        status, out = await self.engine.embed(body)
        self.task = None
        self.write(status, out)

    def write(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)


class Served:
    """A null engine on a port, in this event loop. `stop` closes everything, `start` comes back on the same port.

    The port lies below those that the kernel gives to outgoing connections: one of them would take it meanwhile.
    """

    def __init__(self, engine: NullEngine) -> None:
        self.engine = engine
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> Served:
        loop, wanted = asyncio.get_running_loop(), self.port
        while True:
            port = wanted or random.randrange(20000, 32000)
            try:
                self.server = await loop.create_server(lambda: Link(self.engine), "127.0.0.1", port)
            except OSError:
                if wanted:
                    raise
                continue
            self.port = port
            return self

    async def stop(self) -> None:
        for listening in self.server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(3):  # asyncio would leave a connection that it is just accepting open and unserved
            await asyncio.sleep(0)
        self.server.close()
        for link in list(self.engine.links):
            link.transport.abort()
        await self.server.wait_closed()

    async def __aenter__(self) -> Served:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            await self.stop()


@contextmanager
def in_thread(engine: NullEngine) -> Iterator[Served]:
    """The same, in a thread of its own, for tests that block."""
    loop, ready, out = asyncio.new_event_loop(), threading.Event(), Served(engine)

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(out.start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(out.stop())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield out
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _serve(args: argparse.Namespace) -> None:
    engine = NullEngine(
        args.dims, args.delay_ms / 1e3, args.per_item_ms / 1e3, args.floats, serial=args.serial,
        pass_time=args.pass_ms / 1e3, request_cpu=args.request_us / 1e6, item_cpu=args.item_us / 1e6,
    )  # fmt: skip
    served = Served(engine)
    served.port = args.port
    await served.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--dims", type=int, default=256)
    options.add_argument("--delay-ms", type=float, default=0)
    options.add_argument("--per-item-ms", type=float, default=0)
    options.add_argument("--floats", action="store_true")
    options.add_argument("--serial", action="store_true")
    options.add_argument("--pass-ms", type=float, default=0)
    options.add_argument("--request-us", type=float, default=0)
    options.add_argument("--item-us", type=float, default=0)
    import uvloop

    uvloop.run(_serve(options.parse_args()))
