"""The gateway as its clients meet it, before an engine that gives every text its own vector."""

from __future__ import annotations

import asyncio
import base64
import gc
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import numpy as np
import orjson
import pytest
from tokenizers import Tokenizer

from qwen3emb_launch.demo_model import EOS_ID, make_demo_model
from qwen3emb_launch.gateway import tasks
from qwen3emb_launch.gateway.calls import token_flags
from qwen3emb_launch.gateway.request import EmbeddingRequest
from qwen3emb_launch.gateway.tokens import Prepared
from qwen3emb_launch.gateway.work import ESTIMATED, Item, Wait
from qwen3emb_launch.verify.runner import Request, open_session
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.tolerance import FP8_DISTANCE, Precision
from tests.gateway_bench import Bench, error, gateway, rows
from tests.null_engine import NullEngine, Served


def run(test) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_every_form_of_input_gets_its_own_vectors_in_order() -> None:
    """A text, texts, ids and lists of ids; float and base64; the answer's shape is OpenAI's."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            for inputs in ("one", ["one", "two", "one"], [5, 6, 7], [[5, 6], [7]]):
                single = isinstance(inputs, str) or isinstance(inputs[0], int)
                wanted = np.array([engine.vector(i) for i in ([inputs] if single else inputs)])
                for encoding in ("float", "base64"):
                    answer = await gw.post({"model": "null", "input": inputs, "encoding_format": encoding})
                    assert answer.status == 200, answer.body
                    assert np.array_equal(rows(answer), wanted)
                    body = orjson.loads(answer.body)
                    assert set(body) == {"object", "data", "model", "usage"}
                    assert body["model"] == "null"
                    assert isinstance(body["data"][0]["embedding"], str) == (encoding == "base64")

    run(main())


def test_fewer_dims_are_a_slice_brought_back_to_norm_1_cold_and_warm() -> None:
    async def main() -> None:
        engine = NullEngine(128)
        async with Served(engine) as served, gateway(served) as gw:
            full = engine.vector("text")
            for dims in (32, 100, 127, 128, 32):
                for _ in range(2):
                    got = (await gw.vectors("text", dimensions=dims))[0]
                    wanted = full[:dims] / np.linalg.norm(full[:dims]) if dims < 128 else full
                    assert np.allclose(got, wanted, atol=1e-7)
            assert engine.items == 2  # the probe and one text: every size came from the one cached vector

    run(main())


def test_answered_requests_leave_nothing_for_the_garbage_collector() -> None:
    """Texts, vectors and answers go with their request. Left in cycles they lie in memory until somebody looks for
    such, and every new one takes memory that no cache holds."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            gc.collect()
            gc.disable()
            try:
                await gw.vectors(["one", "two", "one"])
                await asyncio.gather(*(gw.vectors(f"text {i}") for i in range(20)))
                left = [type(found).__name__ for found in gc.get_objects() if isinstance(found, (Item, Wait, Prepared))]
            finally:
                gc.enable()
            assert left == []

    run(main())


