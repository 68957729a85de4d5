"""A proxy before a real endpoint that alters requests or answers: the faults `qwen3emb verify` must name.

A fault is a function of an Exchange. It may change the body before `forward()`, the answer after it, or answer itself.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from qwen3emb_launch.vectors import from_base64, to_base64


@dataclass
class Exchange:
    """One POST of /v1/embeddings on its way. `count` numbers them from 0, `busy` is how many are in the air."""

    body: dict[str, Any]
    send: Callable[[dict[str, Any]], tuple[int, Any]]
    count: int
    busy: int
    memory: dict[str, Any]

    def forward(self) -> tuple[int, Any]:
        """Ask the real endpoint with the body as it is now."""
        return self.send(self.body)

    @property
    def texts(self) -> list[str]:
        """The inputs, where they are texts."""
        given = self.body.get("input")
        if isinstance(given, str):
            return [given]
        return [t for t in given if isinstance(t, str)] if isinstance(given, list) else []

    def rewrite(self, change: Callable[[str], str]) -> None:
        """Change every text."""
        given = self.body.get("input")
        if isinstance(given, str):
            self.body["input"] = change(given)
        elif isinstance(given, list):
            self.body["input"] = [change(t) if isinstance(t, str) else t for t in given]


Fault = Callable[[Exchange], tuple[int, Any]]


def each_vector(exchange: Exchange, change: Callable[[list[float], int], Any]) -> tuple[int, Any]:
    """Forward, then change every vector of a right answer; base64 comes back as numbers."""
    status, answer = exchange.forward()
    if status == 200:
        for i, item in enumerate(answer["data"]):
            vector = item["embedding"]
            item["embedding"] = change(from_base64(vector) if isinstance(vector, str) else vector, i)
    return status, answer


def honest(exchange: Exchange) -> tuple[int, Any]:
    return exchange.forward()


def unnormalised(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [7.3 * x for x in v])


def ignores_dimensions(exchange: Exchange) -> tuple[int, Any]:
    exchange.body.pop("dimensions", None)
    return exchange.forward()


def slices_only(exchange: Exchange) -> tuple[int, Any]:
    dims = exchange.body.pop("dimensions", None)
    return each_vector(exchange, lambda v, _: v[:dims])


def slices_the_end(exchange: Exchange) -> tuple[int, Any]:
    dims = exchange.body.pop("dimensions", None)

    def cut(vector: list[float], _: int) -> list[float]:
        part = vector[-dims:] if dims else vector
        length = math.hypot(*part)
        return [x / length for x in part]

    return each_vector(exchange, cut)


def swaps_vectors(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and len(answer["data"]) > 1:
        first, second = answer["data"][:2]
        first["embedding"], second["embedding"] = second["embedding"], first["embedding"]
    return status, answer


def reverses_items(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200:
        answer["data"].reverse()
    return status, answer


def index_from_one(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200:
        for item in answer["data"]:
            item["index"] += 1
    return status, answer


def drops_an_item(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and len(answer["data"]) > 1:
        answer["data"].pop()
    return status, answer


def noise(exchange: Exchange) -> tuple[int, Any]:
    source = random.Random(exchange.count)
    return each_vector(exchange, lambda v, _: [x + source.gauss(0, 0.01) for x in v])


def constant_noise(exchange: Exchange) -> tuple[int, Any]:
    """The same small error for the same text: only a reference can see it."""
    texts = exchange.texts

    def change(vector: list[float], i: int) -> list[float]:
        source = random.Random(texts[i] if texts else i)
        changed = [x + source.gauss(0, 0.005) for x in vector]
        length = math.hypot(*changed)
        return [x / length for x in changed]

    return each_vector(exchange, change)


def constant(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [1 / math.sqrt(len(v))] * len(v))


def not_a_number(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [math.nan] * len(v))


def nulls(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [None, *v[1:]])


def zeros(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [0.0] * len(v))


def overflow(exchange: Exchange) -> tuple[int, Any]:
    """float16 on the 8B: NaN for texts that begin with `import`."""
    texts = exchange.texts
    return each_vector(
        exchange, lambda v, i: [math.nan] * len(v) if texts and texts[i].startswith("import") else v
    )  # fmt: skip


def strips_instruction(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.partition("\nQuery:")[2] or t)
    return exchange.forward()


def space_after_query(exchange: Exchange) -> tuple[int, Any]:
    def spaced(text: str) -> str:
        head, mark, query = text.partition("\nQuery:")
        return f"{head}{mark} {query.lstrip()}" if mark else text

    exchange.rewrite(spaced)
    return exchange.forward()


def lower_cases(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(str.lower)
    return exchange.forward()


def strips_space(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.strip() or t)
    return exchange.forward()


def newlines_to_spaces(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.replace("\n", " "))
    return exchange.forward()


def truncates(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.encode()[:512].decode(errors="ignore"))
    return exchange.forward()


def truncates_too_long(exchange: Exchange) -> tuple[int, Any]:
    """What fits is right, what does not is cut without a word."""
    exchange.rewrite(lambda t: t.encode()[:8000].decode(errors="ignore"))
    return exchange.forward()


def caches_by_prefix(exchange: Exchange) -> tuple[int, Any]:
    known = exchange.memory
    if exchange.body.get("dimensions") or not exchange.texts:
        return exchange.forward()
    texts = exchange.texts
    return each_vector(exchange, lambda v, i: known.setdefault(texts[i][:200] if len(texts[i]) > 200 else texts[i], v))


def mixes_under_load(exchange: Exchange) -> tuple[int, Any]:
    """With more than three requests in the air some get the answer to another of these."""
    status, answer = exchange.forward()
    if exchange.busy == 1:
        exchange.memory.pop("last", None)
    if status == 200 and exchange.busy > 3 and len(exchange.texts) == 1 and not exchange.body.get("dimensions"):
        vector = answer["data"][0]["embedding"]
        answer["data"][0]["embedding"] = exchange.memory.get("last", vector)
        exchange.memory["last"] = vector
    return status, answer


def some_widths(exchange: Exchange) -> tuple[int, Any]:
    texts = exchange.texts
    return each_vector(exchange, lambda v, i: v[:-1] if texts and len(texts[i]) > 60 else v)


def fails_one_in_five(exchange: Exchange) -> tuple[int, Any]:
    if exchange.count % 5 == 4:
        return 500, {"object": "error", "message": "CUDA error: an illegal memory access", "code": 500}
    return exchange.forward()


def wrong_one_in_five(exchange: Exchange) -> tuple[int, Any]:
    source = random.Random(exchange.count)
    if exchange.count % 5 != 4:
        return exchange.forward()

    def other(vector: list[float], _: int) -> list[float]:
        changed = [source.gauss(0, 1) for _ in vector]
        return [x / math.hypot(*changed) for x in changed]

    return each_vector(exchange, other)


def slow(exchange: Exchange) -> tuple[int, Any]:
    threading.Event().wait(0.25)
    return exchange.forward()


def int8_storage(exchange: Exchange) -> tuple[int, Any]:
    def rounded(vector: list[float], _: int) -> list[float]:
        step = max(map(abs, vector)) / 12
        cut = [round(x / step) * step for x in vector]
        return [x / math.hypot(*cut) for x in cut]

    return each_vector(exchange, rounded)


def two_decimals(exchange: Exchange) -> tuple[int, Any]:
    # Towards zero: rounding to the nearest moves a norm by about what bfloat16 is allowed, more or less by the CPU.
    return each_vector(exchange, lambda v, _: [math.trunc(100 * x) / 100 for x in v])


def two_decimals_renormalised(exchange: Exchange) -> tuple[int, Any]:
    def rounded(vector: list[float], _: int) -> list[float]:
        cut = [round(x, 2) for x in vector]
        return [x / math.hypot(*cut) for x in cut]

    return each_vector(exchange, rounded)


def drops_signs(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [abs(x) for x in v])


def _cut(vector: list[float], dims: int | None) -> list[float]:
    part = vector[:dims]
    return [x / math.hypot(*part) for x in part]


def permutes_dims(exchange: Exchange) -> tuple[int, Any]:
    """One fixed order for all texts, fewer dims cut afterwards: searches find the same, an index breaks."""
    dims = exchange.body.pop("dimensions", None)

    def changed(vector: list[float], _: int) -> list[float]:
        order = random.Random(3).sample(range(len(vector)), len(vector))
        return _cut([vector[i] for i in order], dims)

    return each_vector(exchange, changed)


def flips_half_the_signs(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [-x if i % 2 else x for i, x in enumerate(v)])


def rotates(exchange: Exchange) -> tuple[int, Any]:
    """Every vector turned alike, in pairs of components; fewer dims are cut afterwards."""
    dims = exchange.body.pop("dimensions", None)
    turn = math.cos(1), math.sin(1)

    def changed(vector: list[float], _: int) -> list[float]:
        pairs = zip(vector[::2], vector[1::2], strict=True)
        return _cut([x for a, b in pairs for x in (turn[0] * a - turn[1] * b, turn[1] * a + turn[0] * b)], dims)

    return each_vector(exchange, changed)


def drops_duplicates(exchange: Exchange) -> tuple[int, Any]:
    """A text that is in a batch twice is answered once."""
    given = exchange.body.get("input")
    if isinstance(given, list):
        exchange.body["input"] = [t for i, t in enumerate(given) if t not in given[:i]]
    return exchange.forward()


def cuts_batches_wrongly(exchange: Exchange) -> tuple[int, Any]:
    """Batches of more than 32 are computed in parts, and the last part comes first."""
    status, answer = exchange.forward()
    if status == 200 and len(answer["data"]) > 32:
        vectors = [item["embedding"] for item in answer["data"]]
        for item, vector in zip(answer["data"], [*vectors[-32:], *vectors[:-32]], strict=True):
            item["embedding"] = vector
    return status, answer


def caches_by_length(exchange: Exchange) -> tuple[int, Any]:
    """A cache whose key is the text's length."""
    dims = exchange.body.pop("dimensions", None)
    texts, known = exchange.texts, exchange.memory
    return each_vector(exchange, lambda v, i: _cut(known.setdefault(len(texts[i]), v) if texts else v, dims))


