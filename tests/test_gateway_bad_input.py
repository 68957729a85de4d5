"""What no client of good will sends: broken HTTP, floods, slow bodies, random bytes and random JSON."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3emb_launch.gateway import http_connection, openapi
from qwen3emb_launch.gateway.http_messages import HttpLimits
from qwen3emb_launch.gateway.keys import Client, Keyring
from tests.gateway_bench import error, gateway, parse_answer, rows
from tests.null_engine import NullEngine, Served

OK_BODY = b'{"model": "null", "input": "fine"}'


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


async def talk(port: int, *pieces: bytes, pause: float = 0.0, seconds: float = 10) -> bytes:
    """Send raw bytes, then read until the server closes or says nothing more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if pause:
                    await asyncio.sleep(pause)

    sending = asyncio.create_task(send())
    try:
        out = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while chunk := await reader.read(65536):
                    out += chunk
        return out
    finally:
        sending.cancel()
        writer.close()


def post(body: bytes, *headers: str) -> bytes:
    lines = [
        "POST /v1/embeddings HTTP/1.1",
        "host: localhost",
        f"content-length: {len(body)}",
        "connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n"
BROKEN = {
    "not http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400),
    "lower-case nonsense": (b"hello there\r\n\r\n", 400),
    "http 2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "negative length": (HEAD + b"content-length: -5\r\n\r\n", 400),
    "two lengths": (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", 400),
    "length and chunked": (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "bad chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    "space in header name": (HEAD + b"bad header: x\r\n\r\n", 400),
    "header flood": (HEAD + b"".join(b"h%d: x\r\n" % i for i in range(500)) + b"\r\n", 431),
    "one huge header": (HEAD + b"h: " + b"x" * 100_000 + b"\r\n\r\n", 431),
    "huge line": (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 414),
    "huge length": (HEAD + b"content-length: 99999999999\r\n\r\n", 413),
    "huge chunked body": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n10000\r\n" + b"x" * 65536 + b"\r\n0\r\n\r\n", 413
    ),
    "unknown expectation": (HEAD + b"expect: miracles\r\ncontent-length: 2\r\n\r\n{}", 417),
    "upgrade": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n", 200
    ),
    "connect": (b"CONNECT x:1 HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: other\r\n\r\n", 400),
    "unknown coding": (HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (HEAD + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n", 400),
    "coding not last": (HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", 400),
    "length with a sign": (HEAD + b"content-length: +2\r\n\r\n{}", 400),
    "length in another script": (HEAD + b"content-length: \xb2\r\n\r\n{}", 400),
    "length of many digits": (HEAD + b"content-length: 184467440737095516170\r\n\r\n{}", 400),
    "folded header": (HEAD + b"a: b\r\n c: d\r\ncontent-length: 2\r\n\r\n{}", 400),
    "space before the colon": (HEAD + b"content-length : 2\r\n\r\n{}", 400),
    "bare line feeds": (b"POST /v1/embeddings HTTP/1.1\nhost: localhost\ncontent-length: 2\n\n{}", 400),
    "carriage return in a value": (HEAD + b"a: b\rc: d\r\n\r\n", 400),
    "nul in a value": (HEAD + b"a: b\x00c\r\ncontent-length: 2\r\n\r\n{}", 400),
    "chunk size overflow": (HEAD + b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\nx", 400),
    "nested without end": (post(b"[" * 15_000), 400),
    "absolute url": (b"GET http://x/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 404),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_answered_in_openai_form_and_the_server_stays_healthy(name: str) -> None:
    raw, status = BROKEN[name]

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, max_body=20_000) as gw:
            answer = parse_answer(await talk(gw.service.port, raw))
            assert answer.status == status
            if status != 200:  # an offer to upgrade may be declined by answering
                error(answer)
            assert (await gw.vectors("fine")).shape == (1, 64)

    run(main())


def test_keys_with_odd_characters_are_401() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            gw.service.app.keys = Keyring({"good": Client("g")})
            for value in (
                "",
                "Bearer",
                "Bearer \xff\xfe",
                "Bearer " + "x" * 5000,
                "good",
                "Bearer good\tx",
                "Basic good",
            ):
                answer = parse_answer(await talk(gw.service.port, post(OK_BODY, f"authorization: {value}")))
                assert answer.status == 401, value
                assert b"good" not in answer.body
            assert parse_answer(await talk(gw.service.port, post(OK_BODY, "authorization: Bearer good"))).status == 200

    run(main())


def test_slow_senders_are_cut_off_and_idle_ones_kept() -> None:
    async def main() -> None:
        limits = HttpLimits(head_timeout=0.5, body_timeout=0.5, idle_timeout=30)
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            gw.service.server.limits = limits
            slow_head = talk(gw.service.port, *[bytes([b]) for b in HEAD], pause=0.1)
            slow_body = talk(gw.service.port, HEAD + b"content-length: 50\r\n\r\n", *[b"x"] * 30, pause=0.1)
            idle = talk(gw.service.port, seconds=4)
            head, body, nothing = await asyncio.gather(slow_head, slow_body, idle)
            assert parse_answer(head).status == 408
            assert parse_answer(body).status == 408
            assert nothing == b""

    run(main())


def test_requests_on_one_connection_are_answered_in_order() -> None:
    """Pipelined, a slow miss before a fast hit."""

    async def main() -> None:
        engine = NullEngine(64, delay=0.1)
        async with Served(engine) as served, gateway(served) as gw:
            await gw.vectors("hit")
            texts = ["miss one", "hit", "miss two", "hit"]
            raw = b"".join(
                HEAD + b"content-length: %d\r\n%b\r\n%b" % (len(b), b"connection: close\r\n" if i == 3 else b"", b)
                for i, b in enumerate(orjson.dumps({"model": "null", "input": t}) for t in texts)
            )
            out = await talk(gw.service.port, raw)
            got = []
            while out:
                head, _, rest = out.partition(b"\r\n\r\n")
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                got.append(rows(parse_answer(head + b"\r\n\r\n" + rest[:length]))[0])
                out = rest[length:]
            assert np.array_equal(got, [engine.vector(t) for t in texts])

    run(main())


async def sent_and_never_read(gw: Any, sent: bytes) -> None:
    """A client that asks and reads no answer; returns when the gateway has let it go."""
    _, writer = await asyncio.open_connection("127.0.0.1", gw.service.port, limit=1)
    writer.transport.pause_reading()
    writer.write(sent)
    async with asyncio.timeout(20):
        while not gw.service.server.connections:
            await asyncio.sleep(0.01)
        while gw.service.server.connections:
            await asyncio.sleep(0.05)
    writer.close()


def test_a_client_that_does_not_read_is_let_go_and_holds_no_memory() -> None:
    async def main() -> None:
        limits = HttpLimits(write_timeout=0.5, pipelined=8)
        async with Served(NullEngine(2560)) as served, gateway(served) as gw:
            gw.service.server.limits = limits
            body = orjson.dumps({"model": "null", "input": [f"t{i}" for i in range(300)]})
            await sent_and_never_read(gw, (HEAD + b"content-length: %d\r\n\r\n" % len(body) + body) * 5)

    run(main())


@pytest.mark.parametrize("cut", [0, 40, 200])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_http_2_is_declined_and_its_request_answered(cut: int, chunked: bool) -> None:
    """What Java's HTTP client sends first on a connection; many of them, in one piece or two, are as many answers."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            offer = HEAD + b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAA\r\nupgrade: h2c\r\n"
            if chunked:
                one = offer + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(OK_BODY), OK_BODY)
            else:
                one = offer + b"content-length: %d\r\n\r\n%b" % (len(OK_BODY), OK_BODY)
            raw = one * 100 + post(OK_BODY)
            out = await talk(gw.service.port, *filter(None, (raw[:cut], raw[cut:])), pause=0.05)
            assert out.count(b"HTTP/1.1 200 OK") == 101
            assert b"Upgrade" not in out
            refused = await talk(gw.service.port, one.replace(b"localhost", b"page.example"))
            assert parse_answer(refused).status == 421

    run(main())


def test_a_body_that_is_on_its_way_is_taken_and_answered_before_the_end() -> None:
    """SIGTERM while a client uploads: its request counts as in work."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            server = gw.service.server
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.service.port)
            writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(OK_BODY) + OK_BODY[:5])
            async with asyncio.timeout(5):
                while not server.held:
                    await asyncio.sleep(0.01)
            closing = asyncio.create_task(server.close(grace=5.0))
            async with asyncio.timeout(5):
                while not server.closing:
                    await asyncio.sleep(0.01)
            writer.write(OK_BODY[5:])
            answer = parse_answer(await asyncio.wait_for(reader.read(), 10))
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            await closing
            writer.close()

    run(main())


def test_expect_100_continue_is_answered() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.service.port)
            writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(OK_BODY))
            assert (await reader.readline()).startswith(b"HTTP/1.1 100")
            await reader.readline()
            writer.write(OK_BODY)
            assert b" 200 " in await reader.readline()
            writer.close()
            old = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"expect: 100-continue\r\n"  # it knows no such answer
            out = await talk(gw.service.port, old + b"content-length: %d\r\n\r\n" % len(OK_BODY) + OK_BODY)
            assert out.startswith(b"HTTP/1.1 200")

    run(main())


def test_at_the_connection_limit_an_idle_one_makes_room_and_none_at_work_does() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, connections=3) as gw:
            links = [await asyncio.open_connection("127.0.0.1", gw.service.port) for _ in range(3)]
            async with asyncio.timeout(5):
                while len(gw.service.server.connections) < 3:
                    await asyncio.sleep(0.01)
            assert parse_answer(await talk(gw.service.port, post(OK_BODY))).status == 200
            assert await links[0][0].read() == b""  # the one that idled longest
            for _, writer in links[1:]:
                writer.write(HEAD)
            third = await asyncio.open_connection("127.0.0.1", gw.service.port)
            third[1].write(HEAD)
            async with asyncio.timeout(5):
                while sum(not c.idle for c in gw.service.server.connections) < 3:
                    await asyncio.sleep(0.01)
            answer = parse_answer(await talk(gw.service.port, post(OK_BODY)))
            assert answer.status == 503
            assert error(answer)["code"] == "too_many_connections"
            for _, writer in (*links, third):
                writer.close()

    run(main())


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"content-length: 50\r\n\r\nx"], ids=["head", "body"])
def test_at_the_connection_limit_one_that_dawdles_makes_room(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes all connections and sends next to nothing keeps nobody out."""
    monkeypatch.setattr(http_connection, "DAWDLING_HEAD", 0.05)
    monkeypatch.setattr(http_connection, "DAWDLING_BODY", 0.05)

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, connections=3) as gw:
            server, links = gw.service.server, []
            for _ in range(3):
                links.append(await asyncio.open_connection("127.0.0.1", gw.service.port))
                links[-1][1].write(sent)
            async with asyncio.timeout(5):
                while sum(c.dawdles for c in server.connections) < 3:
                    await asyncio.sleep(0.01)
            for _ in range(3):
                assert parse_answer(await talk(gw.service.port, post(OK_BODY))).status == 200
            for _, writer in links:
                writer.close()

    run(main())


def test_at_the_connection_limit_a_slow_reader_keeps_its_answer() -> None:
    async def main() -> None:
        async with Served(NullEngine(2560)) as served, gateway(served, connections=1) as gw:
            body = orjson.dumps({"model": "null", "input": [f"t{i}" for i in range(400)]})
            reader, writer = await asyncio.open_connection("127.0.0.1", gw.service.port, limit=1 << 10)
            writer.write(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            async with asyncio.timeout(10):
                while not any(c.unsent for c in gw.service.server.connections):
                    await asyncio.sleep(0.01)
            assert parse_answer(await talk(gw.service.port, post(OK_BODY))).status == 503
            assert len(rows(parse_answer(await reader.read()))) == 400
            writer.close()

    run(main())


def test_a_stranger_is_refused_before_the_body_is_read() -> None:
    """Nobody without a key makes the gateway hold megabytes, nor does anybody for a route that wants no body."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            gw.service.app.keys = Keyring({"good": Client("g")})
            announced = HEAD + b"content-length: 30000000\r\n"
            answer = parse_answer(await talk(gw.service.port, announced + b"authorization: Bearer bad\r\n\r\n"))
            assert answer.status == 401
            elsewhere = announced.replace(b"/v1/embeddings", b"/nowhere")
            assert parse_answer(await talk(gw.service.port, elsewhere + b"\r\n")).status == 413
            assert sum(gw.service.metrics.requests.values()) == 1
            assert gw.service.server.held == 0

    run(main())


def test_bodies_in_memory_are_bounded_over_all_connections() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            server = gw.service.server
            server.limits = replace(server.limits, memory=150_000)
            unfinished = HEAD + b"content-length: 100001\r\n\r\n" + b"x" * 100_000
            _, writer = await asyncio.open_connection("127.0.0.1", gw.service.port)
            writer.write(unfinished)
            async with asyncio.timeout(5):
                while server.held < 100_000:
                    await asyncio.sleep(0.01)
            answer = parse_answer(await talk(gw.service.port, unfinished))
            assert (answer.status, error(answer)["code"]) == (503, "overloaded")
            writer.close()
            async with asyncio.timeout(5):
                while server.held:
                    await asyncio.sleep(0.01)
            assert (await gw.vectors("fine")).shape == (1, 64)
            assert server.held == 0

    run(main())


def test_answers_that_are_not_fetched_are_bounded_over_all_connections() -> None:
    async def main() -> None:
        async with Served(NullEngine(2560)) as served, gateway(served) as gw:
            server = gw.service.server
            server.limits = replace(server.limits, memory=1_000_000)
            body = orjson.dumps({"model": "null", "input": [f"t{i}" for i in range(400)]})
            await sent_and_never_read(gw, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)

    run(main())


@pytest.mark.parametrize(
    "begins",
    [
        HEAD + b"endless: ",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nendless: ",
        HEAD + b"transfer-encoding: chunked\r\n\r\n1;endless=",
        b"\r\n",
    ],
    ids=["header", "trailer", "chunk extension", "empty lines"],
)
def test_what_has_no_end_and_is_no_body_is_cut_off(begins: bytes) -> None:
    """The parser keeps a header's or trailer's value until it ends, and says nothing meanwhile."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            piece = b"\r\n" * 30_000 if begins == b"\r\n" else b"x" * 60_000
            out = await talk(gw.service.port, begins, *[piece] * 50)
            assert parse_answer(out).status == 431

    run(main())


def test_a_body_in_tiny_chunks_takes_no_more_memory_than_its_bytes() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            server = gw.service.server
            _, writer = await asyncio.open_connection("127.0.0.1", gw.service.port)
            tracemalloc.start()
            try:
                writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"2\r\nxy\r\n" * 200_000)
                async with asyncio.timeout(30):
                    while server.held < 400_000:
                        await asyncio.sleep(0.01)
                assert tracemalloc.get_traced_memory()[0] < 4_000_000  # what was written included
            finally:
                tracemalloc.stop()
                writer.close()

    run(main())


def test_what_follows_a_chunked_body_changes_nothing_of_the_head() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            chunk = b"%x\r\n%b\r\n0\r\n" % (len(OK_BODY), OK_BODY)
            head = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
            answer = parse_answer(await talk(gw.service.port, head + chunk + b"x-embedding-task: nonsense\r\n\r\n"))
            assert answer.status == 200

    run(main())


WEB = "https://page.example"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/embeddings", {"host": "page.example"}, 421),  # its name was made to resolve to 127.0.0.1
        ("GET", "/ui/state", {"host": "page.example:8000"}, 421),
        ("GET", "/metrics", {"host": "127.0.0.1.page.example"}, 421),
        ("POST", "/v1/embeddings", {"host": "localhost:8000", "origin": WEB}, 403),
        ("POST", "/v1/embeddings", {"host": "localhost:8000", "origin": "null"}, 403),
        ("POST", "/v1/embeddings", {"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ("POST", "/v1/embeddings", {"host": "[::1]:8000"}, 200),
        ("POST", "/v1/embeddings", {"host": "named.internal"}, 200),
        ("GET", "/health", {"host": "localhost", "origin": WEB}, 200),
    ],
)
def test_a_strangers_web_page_cannot_use_a_gateway_without_keys(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """With keys any name and page will do: no page knows a key."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, allow_hosts=("Named.internal",)) as gw:
            lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "connection: close"]
            raw = "\r\n".join([*lines, f"content-length: {len(OK_BODY)}", "", ""]).encode() + OK_BODY
            answer = parse_answer(await talk(gw.service.port, raw))
            assert answer.status == status
            gw.service.app.keys = Keyring({"good": Client("g", admin=True)})
            keyed = raw.replace(b"connection: close", b"connection: close\r\nauthorization: Bearer good")
            assert parse_answer(await talk(gw.service.port, keyed)).status == 200

    run(main())