async def left_behind(within: float = 20.0) -> list[str]:
    """What requests still lie in memory once their answers are there and the loop had its time to let go of them."""
    end = monotonic() + within
    while True:
        kinds = (Item, Wait, Prepared, EmbeddingRequest)
        left = [type(found).__name__ for found in gc.get_objects() if isinstance(found, kinds)]
        if not left or monotonic() > end:
            return left
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("answers", "text", "codes"),
    [
        (None, "REFUSE", {"engine_refused"}),
        ((400, b'{"message": "no"}'), "text", {"engine_refused"}),
        ((500, b"{}"), "text", {"engine_failed", "no_engine"}),  # whichever comes first
        ((503, b"{}"), "text", {"timeout"}),
        ("stopped", "text", {"no_engine"}),
    ],
)
def test_failed_requests_leave_nothing_for_the_garbage_collector(answers, text: str, codes: set[str]) -> None:
    """While an engine refuses, fails, is overloaded or away, clients repeat their texts: none is kept."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, timeout=0.5, hold=0.2) as gw:
            if answers == "stopped":
                await served.stop()
            else:
                engine.status = answers
            gc.collect()
            gc.disable()
            try:
                asked = [[f"{text} one", f"{text} two"], *(f"{text} {i}" for i in range(10))]
                bodies = [{"model": "null", "input": one} for one in asked]
                failed = await asyncio.gather(*map(gw.post, bodies))
                left = await left_behind()
            finally:
                gc.enable()
            assert {error(answer)["code"] for answer in failed} <= codes
            assert left == []

    run(main())


def test_what_is_to_be_refreshed_is_computed_again_and_kept() -> None:
    """A client that wants to know the engine, not the cache, says so; the next one gets what it got."""

    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            body = {"model": "null", "input": ["a", "b"]}
            await gw.post(body)
            calls = engine.calls
            fresh = await gw.post(body, **{"x-qwen3emb-cache": "refresh"})
            assert engine.calls > calls
            assert fresh.headers["x-qwen3emb-cache"] == "miss"
            assert np.array_equal(rows(fresh), [engine.vector(t) for t in "ab"])
            assert (await gw.post(body)).headers["x-qwen3emb-cache"] == "hit"

    run(main())


def test_hits_are_counted_per_item_and_shown() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            first = await gw.post({"model": "null", "input": ["a", "b"]})
            second = await gw.post({"model": "null", "input": ["b", "c", "a"]})
            third = await gw.post({"model": "null", "input": ["c", "b"]})
            assert [a.headers["x-qwen3emb-cache"] for a in (first, second, third)] == ["miss", "partial", "hit"]
            assert second.headers["x-qwen3emb-cache-hits"] == "2/3"
            assert np.array_equal(rows(second), [engine.vector(t) for t in "bca"])
            metrics = (await gw.request("GET", "/metrics")).body.decode()
            assert 'qwen3emb_cache_hits_total{level="memory"} 4' in metrics

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "bad_json", None),
        (b"{", 400, "bad_json", None),
        (b"[1]", 400, "bad_json", None),
        (b"\xff\xfe", 400, "bad_json", None),
        (b'{"model":"null","input":"\\ud800"}', 400, "bad_json", None),
        (b"[" * 5000, 400, "bad_json", None),
        ({"input": "x"}, 400, "bad_model", "model"),
        ({"model": 7, "input": "x"}, 400, "bad_model", "model"),
        ({"model": "gpt-4", "input": "x"}, 404, "model_not_found", "model"),
        ({"model": "null:nope", "input": "x"}, 404, "task_not_found", "model"),
        ({"model": "null:query:nobody", "input": "x"}, 400, "bad_role", "model"),
        ({"model": "null"}, 400, "bad_input", "input"),
        ({"model": "null", "input": None}, 400, "bad_input", "input"),
        ({"model": "null", "input": []}, 400, "empty_input", "input"),
        ({"model": "null", "input": {}}, 400, "bad_input", "input"),
        ({"model": "null", "input": 3}, 400, "bad_input", "input"),
        ({"model": "null", "input": [None]}, 400, "bad_input", "input"),
        ({"model": "null", "input": ""}, 400, "blank_input", "input"),
        ({"model": "null", "input": " \n\t\u3000"}, 400, "blank_input", "input"),
        ({"model": "null", "input": "a\x00b"}, 400, "nul_in_input", "input"),
        ({"model": "null", "input": ["a", 3]}, 400, "mixed_input", "input"),
        ({"model": "null", "input": ["a", [3]]}, 400, "mixed_input", "input"),
        ({"model": "null", "input": [[1], "a"]}, 400, "mixed_input", "input"),
        ({"model": "null", "input": [1, True]}, 400, "mixed_input", "input"),
        ({"model": "null", "input": [1, 2.5]}, 400, "mixed_input", "input"),
        ({"model": "null", "input": [[]]}, 400, "blank_input", "input"),
        ({"model": "null", "input": [-1]}, 400, "bad_token_id", "input"),
        ({"model": "null", "input": "x", "dimensions": 0}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": -1}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": 31}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": 65}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": 10**9}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": "256"}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": 64.5}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "dimensions": True}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null", "input": "x", "encoding_format": "hex"}, 400, "bad_encoding_format", "encoding_format"),
        ({"model": "null", "input": "x", "encoding_format": []}, 400, "bad_encoding_format", "encoding_format"),
        ({"model": "null", "input": "x", "user": 5}, 400, "bad_user", "user"),
        ({"model": "null", "input": "x", "dimension": 64}, 400, "unknown_field", "dimension"),
        ({"model": "null", "input": ["x"] * 2049}, 400, "too_many_items", "input"),
        ({"model": "null", "input": ["x"] * 100_000}, 400, "too_many_items", "input"),
        ({"model": "null:faq_match", "input": "x"}, 400, "bad_dimensions", "dimensions"),
        ({"model": "null:query", "input": [1, 2]}, 400, "ids_with_task", "input"),
    ],
    ids=lambda v: str(v)[:40] if not isinstance(v, (int, type(None))) else None,
)
def test_what_is_wrong_is_a_4xx_in_openai_form_and_the_next_request_is_served(
    body: object, status: int, code: str, param: str | None
) -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            answer = await gw.post(body)
            found = error(answer)
            assert (answer.status, found["code"], found["param"]) == (status, code, param)
            assert found["source"] == "gateway"
            assert engine.items == 1  # the probe: nothing of it reached the engine
            assert (await gw.vectors("fine")).shape == (1, 64)

    run(main())


def test_a_bad_item_is_named_by_its_index() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            found = error(await gw.post({"model": "null", "input": ["a", "b", " ", "c"]}))
            assert found["index"] == 2
            assert found["message"].startswith("input[2]")

    run(main())


def test_a_bad_item_keeps_its_index_where_its_neighbours_were_cached() -> None:
    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            await gw.vectors(["a", "b"])
            answer = await gw.post({"model": "null", "input": ["a", "b", "c", "REFUSE this", "d"]})
            assert (answer.status, error(answer)["index"]) == (400, 3)
            assert error(answer)["message"].startswith("input[3]: ")

    run(main())


def test_a_huge_request_lets_others_through() -> None:
    """Looked up and answered in steps, though everything it wants is cached; ids are checked on a thread."""

    async def main() -> None:
        engine = NullEngine(2560)
        async with Served(engine) as served, gateway(served, timeout=60.0) as gw:
            texts = [f"t{i}" for i in range(1000)]
            await gw.vectors(texts, encoding_format="base64")
            huge = asyncio.create_task(gw.post({"model": "null", "input": texts}))
            async with asyncio.timeout(60):
                while not any(c._busy for c in gw.service.server.connections):
                    await asyncio.sleep(0)
            assert np.array_equal(await gw.vectors("t1"), [engine.vector("t1")])
            assert not huge.done()
            assert np.array_equal(rows(await huge), [engine.vector(t) for t in texts])
            ids = [[i, 7] for i in range(40)]
            assert np.array_equal(await gw.vectors(ids), [engine.vector(i) for i in ids])

    run(main())


def item(tokens: int, *waits: object, exact: bool = False) -> Item:
    made = Item(b"", Prepared("x", tokens, exact))
    made.waiters = [(wait, 0) for wait in waits]  # type: ignore[misc]
    return made


def test_an_engines_total_is_dealt_out_where_nobody_could_count() -> None:
    one, two = object(), object()
    assert token_flags([item(5, one), item(15, one)], 40) == [(10 | ESTIMATED, 10), (30 | ESTIMATED, 30)]
    assert token_flags([item(5, one), item(15, two)], 40) == [(10 | ESTIMATED,) * 2, (30 | ESTIMATED,) * 2]
    assert token_flags([item(5, one), item(15, two, exact=True)], 40) == [(25, 25), (15, 15)]
    assert token_flags([item(5, one)], 7) == [(7, 7)]
    assert token_flags([item(5, one)], 0) == [(5 | ESTIMATED,) * 2]
    parts = token_flags([item(n, one) for n in (3, 1, 4, 1, 5)], 101)
    assert sum(told for _, told in parts) == 101


def test_usage_is_the_engines_where_a_call_was_one_requests() -> None:
    """Without a tokenizer, and without a cache that would keep parts of it."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, cache_bytes=0) as gw:
            answer = await gw.post({"model": "null", "input": ["one two three", "x", "y z"]})
            assert orjson.loads(answer.body)["usage"]["total_tokens"] == 9
            assert "x-qwen3emb-usage" not in answer.headers

    run(main())


