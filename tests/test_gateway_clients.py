"""The real OpenAI client, and ours over it, against a gateway before a null engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest

from qwen3emb_launch.client import AsyncClient, Client
from qwen3emb_launch.errors import InvalidInputError, NetworkError
from qwen3emb_launch.instructions import instruct
from tests.gateway_bench import gateway
from tests.null_engine import NullEngine, Served, in_thread


@contextmanager
def served_gateway(engine: NullEngine, **settings: object) -> Iterator[str]:
    """A gateway in a thread of its own; its base URL."""
    loop, ready, url = asyncio.new_event_loop(), threading.Event(), []
    stop = asyncio.Event()

    async def main() -> None:
        async with Served(engine) as served, gateway(served, **settings) as gw:
            url.append(f"http://127.0.0.1:{gw.service.port}/v1")
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)


@pytest.fixture(scope="module")
def engine() -> NullEngine:
    return NullEngine(256)


@pytest.fixture(scope="module")
def url(engine: NullEngine) -> Iterator[str]:
    with served_gateway(engine) as address:
        yield address


def test_the_openai_client_works_unchanged(engine: NullEngine, url: str) -> None:
    """It asks for base64 by default; errors become its own exceptions."""
    with openai.OpenAI(
        base_url=url, api_key="x", http_client=openai.DefaultHttpxClient(trust_env=False), max_retries=0
    ) as client:
        answer = client.embeddings.create(model="null", input=["a", "b"], user="somebody")
        assert np.allclose([d.embedding for d in answer.data], [engine.vector("a"), engine.vector("b")])
        floats = client.embeddings.create(model="null", input="a", encoding_format="float", dimensions=64)
        assert len(floats.data[0].embedding) == 64
        assert answer.usage.prompt_tokens > 0
        assert "null:query" in [m.id for m in client.models.list()]
        assert client.models.retrieve("null").id == "null"
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="null", input=["a", " "])
        assert caught.value.param == "input"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="other", input="a")


def test_a_key_is_asked_for_and_never_shown(engine: NullEngine, tmp_path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-alice\nroot sk-root admin\n")
    with served_gateway(engine, keys_file=str(keys)) as address:
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(base_url=address, api_key="wrong", http_client=http, max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.embeddings.create(model="null", input="a")
            assert "wrong" not in str(caught.value)
            alice = client.with_options(api_key="sk-alice")
            assert alice.embeddings.create(model="null", input="a").data
        root = address.removesuffix("/v1")
        plain = httpx.Client(trust_env=False)
        statuses = {
            key: plain.get(f"{root}/metrics", headers={"authorization": f"Bearer {key}"}).status_code
            for key in ("sk-alice", "sk-root", "x")
        }
        assert statuses == {"sk-alice": 403, "sk-root": 200, "x": 401}
        assert plain.get(f"{root}/health").status_code == 200


def test_our_client_uses_the_gateways_tasks(engine: NullEngine, url: str) -> None:
    with Client(url) as client:
        assert np.allclose(client.embed("a"), engine.vector("a"))
        assert np.allclose(client.embed(["a", "b"], task="document"), [engine.vector("a"), engine.vector("b")])
        assert np.allclose(client.embed("a", task="query"), engine.vector(instruct("a", "query")))
        assert len(client.embed("a", task="faq_match")) == 128
        assert len(client.embed("a", task="faq_match", dims=64)) == 64
        free = "Given a title, find the book"
        assert np.allclose(client.embed("a", task=free), engine.vector(instruct("a", free)))
        many = [f"t{i}" for i in range(600)]
        assert np.allclose(client.embed(many), [engine.vector(t) for t in many])
        with pytest.raises(InvalidInputError, match="did you mean 'query'"):
            client.embed("a", task="qeury")
        with pytest.raises(InvalidInputError, match="blank"):
            client.embed(" ")


def test_our_client_uses_the_gateways_tasks_under_any_of_its_names(engine: NullEngine) -> None:
    """Aliases are listed for the first name only, and count for all: the dims, not only the instruction, are theirs."""
    with served_gateway(engine, models=("null", "second")) as url, Client(url, model="second") as client:
        assert len(client.embed("a", task="faq_match")) == 128
        assert np.allclose(client.embed("a", task="query"), engine.vector(instruct("a", "query")))


def test_our_client_waits_for_no_model_but_says_so(engine: NullEngine) -> None:
    """A gateway that was started before its engine lists nothing yet; the same client works once it does."""
    with served_gateway(engine) as url, Client(url) as client:
        listed = client.openai.models.list
        client.openai.models.list = list  # type: ignore[assignment, method-assign]
        with pytest.raises(NetworkError, match="serves no model yet"):
            client.embed("a")
        client.openai.models.list = listed  # type: ignore[method-assign]
        assert np.allclose(client.embed("a"), engine.vector("a"))


def test_our_client_applies_the_instruction_itself_before_a_bare_engine() -> None:
    bare = NullEngine(64)
    with in_thread(bare) as served:

        async def main() -> None:
            async with AsyncClient(served.url) as client:
                assert np.allclose(await client.embed("a", task="query"), bare.vector(instruct("a", "query")))
                assert np.allclose(await client.embed(["a"]), [bare.vector("a")])
                with pytest.raises(InvalidInputError):
                    await client.embed("a", task="qeury")

        asyncio.run(main())


def test_a_silent_endpoint_is_a_network_error() -> None:
    client = Client("http://127.0.0.1:9/v1", timeout=2)
    client.openai = client.openai.with_options(max_retries=0)
    with pytest.raises(NetworkError) as caught:
        client.embed("a")
    assert caught.value.hint