def test_browsers_get_cors_headers_only_when_asked_for() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served:
            async with gateway(served) as gw:
                plain = await gw.post({"model": "null", "input": "x"}, origin="https://a.example")
                assert not [h for h in plain.headers if h.startswith("access-control")]
                assert (await gw.request("OPTIONS", "/v1/embeddings", origin="https://a.example")).status == 405
            async with gateway(served, cors_origins=("https://a.example",)) as gw:
                ours = await gw.post({"model": "null", "input": "x"}, origin="https://a.example")
                other = await gw.post({"model": "null", "input": "x"}, origin="https://b.example")
                assert ours.headers["access-control-allow-origin"] == "https://a.example"
                assert ours.headers["access-control-expose-headers"] == "*"  # Retry-After, what was cut
                assert "access-control-allow-origin" not in other.headers
                for keys in ({}, {"good": Client("g")}):
                    gw.service.app.keys = Keyring(keys)
                    asked = "authorization,content-type,x-stainless-os"  # as OpenAI's client for browsers does
                    preflight = await gw.request(
                        "OPTIONS", "/v1/embeddings", origin="https://a.example", access_control_request_headers=asked
                    )
                    assert preflight.status == 204
                    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
                    assert preflight.headers["access-control-allow-headers"] == asked
                stranger = await gw.post({"model": "null", "input": "x"}, origin="https://a.example")
                assert stranger.status == 401  # which the page can read
                assert stranger.headers["access-control-allow-origin"] == "https://a.example"

    run(main())


