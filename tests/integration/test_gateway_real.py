"""The gateway before the real SGLang on the CPU: proven vectors cold and warm, and nothing lost when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qwen3emb_launch.client import Client
from qwen3emb_launch.errors import InvalidInputError
from tests.conftest import Endpoint, start_engine
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


def test_an_engine_killed_under_load_costs_no_request_and_no_wrong_vector(
    engine_python: Path, demo_model: Path, tmp_path: Path
) -> None:
    """SIGKILL to the whole engine; another one starts on the same port; every request is answered with its vector."""
    first = start_engine(engine_python, demo_model, tmp_path / "one.log")
    texts = [f"text number {i}, about {'cats' if i % 2 else 'ships'}" for i in range(40)]
    with first as endpoint, before(endpoint, tmp_path, "--cache-bytes", "0", "--hold", "240", "--timeout", "300") as gw:
        with Client(gw.base) as client:
            wanted = np.array(client.embed(texts))
        stop, failed, served = threading.Event(), [], []

        def load(number: int) -> None:
            with Client(gw.base, timeout=300) as client:
                client.openai = client.openai.with_options(max_retries=0)
                i = number
                while not stop.is_set():
                    try:
                        got = np.array(client.embed(texts[i % 40]))
                        served.append(float(got @ wanted[i % 40]))
                    except Exception as exc:  # noqa: BLE001 - whatever a client would see is a failure
                        failed.append(repr(exc))
                    i += 7

        threads = [threading.Thread(target=load, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        try:
            _until_served(served, 50)
            os.killpg(endpoint.pid, signal.SIGKILL)
            first.process.wait(30)
            again = start_engine(engine_python, demo_model, tmp_path / "two.log")
            again.port = first.port
            again.argv[again.argv.index("--port") + 1] = str(first.port)
            with again:
                _until_served(served, len(served) + 100)
                stop.set()
                for thread in threads:
                    thread.join(300)
        finally:
            stop.set()
        assert not failed
        assert min(served) > 0.999
        assert json.loads(gw.call("/ready")[1])["upstreams"] == 1


def _until_served(served: list[float], count: int) -> None:
    done = threading.Event()
    deadline = 240.0
    while len(served) < count and deadline > 0:
        done.wait(0.1)
        deadline -= 0.1
    assert len(served) >= count, "the load does not get through"
