"""The GPU benchmark's harness, tried without a GPU: two engines started, asked, loaded in turn, recorded, stopped."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import free_port

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("gpu_harness")]

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["one", "another text, and a longer one", "向量 检索 🙂"]


@pytest.fixture
def first() -> int:
    return free_port()


@pytest.fixture
def harness(engine_python: Path, tmp_path: Path, first: int) -> Any:
    """`harness(action, option...)`: its output; what it started is stopped afterwards."""

    def run(action: str, *options: str) -> str:
        found = subprocess.run(
            [sys.executable, ROOT / "benchmarks/gpu/harness.py", action, ROOT / "benchmarks/gpu/demo.yaml",
             "--out", tmp_path, "--only", "ours,transformers", "--first-port", str(first), *options],
            env={**os.environ, "ENGINE": str(engine_python), "PLUGIN": str(ROOT / "engine_plugin")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[-3000:]
        return found.stdout

    yield run
    run("stop")


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def vectors(port: int, model: str) -> list[list[float]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings",
        data=json.dumps({"model": model, "input": TEXTS, "dimensions": 64}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [item["embedding"] for item in json.load(answer)["data"]]


def test_engines_are_compared_and_their_vectors_are_the_same(harness: Any, tmp_path: Path) -> None:
    """The transformers server beside ours: one vector for one text, a record of both, and nothing left running."""
    harness("serve")
    servers = {s["name"]: s for s in json.loads((tmp_path / "servers.json").read_text())}
    ours, baseline = (vectors(servers[name]["port"], str(tmp_path / "demo")) for name in ("ours", "transformers"))
    for one, other in zip(ours, baseline, strict=True):
        assert len(one) == len(other) == 64
        lengths = math.hypot(*one) * math.hypot(*other)  # bfloat16's are near 1
        assert sum(a * b for a, b in zip(one, other, strict=True)) / lengths > 0.9999

    page = harness("load", "--loads", "short-16", "--rounds", "1", "--seconds", "1")
    record = json.loads((tmp_path / "demo.json").read_text())
    assert {r["server"] for r in record["raw"]} == {"ours", "transformers"}
    assert all(r["errors"] == 0 and r["texts_per_s"] > 0 for r in record["raw"])
    assert "| transformers |" in page
    harness("stop")
    assert not any(runs(s["pid"]) for s in servers.values())


def test_a_port_that_is_taken_is_no_ready_server(harness: Any, first: int, tmp_path: Path) -> None:
    """What answers there would be measured under another name."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        assert f"port {first} is taken" in harness("serve", "--together")
    left = json.loads((tmp_path / "servers.json").read_text())
    assert [s["name"] for s in left] == ["transformers"]
