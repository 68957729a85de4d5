"""The plugin's answers on the real engine are the stock server's: status, headers, bytes, errors included.

Two engines serve the same demo model. Both have the plugin on their path; the stock one is told by SGLANG_PLUGINS not
to load it, which is what `--set plugin=false` does.
"""

from __future__ import annotations

import base64
import http.client
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import start_engine

from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel

pytestmark = pytest.mark.engine

KEY, ADMIN = "user-key", "admin-key"
CONTEXT = 1024
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def vectors(self) -> list[Any]:
        return [item["embedding"] for item in self.json["data"]]


class keyed_engine(start_engine):  # noqa: N801 - used as `with keyed_engine(...)`
    """An engine behind keys: ready when it answers with one."""

    def _answers(self) -> bool:
        try:
            return call(self.port, "POST", EMBEDDINGS, {"input": "ready?"}).status == 200
        except OSError:
            return False


def call(port: int, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str) -> Answer:
    """One request; `body` is sent as it is when it is bytes, as JSON otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    connection.request(method, path, data, {**sent, **{k.replace("_", "-"): v for k, v in headers.items()}})
    answer = connection.getresponse()
    found = Answer(answer.status, {k: v for k, v in answer.getheaders() if k != "date"}, answer.read())
    connection.close()
    return found


@dataclass(frozen=True)
class Pair:
    stock: int
    plugin: int
    plugin_log: Path
    stock_log: Path

    def both(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[Answer, Answer]:
        return call(self.stock, method, path, body, **more), call(self.plugin, method, path, body, **more)


@pytest.fixture(scope="module")
def pair(engine_python: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The stock engine and the one with the plugin, started side by side."""
    import zipfile

    folder = tmp_path_factory.mktemp("plugin")
    with zipfile.ZipFile(build_plugin_wheel(folder)) as wheel:
        wheel.extractall(folder / "site")
    engines = {
        name: keyed_engine(
            engine_python, demo_model, folder / f"{name}.log", "--api-key", KEY, "--admin-api-key", ADMIN,
            "--disable-radix-cache",
            context_length=CONTEXT,
            environ={"PYTHONPATH": str(folder / "site"), "SGLANG_PLUGINS": plugins, "OMP_NUM_THREADS": "1"},
        )
        for name, plugins in (("stock", "none"), ("plugin", "qwen3emb"))
    }  # fmt: skip
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        list(pool.map(stack.enter_context, engines.values()))
        yield Pair(engines["stock"].port, engines["plugin"].port, engines["plugin"].log, engines["stock"].log)


def test_the_plugin_is_in_one_engine_and_not_in_the_other(pair: Pair) -> None:
    """A comparison of two stock servers would prove nothing; no part stands aside on this engine."""
    log = pair.plugin_log.read_text()
    assert "POST /v1/embeddings is answered by the fast route" in log
    assert "stands aside" not in log
    assert "qwen3emb plugin:" not in pair.stock_log.read_text()


def test_the_workers_are_forked_from_one_template(pair: Pair) -> None:
    """Scheduler and detokenizer begin with everything imported: their parent is a fork of the main process."""
    main = next(p for p in psutil.process_iter() if _listens(p, pair.plugin))
    titles = {child.pid: " ".join(child.cmdline()) for child in main.children(recursive=True)}
    workers = [pid for pid, title in titles.items() if title.startswith(("sglang::scheduler", "sglang::detokenizer"))]
    assert len(workers) == 2, titles
    parents = {psutil.Process(pid).ppid() for pid in workers}
    assert len(parents) == 1, titles
    (template,) = parents
    assert template != main.pid
    assert psutil.Process(template).ppid() == main.pid
    assert titles[template].startswith("sglang::template")


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections())
    except psutil.Error:
        return False


