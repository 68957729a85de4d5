"""`verify` and answers that break the transport: slow drips, floods, compression, odd types, nonsense."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from small_endpoint import SmallEndpoint, _Handler, serving

from qwen3emb_launch.verify import contact
from qwen3emb_launch.verify.contact import Contact, Misanswer
from qwen3emb_launch.verify.report import Report
from qwen3emb_launch.verify.runner import Request, verify
from qwen3emb_launch.verify.session import Options

Answer = Callable[[_Handler, bytes], None]


@contextmanager
def answering(how: Answer | None, endpoint: SmallEndpoint | None = None, version: str = "HTTP/1.1") -> Iterator[str]:
    """A small endpoint whose embeddings come in that way."""

    class Handler(_Handler):
        protocol_version = version

        def reply(self, status: int, value: Any) -> None:
            if how is None or self.command == "GET" or status != 200:
                super().reply(status, value)
            else:
                how(self, json.dumps(value).encode())

    with serving(endpoint or SmallEndpoint(), Handler) as url:
        yield url


def head(handler: _Handler, length: int | None, **more: str) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("content-length", str(length))
    for name, value in more.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def quick(url: str, folder: Path, timeout: float = 20.0, **options: Any) -> Report:
    return verify(Request(url, Options(**options), folder / "w.json", timeout=timeout))[0]


def zipped(handler: _Handler, data: bytes) -> None:
    packed = gzip.compress(data)
    head(handler, len(packed), content_encoding="gzip")
    handler.wfile.write(packed)


def as_text(handler: _Handler, data: bytes) -> None:
    head(handler, len(data), content_type="text/plain")
    handler.wfile.write(data)


@pytest.mark.parametrize(("how", "version"), [(zipped, "HTTP/1.1"), (as_text, "HTTP/1.1"), (None, "HTTP/1.0")])
def test_a_right_endpoint_may_speak_as_it_likes(how: Answer | None, version: str, tmp_path: Path) -> None:
    """Compressed, as another type, or with a connection for each answer: not refused, nor by OpenAI's client."""
    with answering(how, version=version) as url:
        report = quick(url, tmp_path, openai_client=True, max_latency=5000.0)
    assert report.passed, [(c.id, c.seen) for c in report.failures]


def test_an_answer_that_drips_ends_with_the_time_limit(tmp_path: Path) -> None:
    """A byte now and then is no answer: the limit is for the whole of it."""
    rest = Event()
    lengths: list[int] = []

    def drip(handler: _Handler, data: bytes) -> None:
        head(handler, len(data))
        lengths.append(len(data))
        for i in range(len(data)):
            if rest.wait(0.1):
                return
            handler.wfile.write(data[i : i + 1])

    with answering(drip) as url:
        report = quick(url, tmp_path, timeout=0.5)
        rest.set()
    assert report.seconds < 0.1 * min(lengths)  # what one whole answer takes: minutes
    assert report.failures[0].id == "answers"
    assert "did not answer within 0." in report.failures[0].seen


def test_an_answer_without_end_is_not_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not filled with it."""
    monkeypatch.setattr(contact, "LARGEST", 1 << 20)
    sent = []

    def flood(handler: _Handler, _: bytes) -> None:
        head(handler, None)
        handler.close_connection = True
        try:
            while len(sent) < 2000:
                handler.wfile.write(b" " * 65536)
                sent.append(1)
        except OSError:
            pass

    with answering(flood) as url:
        failure = quick(url, tmp_path).failures[0]
    assert "does not end" in failure.cause
    assert len(sent) < 500


@pytest.mark.parametrize("body", [b"[" * 100_000, b"<html>", b"\xff\xfe", b"null", b"", b'{"data": [[0.5]]}'])
def test_nonsense_is_no_route(body: bytes, tmp_path: Path) -> None:
    """Nested beyond reading, another language, nothing: said as such."""

    def nonsense(handler: _Handler, _: bytes) -> None:
        head(handler, len(body))
        handler.wfile.write(body)

    with answering(nonsense) as url:
        assert quick(url, tmp_path).failures[0].id == "answers"


@pytest.mark.parametrize("component", [None, "a word", {}])
def test_what_openais_client_lets_through_is_no_defect_of_ours(component: object) -> None:
    """It hands on what is no number; said of the endpoint."""
    endpoint = SmallEndpoint()
    endpoint.embed = lambda _: (200, {"data": [{"index": 0, "embedding": [component, 0.5]}]})  # type: ignore[method-assign]
    with answering(None, endpoint) as url:
        client = Contact(url)
        client.model = "hash"
        if component is None:
            assert math.isnan(client.openai_vector("a")[0])
        else:
            with pytest.raises(Misanswer, match="OpenAI client raises"):
                client.openai_vector("a")
        client.close()


def test_what_a_server_says_does_not_steer_the_terminal() -> None:
    """Escape sequences and line breaks of an unproven server are not passed on."""
    endpoint = SmallEndpoint()
    endpoint.embed = lambda _: (500, {"error": {"message": "boom\n\x1b[2J\x07gone"}})  # type: ignore[method-assign]
    with answering(None, endpoint) as url:
        client = Contact(url)
        with pytest.raises(Misanswer) as caught:
            client.embed("a")
        client.close()
    assert caught.value.message == "500: boom \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}gone"


def test_a_context_beyond_all_models_makes_no_text_of_that_length(tmp_path: Path) -> None:
    """A wrong configuration of the server fills nobody's memory here."""
    endpoint = SmallEndpoint()
    endpoint.model["max_model_len"] = 10**9
    with answering(None, endpoint) as url:
        report = verify(Request(url, Options(), tmp_path / "w.json", only=frozenset({"limit"})))[0]
    assert "1000000000 tokens" in report.checks[-1].cause
