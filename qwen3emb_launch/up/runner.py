"""Carries out what one unit's machine asks for, and turns what happens into events for it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.engine_process import (
    EngineCommand,
    EngineProcess,
    Exited,
    Gone,
    GuardLost,
    ProcessEvent,
    Spawned,
    SpawnFailed,
    Stuck,
)
from qwen3emb_launch.engine_process.log_tail import LogTail
from qwen3emb_launch.engine_process.ports import check_free
from qwen3emb_launch.engine_process.process import sweep
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.probe import Target, embed_once
from qwen3emb_launch.state import Claim, write_private
from qwen3emb_launch.up.check import CheckOrder, CheckProcess, CheckResult
from qwen3emb_launch.up.diagnosis import ending
from qwen3emb_launch.up.events import (
    Check,
    Checked,
    EngineDied,
    EngineGone,
    EngineSpawned,
    EngineStuck,
    Event,
    Kill,
    Probe,
    Probed,
    Spawn,
    Terminate,
)
from qwen3emb_launch.up.keys import take_keys
from qwen3emb_launch.up.stages import works

SWEEP_EVERY = 0.05
SWEEP_FOR = 10.0


@dataclass(frozen=True)
class EngineSpec:
    """One engine of an instance: its command, and where and as what it answers."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    model: str
    dims: int
    context_length: int
    private: bool = False  # users call a gateway, nobody calls the engine itself

    @property
    def connect_host(self) -> str:
        """The address to reach it by from this machine."""
        return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def url(self) -> str:
        """Its address as the OpenAI client takes it."""
        host = self.connect_host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"


class EngineRunner:
    """The effects of one unit. `tell` is safe to call from any thread; `keep` names children that are not its own."""

    def __init__(
        self,
        spec: EngineSpec,
        claim: Claim,
        tell: Callable[[Event], None],
        *,
        check_argv: Sequence[str] | None,
        keep: Callable[[], set[int]],
        probe_text: str = "qwen3emb liveness",
    ) -> None:
        self.spec = spec
        self.log: Path | None = None
        self.status: int | None = None  # how the last main process ended
        self.unfit: LaunchError | None = None  # why the last start was not even tried
        self._claim = claim
        self._tell = tell
        self._check_argv = check_argv
        self._keep = keep
        self._text = probe_text
        self._probes = 0
        self._process: EngineProcess | None = None
        self._check: CheckProcess | None = None
        self._key: str | None = None
        self._tail: LogTail | None = None

    @property
    def children(self) -> set[int]:
        """Processes of this unit that are known, and not the engine's."""
        found = set()
        if self._process:
            found.add(self._process.guard_pid)
        if self._check:
            found.add(self._check.pid)
        return found

    def act(self, action: Spawn | Probe | Check | Terminate | Kill) -> None:
        """Carry out one action; what comes of it arrives as an event."""
        if isinstance(action, Spawn):
            self._spawn(action.start)
        elif isinstance(action, Probe):
            self._probe(action)
        elif isinstance(action, Check):
            self._begin_check(action)
        elif self._process and isinstance(action, Terminate):
            self._process.terminate()
        elif self._process:
            self._process.kill()

    def new_lines(self) -> list[str]:
        """What the engine wrote since the last call."""
        return self._tail.poll() if self._tail else []

    def close(self) -> None:
        """The unit has ended: leave nothing behind."""
        self._end_check()
        self._claim.keys.unlink(missing_ok=True)

    # ---- effects --------------------------------------------------------------------------------------------------

    def _spawn(self, start: int) -> None:
        self.status = None
        self.unfit = None
        try:
            check_free(self.spec.host, self.spec.port)
            argv, keys = take_keys(self.spec.argv, private=self.spec.private)
            self._key = keys.api
            write_private(self._claim.keys, keys.config())
            self.log = self._claim.new_log(time.strftime("%Y%m%d-%H%M%S"))
            command = EngineCommand(
                argv=(*argv, "--config", str(self._claim.keys)),
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.env},
                log=self.log,
                cwd=self._claim.folder,
                secrets=keys.secrets,
            )
            self._process = EngineProcess(command, lambda event: self._on_process(start, event))
        except LaunchError as error:
            self.unfit = error
            self._tell(EngineDied(start, error.message))
            self._tell(EngineGone(start))
            return
        self._tail = LogTail(self.log)
        if self._check_argv:
            self._end_check()
            self._check = CheckProcess(self._check_argv)

    def _on_process(self, start: int, event: ProcessEvent) -> None:
        """Called in the process's thread."""
        if isinstance(event, Spawned):
            self._tell(EngineSpawned(start, event.pid))
        elif isinstance(event, SpawnFailed):
            self._tell(EngineDied(start, f"the engine could not be started: {event.error}"))
        elif isinstance(event, Exited):
            self.status = event.status
            self._tell(EngineDied(start, f"the engine {ending(event.status)}"))
        elif isinstance(event, Stuck):
            self._tell(EngineStuck(start, event.pids))
        elif isinstance(event, GuardLost):
            self._tell(EngineDied(start, f"the engine's guard was lost ({event.error})"))
            self._sweep()
            self._tell(EngineGone(start))
        elif isinstance(event, Gone):
            self._tell(EngineGone(start))

    def _sweep(self) -> None:
        """Without its guard an engine's orphans are this process's children: remove them, two looks in a row clean."""
        clean = 0
        pause = threading.Event()
        end = time.monotonic() + SWEEP_FOR
        while clean < 2 and time.monotonic() < end:
            clean = 0 if sweep(self._keep()) else clean + 1
            pause.wait(SWEEP_EVERY)

    def _probe(self, action: Probe) -> None:
        self._probes += 1
        text = f"{self._text} {self._probes}"
        target = Target(self.spec.connect_host, self.spec.port, self.spec.model, self.spec.dims, self._key)
        log = self.log

        def ask() -> None:
            tail = LogTail(log, from_end=True) if log else None
            answer = embed_once(target, text, action.timeout)
            progress = tail is not None and not answer.ok and any(map(works, tail.poll()))
            self._tell(Probed(action.start, answer, progress))

        threading.Thread(target=ask, name="probe", daemon=True).start()

    def _begin_check(self, action: Check) -> None:
        assert self._check is not None  # noqa: S101 - the machine asks for a check only where there is one
        spec = self.spec

        def told(result: CheckResult) -> None:
            self._tell(Checked(action.start, result.faults, result.report))

        order = CheckOrder(spec.url, spec.model, spec.dims, spec.context_length, self._key, str(self._claim.plan))
        self._check.begin(order, action.timeout, told)

    def _end_check(self) -> None:
        if self._check:
            with contextlib.suppress(OSError, ValueError):
                self._check.cancel()
            self._check = None
