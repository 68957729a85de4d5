"""Texts that were with an engine when it died: which of them is blamed, and what that costs the others."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from qwen3emb_launch.gateway import batcher
from qwen3emb_launch.gateway.killers import MOST_SUSPECTS, REMEMBERED, Killers
from qwen3emb_launch.gateway.tokens import Prepared
from tests.gateway_bench import Bench, error, gateway, rows
from tests.null_engine import NullEngine, Served
from tests.test_gateway_resilience import checked, run, until


class Mortal:
    """An engine that a text with P0ISON ends, and that comes back when it is told."""

    def __init__(self, served: Served) -> None:
        self.served, self.real = served, served.engine.embed
        self.deaths: list[asyncio.Task] = []
        served.engine.embed = self.embed  # type: ignore[method-assign]

    async def embed(self, body: bytes) -> tuple[int, bytes]:
        if b"P0ISON" not in body:
            return await self.real(body)
        self.deaths.append(asyncio.create_task(self.served.stop()))
        await asyncio.Event().wait()
        raise AssertionError


async def restarted(gw: Bench, served: Served) -> None:
    """The engine dies with what it has, is seen to be away, and comes back."""
    await served.stop()
    await until(lambda: not gw.service.pool.up)
    await served.start()


@pytest.mark.parametrize("fault", [(500, b"{}"), (408, b"{}")])
def test_faults_that_an_engine_survives_are_no_deaths(fault: tuple[int, bytes]) -> None:
    """Two of them and one death are three tries, not three deaths: the text is answered."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=20.0) as gw:
            real, seen = engine.embed, 0

            async def faulty(body: bytes) -> tuple[int, bytes]:
                nonlocal seen
                seen += b"innocent" in body
                if b"innocent" not in body or seen > 3:
                    return await real(body)
                if seen == 3:
                    await asyncio.Event().wait()
                return fault

            engine.embed = faulty  # type: ignore[method-assign]
            asked = asyncio.create_task(checked(gw, engine, "innocent"))
            await until(lambda: seen == 3)
            await restarted(gw, served)
            await asked

    run(main())


def test_a_text_that_ends_engines_is_found_though_each_request_with_it_ends_before() -> None:
    """The hold is shorter than the engine is away, and the client repeats: three deaths all the same."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=0.1) as gw:
            mortal, codes = Mortal(served), []
            for number in range(1, 4):
                answer = await gw.post({"model": "null", "input": "P0ISON"})
                codes.append(error(answer)["code"])
                assert len(mortal.deaths) == number
                await mortal.deaths[-1]
                await served.start()
                await until(lambda: gw.service.pool.up)
            assert codes == ["no_engine", "no_engine", "input_ends_engine"]
            again = await gw.post({"model": "null", "input": "P0ISON"})
            assert error(again)["code"] == "input_ends_engine"
            assert len(mortal.deaths) == 3

    run(main())


def test_a_text_that_was_answered_is_no_suspect_any_more() -> None:
    """Engines that end with it for other reasons, one a request, never add up."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, hold=20.0, cache_bytes=0) as gw:
            for _ in range(5):
                engine.hang, calls = True, engine.calls
                asked = asyncio.create_task(checked(gw, engine, "innocent"))
                await until(lambda calls=calls: engine.calls > calls)
                engine.hang = False
                await restarted(gw, served)
                await asked

    run(main())


def test_suspicion_ends_after_a_while_and_is_bounded() -> None:
    now = [0.0]
    killers = Killers(lambda: now[0])
    killers.suspect(b"one", 2)
    assert (killers.deaths(b"one"), killers.deaths(b"two")) == (2, 0)
    assert not killers.known(b"one")
    now[0] = REMEMBERED + 1
    assert killers.deaths(b"one") == 0
    for number in range(2 * MOST_SUSPECTS):
        killers.suspect(b"%d" % number, 1)
    assert sum(killers.deaths(b"%d" % n) for n in range(2 * MOST_SUSPECTS)) == MOST_SUSPECTS


def test_a_call_that_cannot_be_written_fails_and_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A defect of ours at one text is that text's answer, not a call that is tried again until its deadline."""

    async def main() -> None:
        engine, wire = NullEngine(64), Prepared.wire

        def faulty(self: Prepared, as_ids: bool) -> str | list[int]:
            return wire(self, as_ids) if self.payload != "odd" else 1 // 0

        async with Served(engine) as served, gateway(served, timeout=10.0) as gw:
            monkeypatch.setattr(Prepared, "wire", faulty)
            good = asyncio.create_task(gw.post({"model": "null", "input": ["a", "b"]}))
            odd = await gw.post({"model": "null", "input": "odd"})
            assert (odd.status, error(odd)["code"]) == (502, "engine_failed")
            assert np.array_equal(rows(await good), [engine.vector("a"), engine.vector("b")])
            model = gw.service.endpoint.model
            assert model is not None
            assert model.batcher.in_air == model.batcher.queued == 0

    run(main())
    assert "an engine call failed inside the gateway" in caplog.text


@pytest.mark.parametrize("new", ["short", "long " * 600], ids=["short", "long"])
def test_suspects_that_take_long_take_turns_with_others(new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine that died with hundreds of texts: whoever asks then does not wait for the last of them."""

    async def main() -> None:
        monkeypatch.setattr(batcher, "PATIENCE", 0.1)
        engine = NullEngine(64, delay=0.03)
        async with Served(engine) as served, gateway(served, hold=20.0) as gw:
            engine.hang = True
            texts = [f"good {i}" for i in range(512)]
            many = [asyncio.create_task(checked(gw, engine, text)) for text in texts]
            model = gw.service.endpoint.model
            assert model is not None
            await until(lambda: model.batcher.in_air == len(texts))
            engine.hang = False
            await restarted(gw, served)
            await until(lambda: gw.service.pool.up)
            await checked(gw, engine, new)
            assert not all(task.done() for task in many)
            await asyncio.gather(*many)

    run(main())
