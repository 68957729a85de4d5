"""`bench` on the real engine: exact token counts, figures that add up, the seed's table in small."""

from __future__ import annotations

import json
import os

import pytest

from qwen3emb_launch import state
from qwen3emb_launch.bench.target import Target, Work, prepare
from qwen3emb_launch.cli.app import run

pytestmark = pytest.mark.engine


def command(capsys, *args: str) -> tuple[int, dict]:
    """Run `qwen3emb ARGS --json` in this process: (exit status, envelope)."""
    status = run([*args, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("tokens", [8, 33, 513])
def test_texts_have_the_token_count_asked_for_on_the_real_tokenizer(demo_endpoint, tokens) -> None:
    """The engine's own usage agrees: calibration is exact and the rehearsal has nothing to warn of."""
    ready = prepare(Target("demo", demo_endpoint.base_url), Work(tokens=str(tokens), batch=2))
    assert ready.spec.vocabulary is not None
    assert ready.spec.vocabulary.exact
    assert not [note for note in ready.notes if "meant to have" in note]


def test_a_closed_loop_measures_the_real_engine(demo_endpoint, capsys) -> None:
    """Little's law holds: clients = rate x mean latency; every answer is right; tokens are as asked."""
    status, envelope = command(
        capsys, "bench", "--base-url", demo_endpoint.base_url, "-c", "4", "-d", "4s", "--warmup", "1s", "--dims", "64"
    )
    assert status == 0
    found = envelope["result"]["runs"][0]["figures"]
    assert found["failed"] == {}
    assert found["tokens_per_text"] == 33
    edges = found["latency"]["max"] / 1000 / found["seconds"]  # what is in flight when the window begins and ends
    assert found["requests_per_s"] * found["latency"]["mean"] / 1000 == pytest.approx(4, rel=0.1 + edges)
    assert envelope["result"]["targets"][0]["dims"] == 64


def test_dims_that_the_engine_refuses_are_an_input_error(demo_endpoint, capsys) -> None:
    """The demo has 256 dimensions; 512 is refused before any load, in the engine's words."""
    status, envelope = command(capsys, "bench", "--base-url", demo_endpoint.base_url, "--dims", "512")
    assert (status, envelope["error"]["code"]) == (2, "dims_refused")


def test_a_text_over_the_context_is_refused_before_any_load(demo_endpoint, tmp_path, capsys) -> None:
    """One token more than fits is the engine's 400, named as ours, with the option that helps."""
    over = demo_endpoint.context_length + 1
    status, envelope = command(capsys, "bench", "--base-url", demo_endpoint.base_url, "--tokens", str(over))
    assert (status, envelope["error"]["code"]) == (2, "text_refused")
    assert "--tokens" in envelope["error"]["hint"]
    corpus = tmp_path / "long.txt"
    corpus.write_text("word " * over)
    status, envelope = command(capsys, "bench", "--base-url", demo_endpoint.base_url, "--corpus", str(corpus))
    assert (status, envelope["error"]["code"]) == (2, "text_refused")
    assert "corpus" in envelope["error"]["hint"]


def test_an_unknown_model_name_is_not_hidden(demo_endpoint, capsys) -> None:
    """SGLang answers any name, so the bench runs; the record keeps the name that was asked for."""
    status, envelope = command(
        capsys, "bench", "--base-url", demo_endpoint.base_url, "--model", "other", "-d", "1s", "--warmup", "0"
    )
    assert status == 0
    assert envelope["result"]["targets"][0]["model"] == "other"


def test_the_seeds_table_in_small(demo_endpoint, capsys) -> None:
    """Every claim has its row with what was measured; dims beyond the model's are said to be so."""
    status, envelope = command(
        capsys, "bench", "--base-url", demo_endpoint.base_url, "--preset", "seed", "-d", "0.5s", "--warmup", "0.1s",
        "--timeout", "300s",
    )  # fmt: skip
    assert status == 0
    claims = {c["claim"]: c for c in envelope["result"]["claims"]}
    assert len(claims) == 7
    assert all(c["measured"] for name, c in claims.items() if not name.startswith(("512 dims", "2560 dims")))
    assert "256 dimensions" in claims["2560 dims: storage of a vector against 2048"]["verdict"]
    assert "3.1 s" in claims["batch of 32 x 2048 tokens, 4B on an RTX 4090"]["verdict"]


@pytest.mark.xdist_group("profile_started")
def test_a_profile_is_started_for_the_run_and_stopped_after_it(engine_python, tmp_path, monkeypatch, capsys) -> None:
    """`--profile demo` serves, is measured with its facts in the record, and nothing runs afterwards."""
    if "QWEN3EMB_TEST_ENGINE_PYTHON" in os.environ:
        monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
        assert run(["engine", "install", "--python", str(engine_python), "--name", "cpu", "--json"]) == 0
        capsys.readouterr()
    status, envelope = command(capsys, "bench", "--profile", "demo", "-d", "2s", "--warmup", "0.5s", "-c", "2")
    assert status == 0
    (target,) = envelope["result"]["targets"]
    assert target["facts"]["engine"].startswith("sglang ")
    assert target["facts"]["profile_hash"]
    assert target["fingerprint"]["complete"]
    assert target["fingerprint"]["parts"]["dims"] == 256
    assert envelope["result"]["runs"][0]["rss"] > 100 << 20
    assert not [i for i in state.instances() if i.running or i.temporary]
