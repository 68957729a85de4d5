"""Fixtures every test may use. The real engine is started once a session and shared: a start takes 10 s on 2 cores."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from left_behind import pytest_sessionfinish, pytest_sessionstart
from warm_python import warm

from qwen3emb_launch.demo_model import DemoShape, make_demo_model
from qwen3emb_launch.engine_process.guard import PR_SET_CHILD_SUBREAPER
from qwen3emb_launch.engine_process.rendezvous import Rendezvous

# The groups that take longest, longest first: a worker that comes to one of them last would leave the others idle.
LONG = (
    "demo_endpoint", "all_killed", "behind_locks", "test_upgrade_real", "test_verify_real", "profile_started",
    "test_plugin_real", "test_bench", "test_engines_install", "test_chaos", "test_systemd_real", "test_up_real",
    "test_up_gateway", "gpu_harness", "test_up_supervisor", "test_types", "test_gateway_process", "test_upgrade",
    "test_up_cli", "imported_engine", "test_bench_load", "test_engine_install", "test_gateway_resilience",
    "test_security", "test_embed",
)  # fmt: skip
# What tests of several files ask, and the group that runs these tests: in one worker, where it is started once.
SHARED = {"demo_endpoint": "demo_endpoint", "fp32_endpoint": "demo_endpoint", "imported_engine": "imported_engine"}

# Every engine and reference of the tests computes a tiny model on the CPU: on two cores, threads that share its sums
# spin for each other longer than they compute (a verify run costs the engine 0.2 s with one, 0.4 to 1.3 with two).
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The programs under test are started some hundred times: they are compiled once, whatever this shell thinks of that.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The time of one example says how busy the machine is, not what is wrong.
settings.register_profile("here", deadline=None)
settings.load_profile("here")

gc.disable()  # until everything is collected, as below

# A shell that runs the tests in the background has SIGINT ignored; the programs under test are to be interrupted by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say what must run in one worker under `-n`: the tests that share an engine, else those of one file.

    A test that takes long and shares nothing with its file says so by `pytest.mark.xdist_group` itself.
    """
    if _group(item) is None:
        shared = (SHARED[name] for name in getattr(item, "fixturenames", ()) if name in SHARED)
        item.add_marker(pytest.mark.xdist_group(next(shared, Path(str(item.path)).stem)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(_group(item) or "", len(LONG)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without its groups a parallel run would start an engine a test: better none at all.

    What was imported and collected stays: no garbage collection of a test walks it, of which some ask for dozens.
    """
    gc.freeze()
    gc.enable()
    grouped = getattr(session.config.option, "loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            "this pytest-xdist does not group tests under this pytest: pip install -r requirements/dev.txt"
        )


def _group(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("xdist_group")
    return str(mark.args[0]) if mark else None


@dataclass(frozen=True)
class Endpoint:
    """A real SGLang server on the CPU, without the supervisor: `base_url` as the OpenAI client takes it."""

    base_url: str
    model: Path
    pid: int
    context_length: int


def free_port() -> int:
    """A free port below 32768: SGLang claims `port + 10000` for gRPC too and dies where that passes 65535."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """A command run in this process may set variables (`systemd install --system` does), and a supervisor makes it the
    adopter of orphans; the next test sees neither."""
    before = dict(os.environ)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_folders(
    environment_as_it_was: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """No test sees the user's state, config, tokens or proxies. The data folder (engine environments) is shared."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("QWEN3EMB_STATE_DIR", str(home / "state"))
    monkeypatch.setenv("QWEN3EMB_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("QWEN3EMB_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(home / "modelscope"))
    for name in (
        "HF_TOKEN",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "MODELSCOPE_API_TOKEN",
        "MODELSCOPE_ENDPOINT",
        "HF_ENDPOINT",
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return home


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The python of the cpu engine environment; the test fails, not skips, when there is none."""
    given = os.environ.get("QWEN3EMB_TEST_ENGINE_PYTHON")
    if given:
        return Path(given)
    from qwen3emb_launch import engines

    return engines.find("cpu").python


# What is read while SGLang and the plugin's cases are imported.
IMPORTED_UNDER = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "engine_plugin"),
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@pytest.fixture(scope="session")
def imported_engine(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The engine's python with SGLang imported, which takes longer than most of what scripts do with it: each runs in a
    fork."""
    modules = ("sglang.srt.server_args", "sglang.srt.plugins.hook_registry")
    with warm(engine_python, tmp_path_factory.mktemp("imported"), modules, IMPORTED_UNDER) as python:
        yield python


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="session")
def demo_endpoint(
    engine_python: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """The real engine serving the demo model in bfloat16, context 8192."""
    with start_engine(engine_python, demo_model, tmp_path_factory.mktemp("engine") / "log") as endpoint:
        yield endpoint


# Between pytest and the engine: when pytest's end of its stdin closes, however that comes about, the session is killed.
TIED = """
import os, signal, subprocess, sys, threading
engine = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os.killpg(0, signal.SIGKILL)), daemon=True).start()
sys.exit(engine.wait() % 256)
"""


class start_engine:  # noqa: N801 - used as `with start_engine(...)`
    """A bare SGLang for a test: started, awaited by a real embedding, killed with all its workers."""

    def __init__(
        self,
        python: Path,
        model: Path,
        log: Path,
        *extra: str,
        context_length: int = 8192,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self.environ = environ or {}
        self.port = free_port()
        self.rendezvous = Rendezvous()
        self.context_length = context_length
        self.model = model
        self.argv = [
            str(python), "-m", "qwen3emb_engine_plugin.serve", "--model-path", str(model), "--device", "cpu",
            "--is-embedding",
            "--json-model-override-args", '{"is_matryoshka": true}', "--context-length", str(context_length),
            "--max-total-tokens", str(4 * context_length), "--sleep-on-idle", "--host", "127.0.0.1",
            "--port", str(self.port), *extra,
        ]  # fmt: skip

    def __enter__(self) -> Endpoint:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", TIED, *self.argv],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **self.rendezvous.fresh(self.argv),
                    **os.environ,
                    "SGLANG_USE_CPU_ENGINE": "1",
                    "HF_HUB_OFFLINE": "1",
                    **self.environ,
                },
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError(f"the engine did not start:\n{self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        return Endpoint(f"http://127.0.0.1:{self.port}/v1", self.model, self.process.pid, self.context_length)

    def _answers(self) -> bool:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/embeddings",
            data=b'{"model": "demo", "input": "ready?"}',
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=30)
        self.rendezvous.close()


__all__ = ["DemoShape", "Endpoint", "free_port", "pytest_sessionfinish", "pytest_sessionstart", "start_engine"]