def test_an_engines_refusal_is_found_in_its_batch_and_rewritten_without_paths() -> None:
    """One bad item among many: it is named, the engine's file paths are gone, requests batched with it are served."""

    async def main() -> None:
        engine = NullEngine(64, delay=0.01)
        async with Served(engine) as served, gateway(served, calls=1) as gw:
            inputs = [f"text {i}" for i in range(40)]
            inputs[23] = "REFUSE this"
            bad, good = await asyncio.gather(
                gw.post({"model": "null", "input": inputs}), gw.vectors([f"other {i}" for i in range(20)])
            )
            found = error(bad)
            assert (bad.status, found["source"], found["index"]) == (400, "engine", 23)
            assert "/usr" not in found["message"]
            assert "<path>" in found["message"]
            assert np.array_equal(good, [engine.vector(f"other {i}") for i in range(20)])

    run(main())


def test_routes_methods_and_unknown_paths() -> None:
    """The engine's own routes are not reachable, with or without path tricks."""

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served) as gw:
            paths = (
                "/", "/flush_cache", "/update_weights_from_disk", "/v1/embeddings/", "/v1/../flush_cache",
                "//v1/embeddings", "/v1/embeddings%2f", "/v1/chat/completions", "/generate", "/v1/models/x",
                "/v1/models/x:task:role",
            )  # fmt: skip
            for path in paths:
                answer = await gw.request("GET" if path.startswith("/v1/models/") else "POST", path, b"{}")
                assert answer.status == 404, path
                assert error(answer)["source"] == "gateway"
            assert (await gw.request("GET", "/v1/embeddings")).status == 405
            assert (await gw.request("DELETE", "/v1/models")).status == 405
            models = orjson.loads((await gw.request("GET", "/v1/models")).body)
            assert {"null", "null:query", "null:faq_match"} <= {m["id"] for m in models["data"]}
            assert orjson.loads((await gw.request("GET", "/v1/models/null")).body)["id"] == "null"
            assert (await gw.request("GET", "/health")).status == 200
            assert (await gw.request("GET", "/ready")).status == 200
            head = await gw.request("HEAD", "/health")
            assert (head.status, head.body) == (200, b"")
            assert "openapi" in orjson.loads((await gw.request("GET", "/openapi.json")).body)

    run(main())