# -- fuzzing: one gateway for all examples


@dataclass
class Running:
    port: int
    loop: asyncio.AbstractEventLoop

    def send(self, raw: bytes) -> bytes:
        return asyncio.run_coroutine_threadsafe(talk(self.port, raw, seconds=3), self.loop).result(20)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []
    stop = asyncio.Event()

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            gw.service.server.limits = replace(gw.service.server.limits, head_timeout=1.0, body_timeout=1.0)
            found.append(gw.service.port)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield Running(found[0], loop)
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)


SCHEMAS = openapi.document()["components"]["schemas"]
LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=30)
JSON = st.recursive(
    LEAVES, lambda c: st.lists(c, max_size=5) | st.dictionaries(st.text(max_size=8), c, max_size=4), max_leaves=20
)
NEARLY = st.fixed_dictionaries(
    {
        "model": st.just("null") | JSON,
        "input": JSON | st.text(max_size=200) | st.lists(st.text(max_size=20), max_size=8),
    },
    optional={"dimensions": JSON | st.integers(-5, 300), "encoding_format": JSON | st.sampled_from(["float", "base64"]),
              "user": JSON, "extra": JSON},
)  # fmt: skip
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_form(raw: bytes) -> int:
    """Whatever it is: the answer is good by the OpenAPI document, or an error in its form; never a 5xx."""
    answer = parse_answer(raw)
    body = orjson.loads(answer.body)
    jsonschema.validate(body, {"$ref": "#/components/schemas/" + ("Answer" if answer.status == 200 else "Error"),
                               "components": {"schemas": SCHEMAS}})  # fmt: skip
    assert answer.status < 500, body
    return answer.status


