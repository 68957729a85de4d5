"""up on the real SGLang: serve, survive whatever is killed, be restarted, stop, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import free_port
from supervised import Load, gone, until

from qwen3emb_launch import state
from qwen3emb_launch.engine_process.guard import descendants, shared_memory
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Target, embed_once
from qwen3emb_launch.up.stages import room

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


def start(*args: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`qwen3emb up --profile demo --json` in the foreground, and the envelope it printed when ready."""
    process = subprocess.Popen(
        [*QWEN3EMB, "up", "--profile", "demo", "--port", str(free_port()), "--json", *args],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline() or "{}")


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate()


def cli(*args: str) -> dict[str, Any]:
    """A finite command's envelope."""
    done = subprocess.run([*QWEN3EMB, *args, "--json"], capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)


def status_of(url: str, path: str, key: str | None = None) -> int:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url.removesuffix("/v1") + path, b"", headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def steady(base_url: str) -> Load:
    """Clients that ask twenty texts again and again, with the first answers as the truth."""
    truth: dict[str, list[float]] = {}

    class Texts(Load):
        model = "demo"

        def ask(self, text: str) -> list[float]:
            return super().ask(f"a steady text, number {int(text.split()[1]) % 20}")

    def right(text: str, vector: list[float]) -> bool:
        dot = sum(a * b for a, b in zip(vector, truth[str(int(text.split()[1]) % 20)], strict=True))
        return dot > 0.999

    clients = Texts(base_url, right, pause=0.3)
    truth.update({str(n): clients.ask(f"text {n}") for n in range(20)})
    return clients


@pytest.mark.xdist_group("all_killed")
def test_no_request_is_lost_whatever_is_killed(engine: None) -> None:
    """Two engines behind the gateway, asked without end. Both killed: requests wait and are answered. The gateway
    killed: back within seconds. `restart`: every engine a new process, nobody notices. The supervisor killed: nothing
    is left."""
    process, envelope = start("--replicas", "2", "--set", "gateway.cache_mb=0")
    try:
        assert envelope["ok"], envelope
        base_url, first = envelope["result"]["base_url"], envelope["result"]["engine_pids"]
        assert len(first) == 2
        clients = steady(base_url)
        with clients:
            clients.goes_on(20)
            for pid in first:
                os.kill(pid, signal.SIGKILL)
            until(lambda: state.running()[1].state is State.RESTARTING, "notice of the crash")
            until(lambda: state.running()[1].state is State.READY, "the engines' return", 240)
            clients.goes_on(20)
            done = cli("restart")
            assert done["ok"], done
            clients.goes_on(20)
        assert (clients.failed, clients.wrong) == (0, 0), clients.last_error
        replaced = done["result"]["replaced"]
        assert [one["unit"] for one in replaced] == ["engine", "engine-2"]
        assert all(gone(one["old_pid"]) and not gone(one["new_pid"]) for one in replaced)

        gateway = next(u for u in state.running()[1].units if u.kind == "gateway")
        assert gateway.process
        os.kill(gateway.process.pid, signal.SIGKILL)
        until(lambda: state.running()[1].state is State.RESTARTING, "notice of the gateway's end")
        until(lambda: state.running()[1].state is State.READY, "the gateway's return")
        assert clients.ask("text 1")
        events = [json.loads(line) for line in state.running()[0].events.read_text().splitlines()]
        reasons = {event["reason"] for event in events if event["after"] == "restarting"}
        # Noticed by the ends of processes; a probe would say that nothing answers.
        assert {reason.rpartition(": ")[2].split(" was ")[-1] for reason in reasons} == {"killed by SIGKILL"}, reasons

        tree = descendants(process.pid)
        assert len(tree) >= 10  # three guards, the gateway, twice server, scheduler, detokenizer
        process.kill()
        process.wait()
        until(lambda: all(map(gone, tree)), "the end of every process", 10)
        row = cli("status", "demo")["result"]["instances"][0]
        assert (row["state"], row["running"]) == ("failed", False)
        assert cli("down", "demo")["ok"]
    finally:
        end(process)


def test_the_bare_engine(engine: None) -> None:
    """--no-gateway: users call SGLang itself. Served and smoke-tested; several dims; admin routes want the key, which
    no log shows; Ctrl-C ends with 130 and nothing is left running."""
    process, envelope = start("--no-gateway")
    try:
        assert envelope["ok"], envelope
        result = envelope["result"]
        assert result["pid"] == process.pid  # the supervisor took the command's own place
        tree = descendants(process.pid)
        assert len(tree) >= 4  # guard, server, scheduler, detokenizer
        addresses = [c.laddr.ip for pid in tree for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"]
        assert set(addresses) == {"127.0.0.1"}  # its server's, and gloo's
        temporary = Path(psutil.Process(result["engine_pids"][0]).environ()["TMPDIR"])
        assert any(path.is_socket() for path in temporary.iterdir())
        memory = shared_memory(tree)
        assert memory

        for dims in (32, 100, result["max_dims"]):
            answer = cli("embed", "a text", "another", "--dims", str(dims))
            assert [len(e["embedding"]) for e in answer["result"]["embeddings"]] == [dims, dims]
        assert cli("embed", "a text", "--dims", str(result["max_dims"] + 1))["error"]["code"] == "bad_dims"

        instance, record = state.running()
        assert (room(Path(record.log or "")) or 0) >= record.context_length  # the line by which a start is refused
        assert status_of(result["base_url"], "/flush_cache") == 401
        assert status_of(result["base_url"], "/flush_cache", instance.engine_key()) == 200
        for path in instance.folder.rglob("*.log"):
            assert str(instance.engine_key()) not in path.read_text()
        assert cli("restart")["error"]["code"] == "no_gateway"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert all(map(gone, tree))
        assert not any(Path(one).exists() for one in (temporary, *memory))
    finally:
        end(process)


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