def test_tasks_choose_instruction_and_dims() -> None:
    async def main() -> None:
        engine = NullEngine(256)
        async with Served(engine) as served, gateway(served) as gw:
            answer = await gw.post({"model": "null:faq_match", "input": "lost parcel"})
            sent = engine.bodies[-1]["input"]
            assert rows(answer).shape == (1, 128)
            assert sent[0].startswith("Instruct: ")
            assert sent[0].endswith("\nQuery:lost parcel")
            documents = await gw.post({"model": "null:faq_match:document", "input": "lost parcel"})
            assert engine.bodies[-1]["input"] == ["lost parcel"]
            assert rows(documents).shape == (1, 128)
            by_header = await gw.post({"model": "null", "input": "lost parcel"}, x_embedding_task="faq_match")
            assert by_header.headers["x-qwen3emb-cache"] == "hit"
            assert np.array_equal(rows(by_header), rows(answer))
            alone = await gw.post({"model": "null", "input": "lost parcel"}, x_embedding_role="query")
            assert (alone.status, error(alone)["code"]) == (404, "task_not_found")
            assert (await gw.post({"model": "null", "input": "x"}, x_embedding_role="document")).status == 200
            own_dims = await gw.post({"model": "null:faq_match", "input": "lost parcel", "dimensions": 64})
            assert rows(own_dims).shape == (1, 64)
            assert base64.b64encode(rows(answer).tobytes())  # finite numbers, float32

    run(main())


def test_nobody_waits_while_a_table_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "tasks.yaml"
    table.write_text("schema: 1\ntasks: {mine: {dims: 32, role: document}}\n")
    reading, go_on, load = threading.Event(), threading.Event(), tasks.load

    def slowly(path: Path | None) -> tasks.TaskTable:
        reading.set()
        assert go_on.wait(30)
        return load(path)

    async def main() -> None:
        async with Served(NullEngine(64)) as served, gateway(served, tasks_file=str(table)) as gw:
            monkeypatch.setattr(tasks, "load", slowly)
            table.write_text("schema: 1\ntasks: {mine: {dims: 48, role: document}}\n")
            reloaded = asyncio.create_task(gw.service.reload())
            assert await asyncio.to_thread(reading.wait, 30)
            assert (await gw.vectors("x")).shape == (1, 64)
            assert rows(await gw.post({"model": "null:mine", "input": "x"})).shape == (1, 32)
            go_on.set()
            await reloaded
            assert rows(await gw.post({"model": "null:mine", "input": "x"})).shape == (1, 48)

    run(main())


