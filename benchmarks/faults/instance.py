"""One instance under test: `qwen3emb up` (real engine) or the supervisor around the fake engine, behind a Service."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from faults import processes
from faults.load import Load, Reference
from faults.service import Service

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from supervised import fake_plan, free_port, gateway_plan

from qwen3emb_launch import state
from qwen3emb_launch.facts import Deadlines, RestartPolicy
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.notify import watchdog_seconds
from qwen3emb_launch.planning import plan_to_dict
from qwen3emb_launch.state import InstanceRecord, ProcessId

NAME = "chaos"
START_TIMEOUT = 300.0
HOLD = 60.0  # seconds, as before the real engine: a busy machine is slow to bring even a fake one back
LOOK_EVERY = 0.03  # seconds; looking is work too, on the processors that an engine starts on
QUICK = {  # a hang is noticed within probe_every + probe_failures * (probe + 1) = 29 s instead of 103
    "demo": Deadlines(probe=8.0, probe_every=2.0, probe_failures=3),
    "fake": Deadlines(start=30, probe=0.5, probe_every=0.3, probe_failures=2, drain=5, reap=5),
}
# Faults come faster here than in real life, where each next restart within ten minutes waits longer, and five are all.
PATIENT = RestartPolicy(factor=1.0, limit=100_000)


@dataclass(frozen=True)
class Setup:
    """What to run: `engine` is demo (the real SGLang with a tiny model) or fake; `folder` is for everything written."""

    engine: str
    gateway: bool
    folder: Path
    rate: float
    environ: Mapping[str, str] = field(default_factory=dict)
    restart: RestartPolicy = PATIENT
    check: bool = True  # the smoke test before ready, of the fake engine
    workers: int = 1  # of the gateway
    judge_times: bool = True  # a machine that has other things to do is slow without being at fault

    @property
    def times(self) -> Deadlines:
        """The deadlines in force."""
        return QUICK[self.engine]

    @property
    def hang_seconds(self) -> float:
        """How long the supervisor may take to be sure of a hang."""
        times = self.times
        return times.probe_every + times.probe_failures * (times.probe + 1)


class Instance:
    """`with Instance(setup, reference) as instance:` serves while it lasts, and nothing may be left afterwards."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.run_id = uuid.uuid4().hex
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.model = ""
        self.start_seconds = 0.0  # of this very start: what recoveries are compared with
        self.text = 0
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        setup = self.setup
        setup.folder.mkdir(parents=True, exist_ok=True)
        environ = {**os.environ, **setup.environ, processes.MARK: self.run_id}
        argv = self._demo() if setup.engine == "demo" else self._fake()
        begin = time.monotonic()
        self.service = Service(argv, environ, setup.folder / "service.log", watchdog=watchdog_seconds(setup.times))
        self._exit.enter_context(self.service)
        self.until(lambda: self.state is State.READY, "the first ready", START_TIMEOUT)
        self.start_seconds = time.monotonic() - begin
        self.model = self.record.served_model_name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    # ---- commands -------------------------------------------------------------------------------------------------

    def _demo(self) -> list[str]:
        times = self.setup.times
        settings = {
            "deadlines.probe": times.probe,
            "deadlines.probe_every": times.probe_every,
            "deadlines.probe_failures": times.probe_failures,
            "restart.limit": PATIENT.limit,
            "restart.factor": PATIENT.factor,
        }
        argv = [sys.executable, "-m", "qwen3emb_launch", "up", "--profile", "demo", "--name", NAME, "--json"]
        front = ["--set", "gateway.cache_mb=0"] if self.setup.gateway else ["--no-gateway"]  # a cache hides outages
        front += ["--set", f"gateway.workers={self.setup.workers}"] if self.setup.workers > 1 else []
        argv += ["--port", str(self.port), "--offline", *front]
        if self.model_folder.is_dir():
            argv += ["--model", str(self.model_folder)]
        return argv + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]

    def _fake(self) -> list[str]:
        """The supervisor as `up` would start it, on a plan for the fake engine. A restart plans nothing anew."""
        make = gateway_plan if self.setup.gateway else fake_plan
        plan = make(name=NAME, deadlines=self.setup.times, restart=self.setup.restart)
        if plan.gateway:
            plan = replace(plan, gateway={**plan.gateway, "workers": self.setup.workers, "hold": HOLD})
        self.port, self.base_url = plan.port, plan.base_url
        (self.setup.folder / "plan.json").write_text(json.dumps(plan_to_dict(plan)), encoding="utf-8")
        script = Path(__file__).with_name("fake_service.py")
        flags = [] if self.setup.check else ["--no-verify"]
        return [sys.executable, str(script), NAME, str(self.setup.folder / "plan.json"), *flags]

    @property
    def model_folder(self) -> Path:
        """A checkpoint of this run's own, to be taken away and damaged."""
        return self.setup.folder / "model"

    # ---- what is the case -----------------------------------------------------------------------------------------

    @property
    def found(self) -> state.Instance | None:
        """The instance as every other command sees it."""
        return state.load(NAME)

    @property
    def state(self) -> State | None:
        """Its state, as far as its supervisor lives."""
        found = self.found
        return found.state if found and found.running else None

    @property
    def record(self) -> InstanceRecord:
        """Its record."""
        found = self.found
        assert found is not None
        assert found.record is not None, found.warning
        return found.record

    def pid(self, role: str) -> int | None:
        """The pid of one of its processes: http, scheduler, detokenizer, template, guard, gateway."""
        return processes.roles(self.service.pid).get(role)

    def engine_processes(self) -> dict[ProcessId, str]:
        """The engine's guard, the engine, its workers."""
        guard = self.pid("guard")
        return processes.tree(guard) if guard else {}

    def leftovers(self) -> dict[ProcessId, str]:
        """Processes of this run that are nobody's any more."""
        mine = processes.tree(self.service.pid)
        return {w: c for w, c in processes.marked(self.run_id).items() if w not in mine and w.alive}

    def events_since(self, begin: float) -> list[dict[str, Any]]:
        """Transitions after `begin` (seconds since the epoch)."""
        found = self.found
        lines = found.events.read_text(encoding="utf-8").splitlines() if found and found.events.exists() else []
        return [event for line in lines if (event := json.loads(line))["at"] >= begin]

    def load(self, reference: Reference) -> Load:
        """Steady load on it; texts go on where the last load stopped."""
        return Load(self.base_url, self.model, reference, rate=self.setup.rate, first=self.text)

    def until(self, condition: Callable[[], Any], what: str, timeout: float) -> float:
        """Wait for a condition; the seconds it took. Raises LateError."""
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > timeout:
                raise LateError(f"{what}: not within {timeout:.0f} s")
            time.sleep(LOOK_EVERY)
        return time.monotonic() - begin


class LateError(Exception):
    """Something that should have happened did not, in time."""