RIGHT = {
    "a text": {"input": "hello"},
    "with every field": {"input": "hello", "model": "m", "dimensions": 64, "encoding_format": "float", "user": "u"},
    "texts": {"input": ["one", "two words", "three of them, in order"]},
    "one text in a list": {"input": ["one"]},
    "ids": {"input": [104, 101, 108, 256]},
    "lists of ids": {"input": [[104, 256], [101, 108, 256]]},
    "the smallest dimensions": {"input": ["a", "b"], "dimensions": 1},
    "full dimensions": {"input": "a", "dimensions": 256},
    "other scripts": {"input": "向量 检索 🙂 café \u200b"},
    "control characters": {"input": "a\tb\x00c\x7f"},
    "a special token as text": {"input": "a <|endoftext|> b <|im_end|>"},
    "the longest that fits": {"input": "x" * (CONTEXT - 2)},
    "many texts": {"input": [f"text number {i}" for i in range(200)]},
    "more than a thread's worth of text": {"input": ["y" * 900 for _ in range(30)]},
    "null fields": {"input": "a", "dimensions": None, "user": None},
    # taken by the stock route in both
    "dimensions as text": {"input": "a", "dimensions": "32"},
    "an unknown field": {"input": "a", "colour": "red"},
    "a priority": {"input": "a", "priority": 3},
    "an id of the caller's": {"input": "a", "rid": "mine"},
    "booleans": {"input": [True, False]},
}
WRONG = {
    "blank": {"input": "  "},
    "empty": {"input": ""},
    "no items": {"input": []},
    "a blank among texts": {"input": ["a", " "]},
    "mixed texts and ids": {"input": ["a", 1]},
    "mixed ids and texts": {"input": [1, "a"]},
    "a negative id": {"input": [5, -1]},
    "too long by one": {"input": "x" * (CONTEXT - 1)},
    "one of them too long": {"input": ["a", "x" * 2 * CONTEXT]},
    "too many ids": {"input": [104] * CONTEXT},
    "dimensions above the width": {"input": "a", "dimensions": 257},
    "no dimensions": {"input": "a", "dimensions": 0},
    "negative dimensions": {"input": "a", "dimensions": -5},
    "broken dimensions": {"input": "a", "dimensions": 1.5},
    "no input": {"model": "m"},
    "null input": {"input": None},
    "an object": {"input": {"text": 1}},
    "a number": {"input": 7},
    "floats": {"input": [1.5, 2.0]},
    "a null format": {"input": "a", "encoding_format": None},
    "a model that is no text": {"input": "a", "model": 3},
    "an adapter": {"input": "a", "model": "base:adapter"},
    "malformed JSON": b'{"input": "a"',
    "no JSON": b"hello",
    "nothing": b"",
    "a list": b"[1, 2]",
    "a lone surrogate": b'{"input": 1, "user": "\\ud800"}',
}


def same_but_for_rounding(one: Answer, other: Answer) -> None:
    """Items of one request run in batches as they come, and bf16 rounds by batch, on two stock servers too."""
    assert [list(item) for item in one.json["data"]] == [list(item) for item in other.json["data"]]
    assert [item["index"] for item in one.json["data"]] == [item["index"] for item in other.json["data"]]
    assert {k: v for k, v in one.json.items() if k != "data"} == {k: v for k, v in other.json.items() if k != "data"}
    for a, b in zip(one.vectors, other.vectors, strict=True):
        assert len(a) == len(b)
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.01


@pytest.mark.parametrize("name", RIGHT)
def test_answers_are_the_stock_server_s_byte_for_byte(pair: Pair, name: str) -> None:
    """Floats, usage, model, key order and headers; of several items, each in its place."""
    stock, plugin = pair.both("POST", EMBEDDINGS, RIGHT[name])
    assert stock.status == 200
    if len(stock.vectors) == 1:
        assert plugin == stock
    else:
        assert {**plugin.headers, "content-length": ""} == {**stock.headers, "content-length": ""}
        same_but_for_rounding(plugin, stock)


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_the_stock_server_s_byte_for_byte(pair: Pair, name: str) -> None:
    """Whatever is wrong with a request, SGLang's own words answer it."""
    stock, plugin = pair.both("POST", EMBEDDINGS, WRONG[name])
    assert stock.status == 400
    assert plugin == stock


@pytest.mark.parametrize("extra", [{}, {"priority": 3}], ids=["fast route", "stock route"])
def test_base64_holds_the_numbers_of_the_float_answer(pair: Pair, extra: dict[str, Any]) -> None:
    """Also on releases that ignore the field, by both routes: float32, little-endian."""
    asked = {"input": ["one"], "dimensions": 100, **extra}
    floats = call(pair.stock, "POST", EMBEDDINGS, asked)
    packed = call(pair.plugin, "POST", EMBEDDINGS, {**asked, "encoding_format": "base64"})
    (text,), (numbers,) = packed.vectors, floats.vectors
    data = base64.b64decode(text)
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == numbers
    assert packed.json["usage"] == floats.json["usage"]


def test_concurrent_requests_get_their_own_answers(pair: Pair) -> None:
    """Texts, lists, ids, dims, base64 and errors at once: each as it is alone (batches round differently in bf16)."""
    mix = [
        {"input": f"text {i}"} if i % 5 < 2
        else {"input": [f"a {i}", f"b {i}"], "dimensions": 32 + i} if i % 5 == 2
        else {"input": [97 + i % 20, 98, 256]} if i % 5 == 3
        else {"input": ["a", "z" * 3000]}
        for i in range(60)
    ]  # fmt: skip
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda body: call(pair.plugin, "POST", EMBEDDINGS, body), mix))
    for body, found in zip(mix, together, strict=True):
        alone = call(pair.stock, "POST", EMBEDDINGS, body)
        assert found.status == alone.status, body
        if found.status == 200:
            same_but_for_rounding(found, alone)
        else:
            assert found.body == alone.body