def test_the_context_length_is_the_engines_own_unless_told(tmp_path: Path) -> None:
    """An engine started with less than its model could take: the gateway holds to that, not to the model's config, and
    names no length before it knows."""
    folder = make_demo_model(tmp_path / "demo")

    async def main() -> None:
        async with gateway(model_path=str(folder), models=("demo",), wait=False) as gw:
            assert b"max_input_tokens" not in (await gw.request("GET", "/v1/models")).body
        async with Served(NullEngine(64, max_model_len=100)) as served:
            for told, longest in ((None, 99), (50, 49)):
                async with gateway(served, model_path=str(folder), context_length=told) as gw:
                    listed = orjson.loads((await gw.request("GET", "/v1/models")).body)["data"]
                    assert {m["max_input_tokens"] for m in listed} == {longest}
                    assert (await gw.post({"model": "null", "input": "a" * (longest - 1)})).status == 200
                    refused = await gw.post({"model": "null", "input": "a" * longest})
                    assert (refused.status, error(refused)["code"]) == (400, "context_length_exceeded")
                    async with gateway(f"http://127.0.0.1:{gw.service.port}/v1", model_path=str(folder)) as before_it:
                        listed = orjson.loads((await before_it.request("GET", "/v1/models")).body)["data"]
                        assert {m["max_input_tokens"] for m in listed} == {longest}

    run(main())


def test_what_the_engines_compute_in_is_told_and_verify_goes_by_it(tmp_path: Path) -> None:
    """SGLang's own word, for every name, without anything else that it says there; engines that disagree, say nothing
    or break off are told nothing of, and serve all the same."""
    folder = make_demo_model(tmp_path / "demo")  # its config.json says bfloat16

    async def seen(gw: Bench) -> tuple[dict[str, str], Precision]:
        answer = await gw.request("GET", "/v1/models")
        assert b"secret" not in answer.body
        told = [{k: m[k] for k in ("dtype", "quantization") if k in m} for m in orjson.loads(answer.body)["data"]]
        assert all(one == told[0] for one in told)
        one = orjson.loads((await gw.request("GET", "/v1/models/null")).body)
        assert told[0].items() <= one.items()
        url = f"http://127.0.0.1:{gw.service.port}/v1"
        session = await asyncio.to_thread(open_session, Request(url, Options(), tmp_path / "w.json", folder=folder))
        session.contact.close()
        return told[0], session.precision

    async def main() -> None:
        quantised, plain = NullEngine(64), NullEngine(64)
        quantised.info = {"dtype": "bfloat16", "quantization": "fp8", "admin_api_key": "secret"}
        plain.info = {"dtype": "float16", "quantization": None}
        async with Served(quantised) as one, Served(plain) as other:
            async with gateway(one) as gw:
                told, precision = await seen(gw)
                assert told == {"dtype": "bfloat16", "quantization": "fp8"}
                assert (precision.dtype, precision.quantised) == ("bfloat16", "fp8")
                assert str(precision).startswith("bfloat16, fp8 weights (the gateway says)")
                assert precision.distance == FP8_DISTANCE
            async with gateway(other) as gw:
                told, precision = await seen(gw)
                assert told == {"dtype": "float16"}
                assert (precision.dtype, precision.quantised) == ("float16", None)
            async with gateway(one, other) as gw:
                assert (await seen(gw))[0] == {}
            for nothing in ({}, {"dtype": "auto", "quantization": 8}, None):
                quantised.info = nothing
                async with gateway(one) as gw:
                    told, precision = await seen(gw)
                    assert told == {}
                    assert (precision.origin, precision.quantised) == ("the checkpoint's", None)

    run(main())


@pytest.mark.parametrize("same", [True, False])
def test_an_engine_that_makes_the_same_ids_gets_ids_any_other_one_texts(tmp_path: Path, same: bool) -> None:
    """Proved on sample texts first; what clients see is the same."""
    folder = make_demo_model(tmp_path / "demo")
    texts = ["how do I return a parcel?", "包裹没有到怎么办"]

    async def main() -> None:
        engine = NullEngine(64)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if same:
            engine.decode = lambda ids: tokenizer.decode(ids[:-1], skip_special_tokens=False)
        async with Served(engine) as served, gateway(served, model_path=str(folder)) as gw:
            assert gw.service.pool.up[0].takes_ids == same
            engine.bodies.clear()
            assert np.allclose(await gw.vectors(texts), [engine.vector(t) for t in texts])
            sent = engine.bodies[-1]["input"]
            assert sent == ([[*t.encode(), EOS_ID] for t in texts] if same else texts)

    run(main())


