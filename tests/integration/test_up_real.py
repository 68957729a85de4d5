"""up on the real SGLang: serve, embed, survive a killed engine, stop, and leave nothing behind, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port
from supervised import gone, until

from qwen3emb_launch import state
from qwen3emb_launch.engine_process.guard import descendants
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Target, embed_once

pytestmark = pytest.mark.engine
QWEN3EMB = [sys.executable, "-m", "qwen3emb_launch"]


@pytest.fixture(scope="module")
def data_folder(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Where an engine asked for by its python is adopted, once; None where the installed one serves."""
    if "QWEN3EMB_TEST_ENGINE_PYTHON" not in os.environ:
        return None
    data = tmp_path_factory.mktemp("data")
    adopt = [*QWEN3EMB, "engine", "install", "--python", str(engine_python), "--name", "cpu"]
    subprocess.run(adopt, check=True, env={**os.environ, "QWEN3EMB_DATA_DIR": str(data)})
    return data


@pytest.fixture
def engine(data_folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cpu engine environment that `up` finds by itself."""
    if data_folder:
        monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(data_folder))


@pytest.fixture
def up(engine: None) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`qwen3emb up --profile demo --json` in the foreground, and the envelope it printed when ready."""
    process = subprocess.Popen(
        [*QWEN3EMB, "up", "--profile", "demo", "--port", str(free_port()), "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline() or "{}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Requests:
    """One client that never stops asking; counts answers, and answers that are not the reference vector."""

    def __init__(self, base_url: str) -> None:
        self.url = f"{base_url}/embeddings"
        self.reference = self.ask()
        self.right = self.wrong = self.failed = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def ask(self) -> list[float]:
        body = json.dumps({"model": "demo", "input": "steady", "dimensions": 64}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["data"][0]["embedding"]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                vector = self.ask()
            except (OSError, urllib.error.URLError, ValueError):
                self.failed += 1
                self._stop.wait(0.05)
                continue
            dot = sum(a * b for a, b in zip(vector, self.reference, strict=True))
            if dot > 0.999:
                self.right += 1
            else:
                self.wrong += 1

    def __enter__(self) -> Requests:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def cli(*args: str) -> dict[str, Any]:
    """A finite command's envelope."""
    done = subprocess.run([*QWEN3EMB, *args, "--json"], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


def status_of(url: str, path: str, key: str | None = None) -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url.removesuffix("/v1") + path, b"", headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_up_embed_crash_and_return_down(up: tuple[subprocess.Popen[str], dict[str, Any]]) -> None:
    """Served and smoke-tested; several dims; the engine killed under requests comes back with the same vectors; admin
    routes want the key; Ctrl-C ends with 130 and nothing is left running."""
    process, envelope = up
    assert envelope["ok"], envelope
    result = envelope["result"]
    assert result["pid"] == process.pid  # the supervisor took the command's own place
    tree = descendants(process.pid)
    assert len(tree) >= 4  # guard, server, scheduler, detokenizer

    for dims in (32, 100, result["max_dims"]):
        answer = cli("embed", "a text", "another", "--dims", str(dims))
        assert [len(e["embedding"]) for e in answer["result"]["embeddings"]] == [dims, dims]
    assert cli("embed", "a text", "--dims", str(result["max_dims"] + 1))["error"]["code"] == "bad_dims"

    instance, _ = state.running()
    assert status_of(result["base_url"], "/flush_cache") == 401
    assert status_of(result["base_url"], "/flush_cache", instance.engine_key()) == 200
    for path in instance.folder.rglob("*.log"):
        assert str(instance.engine_key()) not in path.read_text()

    with Requests(result["base_url"]) as requests:
        until(lambda: requests.right >= 5, "the first answers")
        os.kill(result["engine_pids"][0], signal.SIGKILL)
        begin = time.monotonic()
        until(lambda: state.running()[1].state is State.RESTARTING, "notice of the crash")
        assert time.monotonic() - begin < 1
        until(lambda: state.running()[1].state is State.READY, "the engine's return", 240)
        before = requests.right
        until(lambda: requests.right >= before + 5, "answers of the new engine")
    assert requests.wrong == 0
    assert requests.failed > 0
    assert state.running()[1].restarts == 1
    assert all(map(gone, tree[1:]))  # nothing of the first engine

    tree = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert all(map(gone, tree))


def test_killed_supervisor_leaves_no_engine_process(engine: None) -> None:
    """SIGKILL to a detached supervisor: server, scheduler and detokenizer are gone, and status says what happened."""
    answer = cli_up("--detach")
    assert answer["ok"], answer
    pid = answer["result"]["pid"]
    tree = descendants(pid)
    assert len(tree) >= 4
    os.kill(pid, signal.SIGKILL)
    until(lambda: all(map(gone, tree)), "the end of every process", 10)
    row = cli("status", "demo")["result"]["instances"][0]
    assert (row["state"], row["running"]) == ("failed", False)
    assert cli("down", "demo")["ok"]


def test_engine_that_refuses_its_flags(engine: None) -> None:
    """A flag's value that only the engine itself can judge: exit 4, its own words, nothing left."""
    answer = cli_up("--detach", "--set", "attention_backend=no-such-backend")
    assert not answer["ok"]
    assert "no-such-backend" in answer["error"]["message"]


def cli_up(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [*QWEN3EMB, "up", "--profile", "demo", "--port", str(free_port()), "--json", *args],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return json.loads(done.stdout)


def test_probe_of_the_real_engine(demo_endpoint: Any) -> None:
    """The liveness probe's own view of a healthy real engine: right width, unit length."""
    host, port = demo_endpoint.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    answer = embed_once(Target(host, int(port), "demo", 256), "probe", 30)
    assert answer.ok, answer
    wrong = embed_once(Target(host, int(port), "demo", 128), "probe", 30)
    assert "256 numbers came back, 128" in wrong.detail
