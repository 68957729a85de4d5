"""Probes of engines that are overtaken by what an operator asks for, or that go wrong inside the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.upstream import Upstream, UpstreamPool, UpstreamState
from tests.null_engine import NullEngine, Served
from tests.test_gateway_resilience import run, until


class Gate:
    """Holds an engine's next answer, which is computed before: what it was asked for arrives late."""

    def __init__(self, engine: NullEngine) -> None:
        self.engine, self.real = engine, engine.embed
        self.holding = False
        self.open = asyncio.Event()
        engine.embed = self.embed  # type: ignore[method-assign]

    async def embed(self, body: bytes) -> tuple[int, bytes]:
        self.engine.embed = self.real  # type: ignore[method-assign]
        answer = await self.real(body)
        self.holding = True
        await self.open.wait()
        return answer


def change_the_model(pool: UpstreamPool, _: Upstream) -> None:
    pool.forget_reference()


async def drain_and_bring_back(pool: UpstreamPool, upstream: Upstream) -> None:
    await pool.drain(upstream.url, 0.0)
    pool.add(upstream.address)


async def drain_change_and_bring_back(pool: UpstreamPool, upstream: Upstream) -> None:
    await pool.drain(upstream.url, 0.0)
    pool.forget_reference()
    pool.add(upstream.address)


@pytest.mark.parametrize("order", [change_the_model, drain_and_bring_back, drain_change_and_bring_back])
def test_an_order_while_a_probe_is_in_the_air_leaves_the_engine_probed_anew(order: Callable) -> None:
    """The old probe's vector, whenever it comes, is nobody's reference: it may be the model's before."""

    async def main() -> None:
        engine, new = NullEngine(64), NullEngine(64, seed=2)
        async with Served(engine) as served:
            gate = Gate(engine)
            pool = UpstreamPool(model="null")
            upstream = pool.add(Address.parse(served.url))
            await until(lambda: gate.holding)
            engine.rows, engine._base64 = new.rows, new._base64
            done = order(pool, upstream)
            if done is not None:
                await done
            gate.open.set()
            await until(lambda: upstream.state is UpstreamState.UP, 10)
            assert pool.reference is not None
            assert np.array_equal(pool.reference, new.vector("Which vectors do you make?"))
            pool.close()

    run(main())


def test_a_late_probe_of_a_drained_engine_sets_no_reference() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served:
            gate = Gate(engine)
            pool = UpstreamPool(model="null")
            upstream = pool.add(Address.parse(served.url))
            await until(lambda: gate.holding)
            await pool.drain(upstream.url, 0.0)
            pool.forget_reference()
            gate.open.set()
            await until(lambda: upstream.prober is not None and upstream.prober.done())
            assert pool.reference is None
            assert upstream.state is UpstreamState.DRAINING
            pool.close()

    run(main())


def test_a_defect_of_the_gateways_own_does_not_end_probing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served:
            pool = UpstreamPool(model="null")
            pool.samples = lambda: 1 // 0  # type: ignore[assignment,return-value]
            upstream = pool.add(Address.parse(served.url))
            await until(lambda: "ZeroDivisionError" in upstream.reason)
            assert upstream.state is UpstreamState.DOWN
            pool.samples = list
            await until(lambda: upstream.state is UpstreamState.UP)
            pool.close()

    run(main())
    assert "failed inside the gateway" in caplog.text
