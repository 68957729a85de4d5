"""OpenTelemetry: what the spans say, whose children they are, and that nothing private is in them."""

from __future__ import annotations

import asyncio
import json
import sys

import orjson
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.tracing import Tracing
from tests.gateway_bench import gateway
from tests.null_engine import NullEngine, Served

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


def traced() -> tuple[Tracing, InMemorySpanExporter]:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return Tracing(provider), kept


def by_name(kept: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in kept.get_finished_spans() if span.name == name]


def test_a_request_and_its_engine_call_hang_below_the_callers_span_and_hold_no_text() -> None:
    tracing, kept = traced()

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, tracing=tracing, hold=0.3) as gw:
            body = {"model": "null", "input": ["a secret text", "another"]}
            for _ in range(2):
                answer = await gw.post(body, traceparent=f"00-{CALLER}-00f067aa0ba902b7-01", authorization="Bearer k-1")
                assert answer.status == 200
            assert (await gw.post({"model": "null", "input": ""})).status == 400
            engine.status = (500, b"{}")
            assert (await gw.post({"model": "null", "input": "fails"})).status == 503

    asyncio.run(asyncio.wait_for(main(), 60))
    good, cached, refused, failed = by_name(kept, "POST /v1/embeddings")
    calls = by_name(kept, "embeddings null")
    for span in (good, cached):
        assert span.context.trace_id == int(CALLER, 16)
        assert span.parent is not None
        assert span.attributes is not None
        assert span.attributes["http.response.status_code"] == 200
    assert (good.attributes["qwen3emb.cache_hits"], cached.attributes["qwen3emb.cache_hits"]) == (0, 2)
    assert calls[0].parent.span_id == good.context.span_id
    assert [link.context.span_id for link in calls[0].links] == [good.context.span_id]
    assert calls[0].attributes["qwen3emb.items"] == 2
    assert refused.attributes["error.type"] == "blank_input"
    assert refused.status.is_unset  # a client's fault is no fault of the server's
    assert failed.attributes["error.type"] == "no_engine"
    assert not failed.status.is_ok
    assert {c.attributes.get("error.type") for c in calls} == {None, "500"}
    shown = json.dumps([json.loads(span.to_json()) for span in kept.get_finished_spans()])
    assert "secret" not in shown
    assert "k-1" not in shown


def test_the_engine_is_told_whose_call_it_is() -> None:
    """The engine call's own span goes on as `traceparent`: an engine that traces continues the caller's trace."""
    tracing, kept = traced()
    seen: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served = NullEngine(64)
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:  # the gateway hung up
                return
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if head.startswith(b"GET"):
                out = orjson.dumps({"data": [{"id": "null"}]})
            else:
                seen.append(head)
                _, out = await served.embed(body)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(out) + out)

    async def main() -> None:
        server = await asyncio.start_server(engine, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with gateway(url, tracing=tracing) as gw:
            assert (await gw.post({"model": "null", "input": "a"})).status == 200
        server.close()

    asyncio.run(asyncio.wait_for(main(), 60))
    (call,) = by_name(kept, "embeddings null")
    wanted = f"traceparent: 00-{call.context.trace_id:032x}-{call.context.span_id:016x}-"
    assert wanted.encode() in seen[-1]


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(InvalidInputError) as caught:
        Tracing()
    assert caught.value.code == "no_opentelemetry"
    assert "qwen3emb-launch[otel]" in caught.value.hint
