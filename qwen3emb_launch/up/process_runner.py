"""Carries out what one unit's machine asks for, and turns what happens into events for it. One subclass a kind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwen3emb_launch.engine_process import (
    Doomed,
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
from qwen3emb_launch.engine_process.log_tail import LogTail, last_lines
from qwen3emb_launch.engine_process.process import sweep
from qwen3emb_launch.engine_process.strain import Strain, Watch
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.probe import Answer, Verdict
from qwen3emb_launch.state import Claim
from qwen3emb_launch.up.diagnosis import ending
from qwen3emb_launch.up.events import (
    EngineDied,
    EngineDoomed,
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
from qwen3emb_launch.up.stages import lost, works
from qwen3emb_launch.up.starvation import LATE

SWEEP_EVERY = 0.05
SWEEP_FOR = 10.0
LOST_WITHIN = 50  # lines of the log


T = TypeVar("T")


def _seen(look: Callable[[], T]) -> T | None:
    """What a look at the machine shows; what cannot be looked at is no evidence."""
    try:
        return look()
    except Exception:  # noqa: BLE001 - whatever it is
        return None


class ProcessRunner:
    """The effects of one unit. `tell` is safe to call from any thread; `keep` names children that are not its own.

    `kind` begins the names of its log files and its sentences: engine, engine-2, gateway.
    """

    def __init__(self, kind: str, claim: Claim, tell: Callable[[Event], None], keep: Callable[[], set[int]]) -> None:
        self.kind = kind
        self.log: Path | None = None
        self.status: int | None = None  # how the last main process ended
        self.unfit: LaunchError | None = None  # why the last start was not even tried
        self._claim = claim
        self._tell = tell
        self._keep = keep
        self._process: EngineProcess | None = None
        self._tail: LogTail | None = None

    # ---- what a kind has of its own -------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The address as the OpenAI client takes it."""
        raise NotImplementedError

    def command(self, log: Path) -> EngineCommand:
        """What to start now. Raises LaunchError when it cannot be started here."""
        raise NotImplementedError

    def ask(self, timeout: float) -> Callable[[], Answer]:
        """The question of one probe; it is called in a thread of its own."""
        raise NotImplementedError

    def own_words(self) -> LaunchError | None:
        """Why it ended, where it said so itself in our words."""
        return None

    # ---- for the supervisor ---------------------------------------------------------------------------------------

    @property
    def children(self) -> set[int]:
        """Processes of this unit that are known, and not the engine's."""
        return {self._process.guard_pid} if self._process else set()

    def act(self, action: Spawn | Probe | Terminate | Kill) -> None:
        """Carry out one action; what comes of it arrives as an event."""
        if isinstance(action, Spawn):
            self.spawn(action.start)
        elif isinstance(action, Probe):
            self._probe(action)
        elif self._process and isinstance(action, Terminate):
            self._process.terminate()
        elif self._process:
            self._process.kill()

    def serves(self) -> None:
        """It has become ready."""
        if self._process:
            self._process.look()

    def new_lines(self) -> list[str]:
        """What it wrote since the last call."""
        return self._tail.poll() if self._tail else []

    def close(self) -> None:
        """The unit has ended: leave nothing behind."""

    # ---- effects --------------------------------------------------------------------------------------------------

    def spawn(self, start: int) -> None:
        """Start it; that it cannot be started is its death."""
        gc.collect()  # what the last start leaves hangs in cycles: over a thousand starts, megabytes nobody looks at
        self.status = None
        self.unfit = None
        try:
            log = self._claim.new_log(time.strftime("%Y%m%d-%H%M%S"), self.kind)
            command = self.command(log)
            self.log = log
            self._process = EngineProcess(command, lambda event: self._on_process(start, event))
        except LaunchError as error:
            self.unfit = error
            self._tell(EngineDied(start, error.message))
            self._tell(EngineGone(start))
            return
        self._tail = LogTail(log)

    def _on_process(self, start: int, event: ProcessEvent) -> None:
        """Called in the process's thread."""
        what = self.kind.partition("-")[0]
        if isinstance(event, Spawned):
            self._tell(EngineSpawned(start, event.pid))
        elif isinstance(event, SpawnFailed):
            self._tell(EngineDied(start, f"the {what} could not be started: {event.error}"))
        elif isinstance(event, Doomed):
            which = lost(last_lines(self.log, LOST_WITHIN)) if self.log else ""
            self._tell(EngineDoomed(start, f"the {what} lost a process" + (f" ({which})" if which else "")))
        elif isinstance(event, Exited):
            self.status = event.status
            self._tell(EngineDied(start, f"the {what} {ending(event.status)}"))
        elif isinstance(event, Stuck):
            self._tell(EngineStuck(start, event.pids))
        elif isinstance(event, GuardLost):
            self._tell(EngineDied(start, f"the {what}'s guard was lost ({event.error})"))
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
        question = self.ask(action.timeout)
        log = self.log
        root = self._process.guard_pid if self._process else None

        def ask() -> None:
            # Told whatever happens: of a probe that is never over there is no next one.
            tail = _seen(lambda: LogTail(log, from_end=True)) if log else None
            watch = _seen(lambda: Watch(root, action.timeout)) if root else None
            begin = time.monotonic()
            try:
                answer = question()
            except Exception as error:  # noqa: BLE001 - whatever it is, there is no answer
                answer = Answer(Verdict.UNREACHABLE, time.monotonic() - begin, f"{type(error).__name__}: {error}")
            strain = _seen(lambda: watch.end(slow=answer.verdict is Verdict.SLOW)) if watch else None
            progress = bool(tail and not answer.ok and _seen(lambda: any(map(works, tail.poll()))))
            self._tell(Probed(action.start, answer, progress, strain))

        try:
            threading.Thread(target=ask, name="probe", daemon=True).start()
        except RuntimeError as error:  # no thread to be had: the machine's fault, and no word about the engine
            answer = Answer(Verdict.SLOW, 0.0, f"the probe could not be sent: {error}")
            self._tell(Probed(action.start, answer, strain=Strain(action.timeout, late=max(LATE, action.timeout))))
