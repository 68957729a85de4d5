"""embed through the OpenAI client against the fake engine: order, batches, dims, tasks, and every refusal."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import free_port
from fake_engine import Behaviour, Engine, handler
from small_endpoint import SmallEndpoint, serving

from qwen3emb_launch import embed as embedding
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.errors import EngineFailedError, InvalidInputError, LaunchError, NetworkError
from qwen3emb_launch.instructions import WEB_SEARCH

OUTER = pytest.CaptureFixture[str]


class Endpoint:
    """The fake engine's routes in this process."""

    def __init__(self, **behaviour: Any) -> None:
        self.engine = Engine(Behaviour(**behaviour))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self.engine))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.close()


def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def lines(capsys: OUTER) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_texts_to_json_lines(capsys: OUTER, endpoint: Endpoint) -> None:
    """A JSON line a text, in order, of the width asked for."""
    assert run(["embed", "one", "two", "--dims", "32", "--base-url", endpoint.url]) == 0
    found = lines(capsys)
    assert [(e["index"], e["text"], len(e["embedding"])) for e in found] == [(0, "one", 32), (1, "two", 32)]


def test_stdin_in_batches(capsys: OUTER, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of stdin are embedded in batches; order and index run through, every text keeps its own vector."""
    texts = [f"text {i} 文" for i in range(25)]
    stdin(monkeypatch, "\r\n".join(texts).encode())
    assert run(["embed", "--batch", "7", "--base-url", endpoint.url]) == 0
    found = lines(capsys)
    assert [e["text"] for e in found] == texts
    assert [e["index"] for e in found] == list(range(25))
    assert all(e["embedding"] == endpoint.engine.vector(e["text"], None) for e in found)
    assert endpoint.engine.requests == 4


def test_one_envelope(capsys: OUTER, endpoint: Endpoint) -> None:
    """--json prints one envelope with all vectors and the model."""
    assert run(["embed", "one", "--json", "--base-url", endpoint.url, "--model", "fake"]) == 0
    (body,) = lines(capsys)
    assert body["result"]["model"] == "fake"
    assert len(body["result"]["embeddings"]) == 1


@pytest.mark.parametrize(
    ("task", "sent"),
    [
        (None, "hello"),
        ("document", "hello"),
        ("query", f"Instruct: {WEB_SEARCH}\nQuery:hello"),
        ("Find the answer", "Instruct: Find the answer\nQuery:hello"),
    ],
)
def test_task_is_applied(capsys: OUTER, endpoint: Endpoint, task: str | None, sent: str) -> None:
    """A query is instructed exactly as the model card says, a document stays bare; the text shown is the user's."""
    assert run(["embed", "hello", "--base-url", endpoint.url, *(["--task", task] if task else [])]) == 0
    (found,) = lines(capsys)
    assert found["text"] == "hello"
    assert found["embedding"] == endpoint.engine.vector(sent, None)


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("x", "--dims", "31"), 2, "bad_dims"),
        (("x", "--dims", "0"), 2, "bad_dims"),
        (("x", "--task", "qurey"), 2, "unknown_task"),
        (("x", "   "), 2, "blank_text"),
        (("x", "--name", "demo"), 2, "usage"),
        (("x", "--api-key-file", "/no/such/file"), 2, "bad_key_file"),
    ],
)
def test_bad_input(capsys: OUTER, endpoint: Endpoint, args: tuple[str, ...], status: int, code: str) -> None:
    """Every mistake has its code and exit status, and the endpoint is not bothered."""
    assert run(["embed", *args, "--base-url", endpoint.url, "--json"]) == status
    (body,) = lines(capsys)
    assert body["error"]["code"] == code


