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
from small_endpoint import SmallEndpoint, serving

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
             "--out", tmp_path, "--first-port", str(first), *options],
            env={**os.environ, "ENGINE": str(engine_python), "PLUGIN": str(ROOT / "engine_plugin"),
                 "QWEN3EMB": str(Path(sys.executable).with_name("qwen3emb"))},
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
    """Ours, alone and behind `up`, and transformers: one vector for one text, a record of all, nothing left running."""
    harness("serve", "--together", "--only", "ours,stack,transformers")
    servers = {s["name"]: s for s in json.loads((tmp_path / "servers.json").read_text())}
    baseline = vectors(servers["transformers"]["port"], "demo")
    for name in ("ours", "stack"):
        for one, other in zip(vectors(servers[name]["port"], "demo"), baseline, strict=True):
            assert len(one) == len(other) == 64
            lengths = math.hypot(*one) * math.hypot(*other)  # bfloat16's are near 1
            assert sum(a * b for a, b in zip(one, other, strict=True)) / lengths > 0.9999

    page = harness("load", "--loads", "short-16", "--rounds", "1", "--seconds", "1")
    record = json.loads((tmp_path / "demo.json").read_text())
    assert {r["server"] for r in record["raw"]} == {"ours", "stack", "transformers"}
    assert all(r["errors"] == 0 and r["texts_per_s"] > 0 for r in record["raw"])
    assert "| transformers |" in page
    harness("stop")
    assert not any(runs(s["pid"]) for s in servers.values())


def test_a_port_that_is_taken_is_no_ready_server(harness: Any, first: int, tmp_path: Path) -> None:
    """What answers there would be measured under another name."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        assert f"port {first} is taken" in harness("serve", "--together", "--only", "ours,transformers")
    left = json.loads((tmp_path / "servers.json").read_text())
    assert [s["name"] for s in left] == ["transformers"]


def test_a_command_that_is_cut_off_leaves_its_servers_to_the_next(first: int, tmp_path: Path) -> None:
    """Killed while one starts, as by a time limit: nothing is loaded beside it, and `stop` ends it."""
    config = tmp_path / "slow.yaml"
    slow = {"argv": [sys.executable, "-c", "import time; time.sleep(600)"]}
    config.write_text(json.dumps({"title": "", "model": "demo", "servers": {"slow": slow}, "loads": {}, "seconds": 1}))

    def command(action: str) -> list[str | Path]:
        return [sys.executable, ROOT / "benchmarks/gpu/harness.py", action, config, "--out", tmp_path,
                "--first-port", str(first)]  # fmt: skip

    state = tmp_path / "servers.json"
    with subprocess.Popen(command("serve"), stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout
        assert any(line.startswith("slow: starting") for line in iter(serving.stdout.readline, ""))
        serving.kill()
    (left,) = json.loads(state.read_text())
    try:
        assert left["ready_s"] is None
        assert psutil.pid_exists(left["pid"])
        found = subprocess.run(command("load"), capture_output=True, text=True, timeout=60, check=False)
        assert found.returncode == 1
        assert "not ready: slow" in found.stderr
    finally:
        subprocess.run(command("stop"), timeout=60, check=True)
    assert not psutil.pid_exists(left["pid"]) or psutil.Process(left["pid"]).status() == psutil.STATUS_ZOMBIE


def test_a_server_that_refuses_the_model_is_told_at_once() -> None:
    """It answers, and would go on refusing until the deadline."""
    with serving(SmallEndpoint()) as url:  # it serves a model of another name
        port = int(url.split(":")[2].split("/")[0])
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks/gpu')!r})\n"
            f"import servers; servers.answers({port}, 'demo')"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "refuses a request for model demo: 404" in found.stderr
    assert "no such model" in found.stderr