@FUZZ
@given(body=NEARLY | JSON)
def test_any_json_is_answered_by_the_documented_form(running: Running, body: object) -> None:
    import json

    raw = json.dumps(body).encode()  # keeps NaN, lone surrogates as escapes, huge integers
    status = check_form(running.send(post(raw)))
    try:
        jsonschema.validate(orjson.loads(raw), {**SCHEMAS["Request"]})
    except (jsonschema.ValidationError, orjson.JSONDecodeError):
        assert status in (400, 404)


@FUZZ
@given(body=st.binary(max_size=300))
def test_any_bytes_as_a_body_are_4xx(running: Running, body: bytes) -> None:
    assert 400 <= check_form(running.send(post(body))) < 500


@settings(FUZZ, max_examples=60)
@given(raw=st.binary(min_size=1, max_size=200))
def test_any_bytes_as_a_request_leave_the_server_healthy(running: Running, raw: bytes) -> None:
    out = running.send(raw + b"\r\n\r\n")
    if out:
        assert 400 <= parse_answer(out).status < 500
    assert check_form(running.send(post(OK_BODY))) == 200


@FUZZ
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="#"), max_size=40))
def test_no_path_leads_elsewhere(running: Running, path: str) -> None:
    out = running.send(f"GET /{path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    known = ("health", "ready", "metrics", "ui", "openapi.json", "v1/models")
    if path.partition("?")[0] not in known:
        assert 400 <= parse_answer(out).status < 500