def test_stdin_that_is_not_utf8(capsys: OUTER, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line in another encoding is named, not guessed at."""
    stdin(monkeypatch, b"good\nb\xe4d\n")
    assert run(["embed", "--base-url", endpoint.url, "--json"]) == 2
    (body,) = lines(capsys)
    assert body["error"]["code"] == "not_utf8"
    assert "line 2" in body["error"]["message"]


def test_nothing_runs(capsys: OUTER) -> None:
    """Without an instance and without an address: exit 3 and how to begin."""
    assert run(["embed", "x", "--json"]) == 3
    (body,) = lines(capsys)
    assert (body["error"]["code"], body["error"]["hint"]) == ("not_running", "qwen3emb up")


@pytest.mark.parametrize(
    "url", ["ftp://x/v1", "127.0.0.1:30000", "", "http://", "http://[::1", "http://h:x/v1", "http://a b"]
)
def test_bad_address(url: str) -> None:
    """What is no http address is refused before any request."""
    with pytest.raises(InvalidInputError):
        embedding.base_url(url)


def test_a_proxy_that_is_no_address(capsys: OUTER, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as what it is, and only where a proxy would be asked."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:abc")
    assert run(["embed", "x", "--base-url", "http://192.0.2.1:9/v1", "--json"]) == 5
    assert lines(capsys)[0]["error"]["code"] == "bad_proxy"
    assert run(["embed", "x", "--base-url", "http://127.0.0.1:9/v1", "--json"]) == 5
    assert lines(capsys)[0]["error"]["code"] == "endpoint_down"


def test_address_forms() -> None:
    """A bare host gets its /v1; a path is kept as it is."""
    assert embedding.base_url("http://h:1") == "http://h:1/v1"
    assert embedding.base_url("http://h:1/") == "http://h:1/v1"
    assert embedding.base_url("https://h/api/v3/") == "https://h/api/v3"


def failure(url: str, texts: Sequence[str] = ("x",), **options: Any) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        list(embedding.Embedder(url, model="fake", key=None, loopback=True).embed(texts, **options))
    return caught.value


def test_endpoint_down() -> None:
    """Nobody listens: a network error that names the address."""
    error = failure(f"http://127.0.0.1:{free_port()}/v1")
    assert isinstance(error, NetworkError)
    assert error.code == "endpoint_down"


@pytest.mark.parametrize(
    ("status", "code", "exit_status"),
    [(400, "rejected", 2), (401, "unauthorized", 3), (500, "endpoint_failed", 4), (503, "endpoint_failed", 4)],
)
def test_refusals_are_translated(status: int, code: str, exit_status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The endpoint's own words arrive with our code and exit status."""
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_, **__: 0)
    made = Endpoint(refuse=status)
    error = failure(made.url)
    made.close()
    assert (error.code, int(error.exit)) == (code, exit_status)
    assert error.message.endswith("no")


def test_ignored_dimensions_are_an_error() -> None:
    """A server that answers another width than asked for is not believed."""
    made = Endpoint(ignore_dimensions=True)
    error = failure(made.url, dims=32)
    made.close()
    assert isinstance(error, EngineFailedError)
    assert error.code == "dims_ignored"


@pytest.mark.parametrize("fault", ["null", "text", "no index", "one index"])
def test_an_answer_that_is_no_vector_is_an_error(fault: str) -> None:
    """Nothing that a search would stumble over is printed as a vector, and no text gets another's."""
    small = SmallEndpoint()
    small.model["id"] = "fake"
    right = small.embed

    def wrong(body: Any) -> tuple[int, Any]:
        status, answer = right(body)
        last = answer["data"][-1]
        if fault == "no index":
            del last["index"]
        elif fault == "one index":
            last["index"] = 0
        else:
            last["embedding"] = [None if fault == "null" else "0.1", *last["embedding"][1:]]
        return status, answer

    small.embed = wrong  # type: ignore[method-assign]
    with serving(small) as url:
        error = failure(url, texts=["one", "two"])
    assert isinstance(error, EngineFailedError)
    assert error.code == "wrong_answer"


def test_proxies_do_not_reach_loopback(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not used for this machine."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    (found,) = embedding.Embedder(endpoint.url, model=None, key=None, loopback=True).embed(["x"])
    assert len(found.embedding) == 64


def test_what_is_no_key_is_refused_unseen(capsys: OUTER, endpoint: Endpoint, tmp_path: Path) -> None:
    """A file of several lines, letters that no header carries, a password in the address: said, never shown."""
    file = tmp_path / "key"
    for content in ("sesame\nopen", "sésame"):
        file.write_text(content, encoding="utf-8")
        assert run(["embed", "x", "--base-url", endpoint.url, "--api-key-file", str(file)]) == 2
    assert run(["embed", "x", "--base-url", endpoint.url.replace("//", "//user:sesame@")]) == 2
    assert not re.search("s[eé]same", "".join(capsys.readouterr()))


def test_key_from_a_file(capsys: OUTER, endpoint: Endpoint, tmp_path: Path) -> None:
    """The key may come from a file; it is not printed."""
    path = tmp_path / "key"
    path.write_text("s3cret\n")
    assert run(["embed", "x", "--base-url", endpoint.url, "--api-key-file", str(path)]) == 0
    assert "s3cret" not in capsys.readouterr().out
