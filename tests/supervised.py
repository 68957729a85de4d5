"""Helpers for tests of the supervisor: a hand-made plan for the fake engine, and waiting for a condition."""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import free_port

from qwen3emb_launch import state
from qwen3emb_launch.argv import with_option
from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.cli.supervise import gateway_spec
from qwen3emb_launch.engine_process.ports import private_port
from qwen3emb_launch.facts import Deadlines, EngineFacts, LaunchPlan, MemoryEstimate, ModelFacts, RestartPolicy
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.planning import plan_to_dict
from qwen3emb_launch.state import InstanceRecord
from qwen3emb_launch.up.control_server import ControlServer
from qwen3emb_launch.up.supervisor import Outcome, Supervisor

FAKE = Path(__file__).with_name("fake_engine.py")
SMALL = MemoryEstimate({"weights": 1000}, 1000, None)
QUICK = Deadlines(start=20, probe=0.3, probe_every=0.1, probe_failures=2, drain=5, reap=5)
PATIENT = replace(QUICK, probe=10)  # where a probe that a busy machine delays must not make anything of it
EAGER = RestartPolicy(first=0.05, factor=1.0, longest=0.1, limit=3, window=600)


def until(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """The condition's first true value; an assertion error after `timeout` seconds without one.

    It is asked ever less often: what is asked may be a process, and takes the core that the answer waits for.
    """
    end, pause = time.monotonic() + timeout, 0.01
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(pause)
        pause = min(1.1 * pause, 0.2)
    raise AssertionError(f"not within {timeout} s: {what}")


def fake_plan(behaviour: dict[str, Any] | None = None, **changes: Any) -> LaunchPlan:
    """A plan that starts the fake engine with the given faults."""
    port = free_port()
    width = 64
    shape = ModelShape(width, 1, 1, 1, 64, 64, 264, 1024, True)
    plan = LaunchPlan(
        name="fake",
        profile="fake",
        profile_hash="0",
        model=ModelFacts("fake", Path("/nowhere"), "folder", None, shape, 0, 256),
        engine=EngineFacts("fake", "cpu", "0.5.15.post1", Path(sys.executable), True, {}),
        gpu=None,
        served_model_name="fake",
        host="127.0.0.1",
        port=port,
        engine_host="127.0.0.1",
        engine_port=port,
        context_length=512,
        max_dims=width,
        argv=(sys.executable, str(FAKE), "--host", "127.0.0.1", "--port", str(port), "--is-embedding"),
        env={"FAKE_ENGINE": json.dumps({"width": width, **(behaviour or {})})},
        settings=(),
        memory=None,
        deadlines=QUICK,
        restart=EAGER,
    )
    return replace(plan, **changes)


def gateway_plan(behaviour: dict[str, Any] | None = None, *, replicas: int = 1, **changes: Any) -> LaunchPlan:
    """A plan with the real gateway before fake engines that ask for a key, as `up` makes them."""
    settings = {
        "host": "127.0.0.1", "port": free_port(), "models": ["fake"], "upstream_model": "fake", "hold": 20.0,
        "drain": 5.0,
    }  # fmt: skip
    plan = fake_plan({"want_key": True, **(behaviour or {})}, replicas=replicas, port=settings["port"])
    engine_port = private_port("127.0.0.1")
    argv = with_option(plan.argv, "--port", str(engine_port))
    return replace(plan, engine_port=engine_port, argv=argv, gateway=settings, memory=SMALL, **changes)


class Watcher:
    """A listener that remembers everything."""

    def __init__(self) -> None:
        self.transitions: list[Transition] = []
        self.notes: list[str] = []
        self.stages: list[str] = []

    @property
    def states(self) -> list[State]:
        return [t.after for t in self.transitions]

    def moved(self, transition: Transition, record: InstanceRecord) -> None:
        self.transitions.append(transition)

    def said(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        self.stages.append(text)


class Supervised:
    """A supervisor in a thread: `with Supervised(plan) as s`. Leaving stops it and waits for its end."""

    def __init__(self, plan: LaunchPlan, check_argv: tuple[str, ...] | None = None) -> None:
        self.plan = plan
        self.watcher = Watcher()
        self.claim = state.claim(plan.name)
        state.write_private(self.claim.plan, json.dumps(plan_to_dict(plan)))
        self.supervisor = Supervisor(
            plan, self.claim, check_argv=check_argv, gateway=gateway_spec(plan), listeners=[self.watcher]
        )
        self.outcome: Outcome | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with ControlServer(self.supervisor):
            self.outcome = self.supervisor.run()

    def __enter__(self) -> Supervised:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.stop("test")
        self.wait()
        self.claim.release()

    def wait(self, timeout: float = 90) -> Outcome:
        self._thread.join(timeout)
        assert self.outcome is not None, "the supervisor did not end"
        return self.outcome

    def reach(self, wanted: State, times: int = 1) -> None:
        until(lambda: self.watcher.states.count(wanted) >= times, f"{wanted} (seen: {self.watcher.states})")

    @property
    def engine_pid(self) -> int:
        return until(lambda: self.supervisor.record.engines, "an engine pid")[0].pid

    @property
    def gateway_pid(self) -> int:
        def pids() -> list[int]:
            return [u.process.pid for u in self.supervisor.record.units if u.kind == "gateway" and u.process]

        return until(pids, "a gateway pid")[0]

    @property
    def instance(self) -> state.Instance:
        return state.find(self.plan.name)


def gone(pid: int) -> bool:
    """Whether a process has ended; zombies count as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Load:
    """Clients that never stop asking an endpoint for new texts; they count answers, failures and wrong vectors.

    Each rests for `pause` seconds between two requests: what starts meanwhile has a core left to start on.
    """

    def __init__(
        self, base_url: str, right: Callable[[str, list[float]], bool], clients: int = 4, pause: float = 0.02
    ) -> None:
        self.right = self.wrong = self.failed = 0
        self.slowest = 0.0
        self.last_error = ""
        self._url = f"{base_url}/embeddings"
        self._judge = right
        self._pause = pause
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, args=(n,)) for n in range(clients)]

    def ask(self, text: str) -> list[float]:
        body = json.dumps({"model": "any", "input": text} | ({"model": self.model} if self.model else {})).encode()
        request = urllib.request.Request(self._url, body, {"content-type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=100) as answer:
            return json.load(answer)["data"][0]["embedding"]

    model = "fake"

    def _ask_on(self, client: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            text, begin = f"text {number} of client {client}", time.monotonic()
            try:
                good = self._judge(text, self.ask(text))
            except (OSError, ValueError, KeyError) as error:
                with self._lock:
                    self.failed += 1
                    self.last_error = f"{error} {error.read() if hasattr(error, 'read') else ''}"
                self._stop.wait(0.05)
                continue
            with self._lock:
                self.right, self.wrong = self.right + good, self.wrong + (not good)
                self.slowest = max(self.slowest, time.monotonic() - begin)
            self._stop.wait(self._pause)

    def goes_on(self, answers: int = 10) -> None:
        """Wait for so many further answers."""
        wanted = self.right + self.wrong + answers
        until(lambda: self.right + self.wrong >= wanted, f"{answers} more answers ({self.last_error})", 120)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
