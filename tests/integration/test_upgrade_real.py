"""upgrade on the real SGLang: from one adopted environment to another under requests, and back out of a broken one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from supervised import Load

from qwen3emb_launch import state
from qwen3emb_launch.paths import paths
from qwen3emb_launch.vectors import distance

pytestmark = pytest.mark.engine
QWEN3EMB = [sys.executable, "-m", "qwen3emb_launch"]

# Whatever asks it for its packages gets an answer; as a server it does not start.
BROKEN = """#!/bin/sh
case "$*" in
    *launch_server*--port*|*engine_plugin.serve*) echo "RuntimeError: broken on purpose" >&2; exit 1;;
esac
exec {python} "$@"
"""


def cli(*words: str) -> dict[str, Any]:
    done = subprocess.run([*QWEN3EMB, *words, "--json"], capture_output=True, text=True, timeout=400)
    return json.loads(done.stdout)


@pytest.fixture
def serving(engine_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The demo profile behind its gateway, in a data folder of its own that knows the installed environment."""
    installed, data = paths().engines / "cpu" / "engine.json", tmp_path / "data"
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(data))
    if "QWEN3EMB_TEST_ENGINE_PYTHON" in os.environ:
        assert cli("engine", "install", "--python", str(engine_python), "--name", "cpu")["ok"]
    else:
        (data / "engines" / "cpu").mkdir(parents=True)
        shutil.copy(installed, data / "engines" / "cpu")
    answer = cli("up", "--profile", "demo", "--port", str(free_port()), "--detach")
    assert answer["ok"], answer
    yield answer["result"]
    cli("down", "demo")


def environments() -> list[str]:
    return [e["name"] for e in cli("engine", "list")["result"]["environments"]]


def embedded(text: str) -> list[float]:
    """What the present engine itself says: the gateway would answer from its cache."""
    instance, record = state.running("demo")
    headers = {"content-type": "application/json", "authorization": f"Bearer {instance.engine_api_key()}"}
    body = json.dumps({"model": record.served_model_name, "input": text}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{record.engine_url}/embeddings", body, headers), timeout=60
    ) as answer:
        return json.load(answer)["data"][0]["embedding"]


def test_upgrade_between_environments(serving: dict[str, Any], engine_python: Path, tmp_path: Path) -> None:
    """A broken environment changes nothing and is forgotten; a good one takes over, verified and compared, with no
    request failed or answered otherwise; the old environment stays."""
    broken, good = tmp_path / "broken" / "bin" / "python", tmp_path / "good"
    broken.parent.mkdir(parents=True)
    broken.write_text(BROKEN.format(python=engine_python))
    broken.chmod(0o755)
    good.symlink_to(engine_python.parents[1])
    answers: dict[str, list[float]] = {}

    def keep(text: str, vector: list[float]) -> bool:
        answers[text] = vector
        return len(vector) == serving["max_dims"]

    load = Load(serving["base_url"], keep, clients=1, pause=0.1)
    load.model = "demo"
    with load:
        load.goes_on()
        answer = cli("upgrade", "demo", "--level", "quick", "--python", str(broken))
        assert answer["error"]["code"].startswith("engine_"), answer
        assert "broken on purpose" in json.dumps(answer["error"])
        assert environments() == ["cpu"]
        assert [e.pid for e in state.running("demo")[1].engines] == serving["engine_pids"]

        answer = cli("upgrade", "demo", "--level", "quick", "--python", str(good))
        assert answer["ok"], answer
        load.goes_on()
    assert (load.failed, load.wrong) == (0, 0), load.last_error
    result = answer["result"]
    assert (result["vectors"], result["new"]["engine"]) == ("same", "cpu-adopted")
    assert result["new"]["python"].startswith(str(good))
    assert [e.pid for e in state.running("demo")[1].engines] == [result["replaced"][0]["new_pid"]]
    assert environments() == ["cpu", "cpu-adopted"]
    for text, vector in (*list(answers.items())[:10], *list(answers.items())[-10:]):
        assert distance(vector, embedded(text)) < 1e-3  # both engines' answers are what the new one says
