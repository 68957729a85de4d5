"""The gateway before the real SGLang on the CPU: proven vectors cold and warm. Killed engines: test_up_real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faulty_endpoint as faults
import numpy as np
import pytest
from faulty_endpoint import Exchange, Fault, faulty

from qwen3emb_launch.client import Client
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.tokens import TokenRules
from qwen3emb_launch.verify.runner import Request, verify
from qwen3emb_launch.verify.session import Options
from tests.conftest import Endpoint
from tests.test_gateway_process import Running, gateway, until

pytestmark = pytest.mark.engine


@contextmanager
def before(endpoint: Endpoint, tmp_path: Path, *argv: str) -> Iterator[Running]:
    with gateway(
        tmp_path, "--upstream", endpoint.base_url, "--model-path", str(endpoint.model), "--model", "demo", *argv,
    ) as running:  # fmt: skip
        until(lambda: running.call("/ready")[0] == 200, 60)
        yield running


def test_verify_level_full_passes_through_it_cold_and_warm(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    with before(demo_endpoint, tmp_path) as gw:
        for _ in range(2):
            argv = [sys.executable, "-m", "qwen3emb_launch", "verify", "--base-url", gw.base, "--level", "full",
                    "--no-transformers", "--max-latency", "10000", "--json"]  # fmt: skip
            ran = subprocess.run(argv, capture_output=True, text=True, timeout=400, check=False)
            failed = [c for c in json.loads(ran.stdout)["result"]["checks"] if c["verdict"] == "fail"]
            assert not failed, failed
            assert ran.returncode == 0
        metrics = gw.call("/metrics")[1].decode()
        assert 'cache_hits_total{level="memory"} 0' not in metrics


@pytest.mark.parametrize(
    ("fault", "checks"),
    [(faults.swaps_vectors, {"batch"}), (faults.older_model_one_in_twenty, {"steady", "batch", "faithful"})],
)
def test_verify_sees_an_engines_fault_through_it(
    demo_endpoint: Endpoint, tmp_path: Path, fault: Fault, checks: set[str]
) -> None:
    """A warm cache hides no fault of the engine behind: what `up` proves through the gateway is the engine.

    Which check meets the twentieth answer hangs on how the gateway put its calls together.
    """
    honest = threading.Event()
    honest.set()

    def later(exchange: Exchange) -> tuple[int, Any]:
        return exchange.forward() if honest.is_set() else fault(exchange)

    argv = ["--model-path", str(demo_endpoint.model), "--model", "demo"]
    with faulty(demo_endpoint.base_url, later) as url, gateway(tmp_path, "--upstream", url, *argv) as gw:
        until(lambda: gw.call("/ready")[0] == 200, 60)
        request = Request(gw.base, Options(max_latency=10_000), tmp_path / "w.json")
        assert verify(request)[0].passed
        honest.clear()
        assert checks & {c.id for c in verify(request)[0].failures}


def test_its_vectors_are_the_engines(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """Batched with others, sent as token ids, cut to fewer dims, from the cache or not: within what bf16 allows of the
    bare engine."""
    texts = ["short", "包裹没有到", "word " * 700, "🙂", "naïve café", "a\nb\tc"]
    with before(demo_endpoint, tmp_path) as gw, Client(gw.base) as ours, Client(demo_endpoint.base_url) as bare:
        for dims in (None, 64):
            wanted = np.array([bare.embed(t, dims=dims) for t in texts])
            for _ in range(2):
                got = np.array(ours.embed(texts, dims=dims))
                cosines = (got * wanted).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(wanted, axis=1)
                assert cosines.min() > 0.999
        assert "gets texts" not in gw.log.read_text()  # the engine was seen to make the same ids


def test_a_text_and_its_ids_are_one_vector_to_the_engine(demo_endpoint: Endpoint) -> None:
    """What the gateway counted it sends as ids: alone in a call, each gives the numbers of its text, all of them."""
    rules = TokenRules.from_model(demo_endpoint.model, context_length=None)
    with Client(demo_endpoint.base_url) as bare:
        for sample in rules.samples():
            by_text, by_ids = (
                bare.openai.embeddings.create(model="demo", input=one, encoding_format="float")
                for one in (sample.payload, sample.ids)
            )
            assert by_text.data[0].embedding == by_ids.data[0].embedding
            assert by_text.usage.prompt_tokens == by_ids.usage.prompt_tokens == sample.tokens


def test_lengths_are_enforced_before_the_engine(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """The last length that fits is served, the next refused with both numbers, or cut with its end token kept."""
    fits, over = "x" * (demo_endpoint.context_length - 2), "x" * (demo_endpoint.context_length - 1)
    with before(demo_endpoint, tmp_path) as gw, Client(gw.base) as client:
        assert len(client.embed(fits)) == 256
        with pytest.raises(InvalidInputError, match=r"8192 tokens.* 8191 fit"):
            client.embed(over)
    with before(demo_endpoint, tmp_path, "--overflow", "truncate") as gw, Client(gw.base) as client:
        answer = client.openai.embeddings.with_raw_response.create(model="demo", input=["fine", over + "tail"])
        assert answer.headers["x-qwen3emb-truncated"] == "1"
        cut = np.array(answer.parse().data[1].embedding)
        assert cut @ np.array(client.embed(fits)) > 0.999
