"""`tune` on the real engine, in small: a baseline, a setting that the planner refuses, one that is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwen3emb_launch import state
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.profile_files import load

pytestmark = pytest.mark.engine


@pytest.mark.xdist_group("profile_started")
def test_a_tiny_space_is_tried_on_the_real_engine(engine_python: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each trial is served, proven and measured; the profile carries the figures; nothing runs afterwards."""
    if "QWEN3EMB_TEST_ENGINE_PYTHON" in os.environ:
        monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
        assert run(["engine", "install", "--python", str(engine_python), "--name", "cpu", "--json"]) == 0
        capsys.readouterr()
    space, out = tmp_path / "space.yaml", tmp_path / "mine.yaml"
    space.write_text("tokenizer_workers: [2]\nsleep_on_idle: [true, false]\n")
    words = ["tune", "--profile", "demo", "--goal", "latency", "--space", str(space), "-c", "1", "-d", "2s"]
    status = run([*words, "--warmup", "0.5s", "--rounds", "0", "--budget", "10m", "--out", str(out), "--json"])
    envelope = json.loads(capsys.readouterr().out)
    assert status == 0, envelope
    result = envelope["result"]
    tried = {t["label"]: t for t in result["trials"]}
    assert {name: t["status"] for name, t in tried.items()} == {
        "baseline": "ok",
        "tokenizer_workers=2": "refused",
        "sleep_on_idle=true": "same",
        "sleep_on_idle=false": "ok",
    }
    assert tried["tokenizer_workers=2"]["code"] == "known_bad"
    moved = tried["sleep_on_idle=false"]
    assert moved["proof"]["passed"]
    assert moved["proof"]["cosine"] > 0.999
    assert moved["proof"]["fingerprint"] == tried["baseline"]["proof"]["fingerprint"]
    assert moved["measurements"][0]["texts_per_s"] > 0
    assert moved["measurements"][0]["memory_bytes"] > 100 << 20
    profile = load(str(out))
    assert profile.evidence != "none"
    assert profile.evidence[0].unit == "texts/s"
    assert profile.evidence[0].command.startswith("qwen3emb bench --profile ./mine.yaml --concurrency 1")
    assert not [i for i in state.instances() if i.running or i.temporary]