def test_keys_are_asked_for_as_before(pair: Pair) -> None:
    """No key, a wrong one, the admin's: the middleware stands before the fast route too."""
    for key in (None, "wrong", ADMIN):
        stock, plugin = pair.both("POST", EMBEDDINGS, {"input": "a"}, key=key)
        assert stock.status == 401
        assert plugin == stock
    stock, plugin = pair.both("POST", "/flush_cache", key=None)
    assert stock.status == 401
    assert plugin.status == stock.status


def test_content_types_methods_and_cors_are_as_before(pair: Pair) -> None:
    """A charset is fine, another type is refused, GET is not allowed, CORS headers are the application's."""
    text = b'{"input": "a"}'
    for headers in (
        {"content_type": "application/json; charset=utf-8"},
        {"content_type": "Application/JSON"},
        {"content_type": "text/plain"},
        {"content_type": "application/jsonx"},
        {"origin": "http://page.example"},
    ):
        stock, plugin = pair.both("POST", EMBEDDINGS, text, **headers)
        assert plugin == stock, headers
    for method in ("GET", "PUT", "OPTIONS"):
        stock, plugin = pair.both(method, EMBEDDINGS)
        assert plugin == stock
        assert stock.status == 405


def test_other_routes_are_untouched(pair: Pair) -> None:
    """Health, models, tokenize, rerank, the native route: same answers but for clocks and ids."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            moving = ("created", "e2e_latency", "id", "response_sent_to_client_ts", "received_time")
            return {k: timeless(v) for k, v in value.items() if k not in moving}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    for method, path, body in (
        ("GET", "/health", None),
        ("GET", "/v1/models", None),
        ("GET", "/model_info", None),
        ("POST", "/v1/tokenize", {"prompt": "hello"}),
        ("POST", "/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
        ("POST", "/encode", {"text": ["one", "two"]}),
    ):
        stock, plugin = pair.both(method, path, body)
        assert plugin.status == stock.status, path
        if stock.body[:1] in (b"{", b"["):
            assert timeless(plugin.json) == timeless(stock.json), path


def test_the_last_layer_ends_with_the_pooled_tokens(pair: Pair, engine_python: Path, demo_model: Path) -> None:
    """Each text's vector as ever: alone, in a batch, with fewer dims; also where batches are merged."""
    log = pair.plugin_log.parent / "last_layer.log"
    environ = {
        "PYTHONPATH": str(log.parent / "site"), "OMP_NUM_THREADS": "1", "QWEN3EMB_PLUGIN_LAST_LAYER": "1",
        "QWEN3EMB_PLUGIN_AHEAD": "1",
    }  # fmt: skip
    texts = [f"text {i} " * (1 + 7 * i % 40) for i in range(40)]
    engine = start_engine(engine_python, demo_model, log, "--disable-radix-cache", environ=environ)
    with engine:
        for body in ({"input": texts[0]}, {"input": texts}, {"input": texts[3:20], "dimensions": 64}):
            found = call(engine.port, "POST", EMBEDDINGS, body, key=None)
            same_but_for_rounding(found, call(pair.stock, "POST", EMBEDDINGS, body))
        # Batches that are merged while they run, some with what only sampling would apply.
        asked = {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
        bodies = [{"text": texts[: 2 + n % 9], **({"sampling_params": asked} if n % 3 else {})} for n in range(60)]
        with ThreadPoolExecutor(12) as pool:
            answers = pool.map(lambda body: call(engine.port, "POST", "/encode", body, key=None).status, bodies)
            assert set(answers) == {200}
    lines = log.read_text()
    assert "the last layer ends with the pooled tokens" in lines
    assert "batches are launched ahead" in lines
    assert "share what sampling would need" in lines
    assert "stands aside" not in lines
    assert "the last layer" not in pair.plugin_log.read_text()


def test_clients_that_leave_are_forgotten(pair: Pair) -> None:
    """Connections closed in mid-request leave nothing running; the engine goes on answering and drains."""
    body = json.dumps({"input": [f"left {i}" for i in range(50)]}).encode()
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", pair.plugin, timeout=60)
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        connection.request("POST", EMBEDDINGS, body, headers)
        connection.close()
    stock, plugin = pair.both("POST", EMBEDDINGS, {"input": "still here"})
    assert plugin == stock
    loads = call(pair.plugin, "GET", "/v1/loads").json["loads"]
    assert all(load["num_waiting_reqs"] == 0 for load in loads)