def test_whether_it_was_cut_is_said_of_each_list_of_ids(tmp_path: Path) -> None:
    """A list that was cut and one that fits may be the same ids to the engine, and share a vector."""
    folder = make_demo_model(tmp_path / "demo")

    async def main() -> None:
        settings = {"model_path": str(folder), "context_length": 10, "overflow": "truncate"}
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served, **settings) as gw:
            for token, counts in ((65, (8, 20, 8)), (66, (20, 8, 20))):  # eight and the end token fit
                asked = engine.items
                for count in counts:
                    answer = await gw.post({"model": "null", "input": [token] * count})
                    assert ("x-qwen3emb-truncated" in answer.headers) == (count == 20)
                assert engine.items == asked + 1
            both = await gw.post({"model": "null", "input": [[67] * 8, [67] * 20]})
            assert both.headers["x-qwen3emb-truncated"] == "1"

    run(main())


@pytest.mark.parametrize(("context", "overflow"), [(20, "truncate"), (60, "truncate"), (10, "refuse")])
def test_a_text_that_an_earlier_run_cut_otherwise_is_embedded_anew(tmp_path: Path, context: int, overflow: str) -> None:
    """The cache on disk outlives `--overflow` and the context length; where they are the same, it answers."""
    folder = make_demo_model(tmp_path / "demo")
    kept = {"model_path": str(folder), "disk_cache": str(tmp_path / "vectors.db")}

    async def main() -> None:
        engine = NullEngine(64, max_model_len=100)
        async with Served(engine) as served:
            for _ in range(2):
                async with gateway(served, context_length=10, overflow="truncate", **kept) as gw:
                    asked = engine.items
                    answer = await gw.post({"model": "null", "input": "a" * 40})
                    assert answer.headers["x-qwen3emb-truncated"] == "0"
            assert engine.items == asked
            async with gateway(served, context_length=context, overflow=overflow, **kept) as gw:
                asked = engine.items
                answer = await gw.post({"model": "null", "input": "a" * 40})
                assert answer.status == (400 if overflow == "refuse" else 200)
                assert ("x-qwen3emb-truncated" in answer.headers) == (context == 20)
                assert engine.items == asked + (overflow == "truncate")

    run(main())


def test_a_requests_parts_are_its_time() -> None:
    """Of several calls, or of one that was joined under way: queue, engine and gateway add up to the total."""

    async def main() -> None:
        engine = NullEngine(64, delay=0.2, serial=True)
        async with Served(engine) as served, gateway(served, calls=1, batch_items=2) as gw, lateness() as late:
            first = asyncio.create_task(gw.post({"model": "null", "input": [f"t{i}" for i in range(6)]}))
            async with asyncio.timeout(10):
                while not gw.service.endpoint.model.batcher.in_air:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.1)
            assert (await gw.post({"model": "null", "input": "t0"})).status == 200
            await first
            sums = {part: h.sum for part, h in gw.service.metrics.seconds.items()}
            assert sums["queue"] + sums["engine"] + sums["gateway"] == pytest.approx(sums["total"], rel=1e-6)
            assert sums["gateway"] < 0.2 + 2 * sum(late)  # a machine that stands still does so for both requests

    run(main())


@asynccontextmanager
async def lateness() -> AsyncIterator[list[float]]:
    """By how many seconds this loop's timers come late meanwhile."""
    found: list[float] = []

    async def beat() -> None:
        while True:
            due = monotonic() + 0.01
            await asyncio.sleep(0.01)
            found.append(monotonic() - due)

    beating = asyncio.create_task(beat())
    try:
        yield found
    finally:
        beating.cancel()


def test_an_engine_that_refuses_ids_gets_texts(tmp_path: Path) -> None:
    folder = make_demo_model(tmp_path / "demo")

    async def main() -> None:
        engine = NullEngine(64)
        whole = engine.embed

        async def embed(body: bytes) -> tuple[int, bytes]:
            if isinstance(orjson.loads(body)["input"][0], list):
                return 400, b'{"message": "send text"}'
            return await whole(body)

        engine.embed = embed  # type: ignore[method-assign]
        async with Served(engine) as served, gateway(served, model_path=str(folder)) as gw:
            assert np.allclose(await gw.vectors("a parcel"), [engine.vector("a parcel")])

    run(main())