def older_model_one_in_twenty(exchange: Exchange) -> tuple[int, Any]:
    """One replica of many still serves the model before: a vector of its own for each text."""
    if exchange.count % 20 != 7:
        return exchange.forward()
    dims, texts = exchange.body.pop("dimensions", None), exchange.texts

    def older(vector: list[float], i: int) -> list[float]:
        source = random.Random(texts[i] if texts else i)
        return _cut([x + 2 * source.gauss(0, 1 / math.sqrt(len(vector))) for x in vector], dims)

    return each_vector(exchange, older)


def repeats_in_large_batches(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200:
        for item in answer["data"][8:]:
            item["embedding"] = answer["data"][7]["embedding"]
    return status, answer


def spoils_long_passes(exchange: Exchange) -> tuple[int, Any]:
    """As kernels do that are wrong past some size: what a request of many tokens gets is a little off."""
    status, answer = exchange.forward()
    texts = exchange.texts
    if status != 200 or len(texts) < 2 or sum(map(len, texts)) < 7000:
        return status, answer
    for item in answer["data"]:
        source = random.Random(item["index"])
        vector = item["embedding"]
        item["embedding"] = _cut([x + 0.2 * source.gauss(0, 1 / math.sqrt(len(vector))) for x in vector], None)
    return status, answer


def half_filled_with_zeros(exchange: Exchange) -> tuple[int, Any]:
    dims = exchange.body.pop("dimensions", None)
    return each_vector(exchange, lambda v, _: _cut([*v[: len(v) // 2], *[0.0] * (len(v) // 2)], dims))


def strips_html(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: re.sub(r"<\w+>|</\w+>", "", t) or t)
    return exchange.forward()


def crashes_on_bad_input(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    return (500, {"detail": "Internal Server Error"}) if 400 <= status < 500 else (status, answer)


def accepts_anything(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    return (200, {"object": "list", "data": [], "usage": {}}) if 400 <= status < 500 else (status, answer)


def broken_base64(exchange: Exchange) -> tuple[int, Any]:
    if exchange.body.pop("encoding_format", None) != "base64":
        return exchange.forward()
    return each_vector(exchange, lambda v, _: to_base64(list(reversed(v))))


def right_base64(exchange: Exchange) -> tuple[int, Any]:
    if exchange.body.pop("encoding_format", None) != "base64":
        return exchange.forward()
    return each_vector(exchange, lambda v, _: to_base64(v))


def ignores_base64(exchange: Exchange) -> tuple[int, Any]:
    exchange.body.pop("encoding_format", None)
    return exchange.forward()


def no_usage(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200:
        answer.pop("usage", None)
    return status, answer


def dies(exchange: Exchange) -> tuple[int, Any]:
    if exchange.count > 20:
        raise ConnectionAbortedError
    return exchange.forward()


@dataclass
class _State:
    upstream: str
    fault: Fault
    hidden: bool
    count: int = 0
    busy: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = urlsplit(self.upstream)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        try:
            connection.request(method, parts.path + path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    state: _State

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client or a fault that breaks off is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: 40 ms an answer otherwise
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        state = self.server.state
        if state.hidden and not self.path.startswith("/v1/"):
            self._answer(404, b"{}")
            return
        self._answer(*state.ask("GET", self.path, None))

    def do_POST(self) -> None:
        state = self.server.state
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path != "/v1/embeddings":
            self._answer(*state.ask("POST", self.path, raw))
            return
        with state.lock:
            count, state.count = state.count, state.count + 1
            state.busy += 1
            busy = state.busy
        try:
            try:
                body = json.loads(raw)
            except ValueError:
                body = None
            if not isinstance(body, dict):
                self._answer(*state.ask("POST", self.path, raw))
                return

            def send(changed: dict[str, Any]) -> tuple[int, Any]:
                status, answer = state.ask("POST", self.path, json.dumps(changed).encode())
                return status, json.loads(answer)

            status, answer = state.fault(Exchange(body, send, count, busy, state.memory))
            self._answer(status, json.dumps(answer).encode())
        finally:
            with state.lock:
                state.busy -= 1

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def faulty(upstream: str, fault: Fault, *, hidden: bool = False) -> Iterator[str]:
    """The base URL of a proxy with that fault. `hidden` leaves out the server's own information routes."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = _State(upstream.removesuffix("/v1"), fault, hidden)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


__all__ = ["Exchange", "Fault", "faulty"]
