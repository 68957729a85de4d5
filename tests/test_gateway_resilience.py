"""Engines that die, hang, refuse, come back as somebody else; clients that leave; too much at once."""

from __future__ import annotations

import asyncio
import base64
import threading
from time import monotonic

import numpy as np
import orjson
import pytest

from qwen3emb_launch.gateway import batcher
from qwen3emb_launch.gateway.config import UpstreamConfig
from qwen3emb_launch.gateway.disk_cache import DiskCache
from qwen3emb_launch.gateway.embeddings import Served as Counts
from qwen3emb_launch.gateway.http_client import Answer
from qwen3emb_launch.gateway.http_messages import Request, Response
from qwen3emb_launch.gateway.keys import Allowance, Client
from qwen3emb_launch.gateway.killers import MOST, REMEMBERED, Killers
from qwen3emb_launch.gateway.tokens import Prepared
from qwen3emb_launch.gateway.work import Level, Wait
from tests.fake_engine import moved
from tests.gateway_bench import Bench, error, gateway, rows
from tests.null_engine import Link, NullEngine, Served


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test, 90))


async def until(condition, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def checked(gw: Bench, engine: NullEngine, text: str, **headers: str) -> None:
    """One request; its vector must be this text's."""
    answer = await gw.post({"model": "null", "input": text}, **headers)
    assert answer.status == 200, answer.body
    assert np.array_equal(rows(answer)[0], engine.vector(text)), text


def test_requests_wait_for_a_dead_engine_and_are_answered_when_it_is_back() -> None:
    async def main() -> None:
        engine = NullEngine(64, delay=0.05)
        async with Served(engine) as served, gateway(served) as gw:
            asked = [asyncio.create_task(checked(gw, engine, f"text {i}")) for i in range(40)]
            await until(lambda: engine.calls > 1)
            await served.stop()  # with calls in the air
            await until(lambda: not gw.service.pool.up)
            asked += [asyncio.create_task(checked(gw, engine, f"late {i}")) for i in range(20)]
            assert (await gw.request("GET", "/ready")).status == 503
            assert (await gw.request("GET", "/health")).status == 200
            await served.start()
            await asyncio.gather(*asked)
            assert gw.service.metrics.retries > 0

    run(main())


def test_an_engine_dying_again_and_again_under_load_loses_nothing() -> None:
    async def main() -> None:
        engine = NullEngine(64, delay=0.005)
        async with Served(engine) as served, gateway(served) as gw:

            async def client(number: int) -> None:
                for i in range(30):
                    await checked(gw, engine, f"{number}-{i}")

            clients = [asyncio.create_task(client(n)) for n in range(16)]
            for _ in range(4):
                seen = engine.calls
                await until(lambda seen=seen: engine.calls > seen + 3)
                await served.stop()
                await served.start()
            await asyncio.gather(*clients)

    run(main())


def test_rolling_restart_of_two_replicas_loses_nothing() -> None:
    """Each is drained through the admin interface, stopped only when idle, started again and brought back."""

    async def main() -> None:
        engines = [NullEngine(64, delay=0.01), NullEngine(64, delay=0.01)]
        async with Served(engines[0]) as one, Served(engines[1]) as two, gateway(one, two) as gw:
            going = True

            async def client(number: int) -> int:
                i = 0
                while going:
                    await checked(gw, engines[0], f"{number}-{i}")
                    i += 1
                return i

            clients = [asyncio.create_task(client(n)) for n in range(8)]
            for served in (one, two):
                seen = served.engine.calls
                await until(lambda s=served, seen=seen: s.engine.calls > seen + 5)
                assert await gw.service.pool.drain(served.url, 10)
                idle = served.engine.calls
                await served.stop()
                await served.start()
                assert served.engine.calls == idle
                gw.service.pool.add(gw.service.pool.upstreams[served.url].address)
                await until(lambda: len(gw.service.pool.up) == 2)
            going = False
            assert min(await asyncio.gather(*clients)) > 10

    run(main())


def test_a_change_of_model_under_load_loses_nothing_and_mixes_nothing() -> None:
    """Until the change every vector is the old model's, after it every one is the new one's, cached texts too."""

    async def main() -> None:
        old, new = NullEngine(64, delay=0.01), NullEngine(64, seed=2, delay=0.01)
        async with Served(old) as one, Served(new) as two, gateway(one) as gw:
            going = True
            seen: list[str] = []

            async def client(number: int) -> None:
                i = 0
                while going:
                    text = f"{number}-{i % 10}"
                    row = rows(await gw.post({"model": "null", "input": text}))[0]
                    which = [n for n, e in (("old", old), ("new", new)) if np.array_equal(row, e.vector(text))]
                    seen.extend(which or ["neither"])
                    i += 1

            clients = [asyncio.create_task(client(n)) for n in range(8)]
            await until(lambda: len(seen) > 100)
            await gw.service.new_model("new", [UpstreamConfig(two.url)])
            changed = len(seen)
            await until(lambda: len(seen) > changed + 100)
            going = False
            await asyncio.gather(*clients)
            assert set(seen[: changed - 8]) == {"old"}
            assert set(seen[changed + 8 :]) == {"new"}
            assert list(gw.service.pool.upstreams) == [two.url]

    run(main())


def test_opening_the_disk_cache_holds_nobody_up_and_a_change_of_model_meanwhile_counts(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may take a while: /health answers, embeddings wait; what it was opened for may have gone."""

    async def main() -> None:
        old, new = NullEngine(64), NullEngine(64, seed=2)
        opening, go_on, opened = threading.Event(), threading.Event(), []
        prepare = DiskCache._prepared

        def slowly(disk: DiskCache) -> object:
            opening.set()
            assert go_on.wait(30)
            opened.append(disk._fingerprint)
            return prepare(disk)

        monkeypatch.setattr(DiskCache, "_prepared", slowly)
        settings = {"wait": False, "disk_cache": str(tmp_path / "c.db"), "fingerprint": "old"}
        async with Served(old) as one, Served(new) as two, gateway(one, **settings) as gw:
            await until(opening.is_set)
            assert (await gw.request("GET", "/health")).status == 200
            asked = asyncio.create_task(gw.post({"model": "null", "input": "x"}))
            await gw.service.new_model("new", [UpstreamConfig(two.url)])
            await until(lambda: gw.service.pool.up)
            go_on.set()
            assert np.array_equal(rows(await asked)[0], new.vector("x"))
            assert opened == ["old", "new"]
            monkeypatch.setattr(DiskCache, "_prepared", lambda _: 1 // 0)
            await gw.service.new_model("newer")
            await until(lambda: gw.service.endpoint.model is not None)
            await checked(gw, new, "without a second level")

    run(main())


def test_when_no_engine_comes_back_the_hold_ends_with_503_and_retry_after() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=0.3) as gw:
            await served.stop()
            answer = await gw.post({"model": "null", "input": "x"})
            assert answer.status == 503
            assert error(answer)["code"] == "no_engine"
            assert served.url not in answer.body.decode()
            assert int(answer.headers["retry-after"]) >= 1
            assert gw.service.endpoint.model.batcher.queued == 0

    run(main())


def test_a_gateway_started_before_its_engine_holds_the_first_requests() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        served = await Served(engine).start()
        await served.stop()
        async with gateway(served, wait=False) as gw:
            asked = asyncio.create_task(gw.post({"model": "null", "input": "early"}))
            await until(lambda: gw.service.server.connections)
            await served.start()
            assert np.array_equal(rows(await asked)[0], engine.vector("early"))
            await served.stop()

    run(main())


def test_a_silent_replica_is_left_and_its_calls_tried_elsewhere() -> None:
    async def main() -> None:
        engines = [NullEngine(64), NullEngine(64)]
        async with Served(engines[0]) as one, Served(engines[1]) as two, gateway(one, two, stall=0.3) as gw:
            engines[0].hang = True
            await asyncio.gather(*(checked(gw, engines[1], f"t{i}") for i in range(30)))
            assert [u.state for u in gw.service.pool.upstreams.values()] == ["down", "up"]
            engines[0].hang = False

    run(main())


def test_a_request_ends_at_its_deadline() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, timeout=0.3) as gw:
            engine.hang = True
            answer = await gw.post({"model": "null", "input": "x"})
            assert (answer.status, error(answer)["code"]) == (504, "timeout")

    run(main())


def test_another_model_on_a_restarted_port_is_refused_and_its_vectors_never_served() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=0.2) as gw:
            await checked(gw, engine, "kept")
            await served.stop()
            await until(lambda: not gw.service.pool.up or engine.links == set())
            served.engine = NullEngine(64, seed=2)
            await served.start()
            assert (await gw.post({"model": "null", "input": "new"})).status == 503  # seen to be another one or not yet
            upstream = next(iter(gw.service.pool.upstreams.values()))
            await until(lambda: upstream.state == "refused")
            answer = await gw.post({"model": "null", "input": "new"})
            assert answer.status == 503
            assert "refused: its vectors are another model's: cosine" in error(answer)["message"]
            await checked(gw, engine, "kept")  # from the cache
            await gw.service.new_model("another fingerprint")
            await until(lambda: gw.service.endpoint.model is not None)
            await checked(gw, served.engine, "kept")

    run(main())


@pytest.mark.parametrize(
    ("quantization", "apart", "state"), [("fp8", 0.05, "up"), ("fp8", 0.2, "refused"), (None, 0.05, "refused")]
)
def test_a_probe_in_a_batch_of_float8_is_no_other_model_s(quantization: str | None, apart: float, state: str) -> None:
    """An engine that is proved again beside traffic rounds its probe otherwise, where it computes in float8."""

    async def main() -> None:
        engine = NullEngine(64)
        engine.info = {"dtype": "bfloat16", "quantization": quantization}
        async with Served(engine) as served, gateway(served) as gw:
            await checked(gw, engine, "before")
            pool = gw.service.pool
            reference = pool.reference
            assert reference is not None
            pool.reference = np.array(moved(reference.tolist(), apart), np.float32)
            await served.stop()
            upstream = next(iter(pool.upstreams.values()))
            await until(lambda: upstream.state != "up")
            await served.start()
            await until(lambda: upstream.state in ("up", "refused"))
            assert upstream.state == state

    run(main())


NONSENSE = (
    b"", b"{}", b"[]", b'{"data": []}', b'{"data": [{"embedding": []}]}', b'{"data": [{"embedding": [NaN]}]}',
    b'{"data": [{"embedding": "####"}]}', b'{"data": [{"index": -1, "embedding": [1.0]}]}',
)  # fmt: skip


@pytest.mark.parametrize("raw", NONSENSE)
def test_nonsense_from_an_engine_is_tried_again_and_never_passed_on(raw: bytes) -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=5.0) as gw:
            engine.raw = raw
            asked = asyncio.create_task(gw.post({"model": "null", "input": "x"}))
            await until(lambda: engine.calls >= 3)
            engine.raw = None
            answer = await asked
            assert answer.status == 200
            assert np.array_equal(rows(answer)[0], engine.vector("x"))

    run(main())


def test_vectors_of_nan_zero_or_wrong_width_are_never_served_nor_cached() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, timeout=5.0) as gw:
            for values in ([float("nan")] * 64, [0.0] * 64, [1.0] * 63, [float("inf")] + [0.0] * 63):
                encoded = base64.b64encode(np.array(values, "<f4").tobytes()).decode()
                engine.raw = orjson.dumps({"data": [{"index": 0, "embedding": encoded}]})
                asked = asyncio.create_task(gw.post({"model": "null", "input": str(values)[:30]}))
                seen = engine.calls
                await until(lambda seen=seen: engine.calls >= seen + 2)
                engine.raw = None
                answer = await asked
                assert np.array_equal(rows(answer)[0], engine.vector(str(values)[:30]))

    run(main())


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n"])
def test_an_answer_without_end_is_none_and_no_death(begins: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off at what so many vectors may take; an engine that says what is no HTTP lives too. It is tried again,
    and the text is not blamed."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            answered, faults = Link.write, 2

            def write(link: Link, status: int, body: bytes) -> None:
                nonlocal faults
                if faults and link.url == b"/v1/embeddings":
                    faults -= 1
                    link.transport.write(begins + b"x" * (2 << 20))
                else:
                    answered(link, status, body)

            monkeypatch.setattr(Link, "write", write)
            await checked(gw, engine, "a")
            assert not faults
            killers = gw.service.endpoint.model.batcher._killers
            assert not killers._suspects._kept

    run(main())


def test_what_an_engine_says_unasked_is_nobodys_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of an answer too many comes at once, the second when the next text was sent."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            answered = Link.write
            _, other = await engine.embed(b'{"input": ["another text"], "encoding_format": "base64"}')
            extra = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(other), other)
            half: dict[Link, bytes] = {}

            def write(link: Link, status: int, body: bytes) -> None:
                link.transport.write(half.pop(link, b""))
                answered(link, status, body)
                link.transport.write(extra[:-10])
                half[link] = extra[-10:]

            monkeypatch.setattr(Link, "write", write)
            for i in range(5):
                await checked(gw, engine, f"t{i}")
                await asyncio.sleep(0.01)  # for what is said unasked

    run(main())


def test_an_engine_that_always_fails_ends_in_502_not_in_an_endless_loop() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=2.0, timeout=10.0) as gw:
            engine.status = (500, b'{"message": "boom at /opt/secret/place.py"}')
            answer = await gw.post({"model": "null", "input": "x"})
            assert answer.status in (502, 503)
            assert b"secret" not in answer.body

    run(main())


def test_a_defect_of_the_gateways_own_is_an_answer_not_a_wait_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while an answer is read, its texts are tried again and then failed."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            model = gw.service.endpoint.model
            assert model is not None
            with monkeypatch.context() as patch:
                patch.setattr(batcher, "token_flags", lambda *_: 1 // 0)
                answer = await gw.post({"model": "null", "input": "x"})
                assert (answer.status, error(answer)["code"]) == (502, "engine_failed")
            await checked(gw, engine, "x")
            assert model.batcher.in_air == model.batcher.queued == 0

    run(main())


def test_an_overloaded_engine_is_asked_again_later() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            engine.status = (503, b"{}")
            asked = asyncio.create_task(checked(gw, engine, "x"))
            await until(lambda: engine.calls >= 4)
            engine.status = None
            await asked

    run(main())


def test_an_engine_that_closes_after_each_answer_is_served_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HTTP allows, and some proxies do; interim answers before it are passed over."""

    def write(link: Link, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        link.transport.write(head % (status, len(body)) + body)
        link.transport.close()

    monkeypatch.setattr(Link, "write", write)

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            await asyncio.gather(*(checked(gw, engine, f"t{i}") for i in range(20)))
            assert gw.service.metrics.retries == 0

    run(main())


def test_an_engine_behind_something_that_closes_silent_connections_stays_up_under_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy's time limit ends the connection that watches the engine's process; others show that it lives. Without
    others, and when it really went, it is proved again."""
    made, ended = Link.connection_made, []

    def limited(link: Link, transport: asyncio.Transport) -> None:
        made(link, transport)

        def end() -> None:
            if not link.url:
                ended.append(link)
                transport.close()

        asyncio.get_running_loop().call_later(0.03, end)

    monkeypatch.setattr(Link, "connection_made", limited)
    caplog.set_level("INFO")

    def falls() -> int:
        return sum("up -> down" in record.getMessage() for record in caplog.records)

    async def main() -> None:
        engine = NullEngine(64, delay=0.01)
        async with Served(engine) as served, gateway(served, cache_bytes=0) as gw:
            number = 0
            while len(ended) < 5:
                await checked(gw, engine, f"t{number}")
                number += 1
            assert falls() == 0
            assert gw.service.metrics.retries == 0
            await served.stop()
            await until(lambda: falls() == 1)
            await served.start()
            await checked(gw, engine, "back")

    run(main())


def test_equal_texts_in_the_air_are_one() -> None:
    async def main() -> None:
        engine = NullEngine(64, delay=0.1)
        async with Served(engine) as served, gateway(served) as gw:
            await asyncio.gather(*(checked(gw, engine, "the same") for _ in range(50)))
            assert engine.items == 2  # the probe, and one
            assert gw.service.metrics.coalesced == 49

    run(main())


def test_texts_that_arrive_during_a_call_leave_together() -> None:
    async def main() -> None:
        engine = NullEngine(64, delay=0.05, serial=True)
        async with Served(engine) as served, gateway(served) as gw:
            await asyncio.gather(*(checked(gw, engine, f"t{i}") for i in range(64)))
            assert engine.calls < 12
            assert max(engine.sizes) >= 16

    run(main())


def test_clients_that_ask_again_and_again_travel_in_calls_of_equal_size() -> None:
    """64 clients, 4 slots: once they are in step, calls hold close to a quarter of them, none a few stragglers."""

    async def main() -> None:
        engine = NullEngine(64, delay=0.02, serial=True)
        async with Served(engine) as served, gateway(served, cache_bytes=0) as gw:

            async def client(number: int) -> None:
                for turn in range(12):
                    await checked(gw, engine, f"text {number} {turn}")

            await asyncio.gather(*map(client, range(64)))
            settled = engine.sizes[12:-8]
            assert sum(settled) / len(settled) >= 12, engine.sizes
            assert max(settled) <= 24, engine.sizes

    run(main())


def test_a_level_is_a_peak_that_fades() -> None:
    level = Level()
    assert level.see(64, 100.0) == 64
    assert level.see(40, 100.001) == 64  # 24 were just answered and are about to ask again
    assert 45 < level.see(40, 100.05) < 52
    assert level.see(40, 101.0) == 40
    assert level.see(80, 101.0) == 80


def test_big_batches_are_split_within_the_bounds_and_joined_in_order() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, batch_items=50) as gw:
            texts = [f"t{i}" for i in range(777)]
            assert np.array_equal(await gw.vectors(texts), [engine.vector(t) for t in texts])
            assert max(engine.sizes) <= 50

    run(main())


def test_a_long_document_does_not_hold_short_queries_back() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, calls=1) as gw:
            document = "SLOW " + "word " * 3000
            slow = asyncio.create_task(checked(gw, engine, document))
            await until(lambda: engine.calls == 2)
            await asyncio.gather(*(checked(gw, engine, f"q{i}") for i in range(20)))
            assert not slow.done()
            await slow
            assert all(len(b["input"]) == 1 for b in engine.bodies if b["input"][0] == document)

    run(main())


def test_a_client_that_left_costs_no_engine_call() -> None:
    """Its queued texts are dropped, its call in the air is cut when nobody else wants it."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, calls=1) as gw:
            engine.hang = True
            gone = asyncio.create_task(gw.post({"model": "null", "input": "held"}))
            await until(lambda: engine.calls == 2)
            queued = asyncio.create_task(gw.post({"model": "null", "input": [f"q{i}" for i in range(100)]}))
            room = gw.service.endpoint.model.batcher
            await until(lambda: room.queued + room.in_air >= 101)
            gone.cancel()
            queued.cancel()
            await until(lambda: engine.aborted >= 1)
            engine.hang = False
            await until(lambda: room.queued == 0 and room.in_air == 0)
            seen = engine.items
            await checked(gw, engine, "next")
            assert engine.items == seen + 1

    run(main())


def test_a_client_that_leaves_before_its_call_began_leaves_nothing_behind() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            model = gw.service.endpoint.model
            assert model is not None
            wait = Wait("somebody", 1, monotonic() + 60, asyncio.get_running_loop())
            model.batcher.enter(wait)
            model.batcher.submit(wait, 0, model.keyer.text("x"), Prepared("x", 1, exact=False))
            await asyncio.sleep(0)
            assert model.batcher.in_air == 1
            model.batcher.leave(wait)  # before the call's first step
            await until(lambda: model.batcher.in_air == 0)
            assert model.batcher.queued == 0
            assert [u.slots.total for u in gw.service.pool.up] == [0]
            await checked(gw, engine, "x")

    run(main())


def test_a_change_of_model_waits_for_texts_that_are_being_counted(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their request has not asked an engine yet, and is answered by the old one all the same."""

    async def main() -> None:
        old, new = NullEngine(64), NullEngine(64, seed=2)
        async with Served(old) as one, Served(new) as two, gateway(one) as gw:
            rules, counting, go_on = gw.service.endpoint.rules, threading.Event(), threading.Event()
            count = rules.texts_now

            def slowly(texts: list[str]) -> list:
                counting.set()
                assert go_on.wait(30)
                return count(texts)

            monkeypatch.setattr(rules, "quick", lambda _: False)
            monkeypatch.setattr(rules, "texts_now", slowly)
            asked = asyncio.create_task(checked(gw, old, "long"))
            await until(counting.is_set)
            change = asyncio.create_task(gw.service.new_model("new", [UpstreamConfig(two.url)]))
            await until(lambda: gw.service.endpoint.model is None)
            go_on.set()
            await asked
            await change
            await checked(gw, new, "long")

    run(main())


def test_a_request_that_a_change_of_model_overtakes_is_counted_once() -> None:
    """It begins anew with the new model: neither its rates nor the cache's counts see that."""

    async def main() -> None:
        old, new = NullEngine(64), NullEngine(64, seed=2)
        async with Served(old) as one, Served(new) as two, gateway(one) as gw:
            await checked(gw, old, "cached")
            metrics = gw.service.metrics
            before = metrics.hits["memory"], metrics.misses
            request = Request("POST", "/v1/embeddings", "", {}, "127.0.0.1")
            request.body = b'{"model": "null", "input": ["cached", "not cached"]}'
            client = Client("c", requests=Allowance(1), tokens=Allowance(60))
            answer = gw.service.endpoint.handle(request, client, Counts())
            assert not isinstance(answer, Response)
            await gw.service.new_model("new", [UpstreamConfig(two.url)])  # before the answer's first step
            told = await answer
            assert told.status == 200
            vectors = rows(Answer(200, {}, b"".join(told.body)))
            assert np.array_equal(vectors, [new.vector("cached"), new.vector("not cached")])
            assert (metrics.hits["memory"], metrics.misses) == (before[0] + 1, before[1] + 1)

    run(main())


class Deadly:
    """An engine that a text with P0ISON ends, and that is away for a moment then, as processes are."""

    def __init__(self, served: Served, away: float = 0.15) -> None:
        self.served, self.away, self.real = served, away, served.engine.embed
        self.deaths: list[asyncio.Task] = []
        served.engine.embed = self.embed  # type: ignore[method-assign]

    async def embed(self, body: bytes) -> tuple[int, bytes]:
        if b"P0ISON" not in body:
            return await self.real(body)
        self.deaths.append(asyncio.create_task(self.restart()))
        await asyncio.Event().wait()
        raise AssertionError

    async def restart(self) -> None:
        await self.served.stop()
        await asyncio.sleep(self.away)
        await self.served.start()


@pytest.mark.parametrize("company", [7, 127, 600])
def test_a_text_that_ends_engines_fails_alone_after_three_deaths(company: int) -> None:
    """Whatever travelled with it, in its call or beside it, is answered; no client is told to ask for it again, and who
    does is refused without another death."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=20.0) as gw:
            deadly = Deadly(served)
            texts = [f"good {i}" for i in range(company)]
            asked = [asyncio.create_task(checked(gw, engine, text)) for text in texts[:40]]
            many = asyncio.create_task(gw.vectors(texts))
            poison = await gw.post({"model": "null", "input": ["fine", "P0ISON"]})
            assert (poison.status, error(poison)["code"]) == (502, "input_ends_engine")
            assert (error(poison)["source"], error(poison)["index"]) == ("engine", 1)
            assert poison.headers["x-should-retry"] == "false"
            await asyncio.gather(*asked)
            assert np.array_equal(await many, [engine.vector(t) for t in texts])
            assert len(deadly.deaths) == 3
            again = await gw.post({"model": "null", "input": "P0ISON"})
            assert (again.status, error(again)["code"]) == (502, "input_ends_engine")
            assert len(deadly.deaths) == 3
            await checked(gw, engine, "after")
            assert gw.service.endpoint.model.batcher.queued == 0

    run(main())


def test_what_ended_engines_is_tried_again_after_a_while() -> None:
    now = [0.0]
    killers = Killers(lambda: now[0])
    killers.add(b"one")
    assert killers.known(b"one")
    assert not killers.known(b"two")
    now[0] = REMEMBERED + 1
    assert not killers.known(b"one")
    for number in range(3 * MOST):
        killers.add(b"%d" % number)
    assert sum(killers.known(b"%d" % n) for n in range(3 * MOST)) == MOST


@pytest.mark.parametrize("status", [500, 408])
def test_an_engine_that_fails_at_one_text_fails_no_other(status: int) -> None:
    """A call of many that an engine answers with its own fault goes again in parts until the culprit is alone."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=20.0) as gw:
            real = engine.embed

            async def faulty(body: bytes) -> tuple[int, bytes]:
                return (status, b"{}") if b"FAULT" in body else await real(body)

            engine.embed = faulty  # type: ignore[method-assign]
            texts = [f"good {i}" for i in range(100)]
            good = asyncio.create_task(gw.vectors(texts))
            bad = await gw.post({"model": "null", "input": "FAULT"})
            assert (bad.status, error(bad)["code"]) == (502, "engine_failed")
            assert np.array_equal(await good, [engine.vector(t) for t in texts])

    run(main())


def test_a_full_queue_answers_429_and_each_client_keeps_its_share() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, queue=100, max_items=100, calls=1, batch_items=10) as gw:
            engine.hang = True
            names = [asyncio.create_task(gw.post({"model": "null", "input": f"first {i}"})) for i in range(3)]
            room = gw.service.endpoint.model.batcher
            await until(lambda: room.in_air >= 1)
            heavy = asyncio.create_task(gw.post({"model": "null", "input": [f"h{i}" for i in range(90)]}))
            await until(lambda: room.queued >= 60)
            over = await gw.post({"model": "null", "input": [f"o{i}" for i in range(60)]})
            assert over.status == 429
            assert error(over)["code"] == "overloaded"
            assert int(over.headers["retry-after"]) >= 1
            for task in (*names, heavy):
                task.cancel()
            engine.hang = False

    run(main())
