"""The supervisor: feeds the machine, carries out its actions, keeps the instance's record, tells its listeners.

One thread decides; everything that may block (the engine, probes, the smoke test) runs elsewhere and puts events into
one queue. Signal handlers put an event there too and do nothing else.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Protocol

from qwen3emb_launch import __version__
from qwen3emb_launch.engine_process.guard import become_subreaper
from qwen3emb_launch.errors import LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.lifecycle import TERMINAL, State, Transition
from qwen3emb_launch.state import Claim, InstanceRecord, ProcessId, identify
from qwen3emb_launch.up.events import Action, Begin, Event, Move, Note, Probed, StopAsked, Tick
from qwen3emb_launch.up.machine import Unit
from qwen3emb_launch.up.runner import EngineRunner, EngineSpec
from qwen3emb_launch.up.stages import stage
from qwen3emb_launch.up.verdict import failure, kept

LOOK_EVERY = 0.5  # seconds between two looks at a starting engine's log
PULSE_EVERY = 5.0  # seconds; the loop turns at least that often where somebody watches it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Listener(Protocol):
    """Somebody who wants to know: the terminal, the service manager."""

    def moved(self, transition: Transition, record: InstanceRecord) -> None:
        """The instance changed its state."""

    def said(self, text: str) -> None:
        """Something worth a line."""

    def stage(self, text: str) -> None:
        """What a starting engine is busy with now."""


@dataclass(frozen=True)
class Outcome:
    """How an instance's life ended. `stopped_by` is the signal's name; `error` is set when it failed."""

    state: State
    was_ready: bool
    stopped_by: str | None
    error: LaunchError | None


class Supervisor:
    """Runs one instance from its claim to its end."""

    def __init__(
        self,
        plan: LaunchPlan,
        claim: Claim,
        *,
        check_argv: Sequence[str] | None = None,
        listeners: Sequence[Listener] = (),
        pulse: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._claim = claim
        self._listeners = tuple(listeners)
        self._pulse = pulse  # called at least every PULSE_EVERY; True: the engine has just proved that it lives
        self._clock = clock
        self._inbox: SimpleQueue[Event] = SimpleQueue()
        self._unit = Unit(plan.deadlines, plan.restart, check=check_argv is not None)
        self._runner = EngineRunner(
            engine_spec(plan), claim, self._inbox.put, check_argv=check_argv, keep=lambda: self._runner.children
        )
        self._stage = ""
        self._look_at = 0.0
        self._unsaved = False
        self._stopped_by: str | None = None
        self._error: LaunchError | None = None
        self.record = InstanceRecord(
            name=plan.name,
            state=State.STARTING,
            reason="starting",
            supervisor=identify(os.getpid()),
            engines=(),
            profile=plan.profile,
            model=plan.model.name,
            served_model_name=plan.served_model_name,
            base_url=plan.base_url,
            engine_url=engine_spec(plan).url,
            max_dims=plan.max_dims,
            context_length=plan.context_length,
            started_at=time.time(),
            launcher=__version__,
        )

    def stop(self, by: str) -> None:
        """Ask for the end, from any thread or signal handler; a second time means at once."""
        self._inbox.put(StopAsked(by))

    def run(self) -> Outcome:
        """Serve until stopped or failed. Nothing of the engine is left when it returns."""
        become_subreaper()
        self._claim.write(self.record)
        try:
            self._feed(Begin())
            while self._unit.state not in TERMINAL:
                event = self._next_event()
                self._feed(event)
                self._look_at_log()
                if self._pulse:
                    self._pulse(self._shows_life(event))
        finally:
            self._runner.close()
        return Outcome(self._unit.state, self.record.ready_at is not None, self._stopped_by, self._error)

    def _shows_life(self, event: Event) -> bool:
        """Whether the present engine embedded, or worked on other requests while a probe waited."""
        return isinstance(event, Probed) and event.start == self._unit.start and (event.answer.ok or event.progress)

    def _next_event(self) -> Event:
        now = self._clock()
        pulse_due = now + PULSE_EVERY if self._pulse else None
        times = [t for t in (self._unit.wake_at, self._look_due(), pulse_due) if t is not None]
        try:
            return self._inbox.get(timeout=max(0.0, min(times) - now)) if times else self._inbox.get()
        except Empty:
            return Tick()

    def _feed(self, event: Event) -> None:
        if isinstance(event, StopAsked):
            self._stopped_by = self._stopped_by or event.by
        pid = self._unit.pid
        for action in self._unit.handle(event, self._clock()):
            self._act(action)
        if self._unit.pid != pid:
            self._publish()

    def _act(self, action: Action) -> None:
        if isinstance(action, Move):
            self._moved(action)
        elif isinstance(action, Note):
            self._tell(lambda listener: listener.said(action.text))
        else:
            self._runner.act(action)

    def _moved(self, move: Move) -> None:
        transition = Transition(self.record.name, move.before, move.after, move.reason, time.time())
        if move.after is State.READY and self.record.ready_at is None:
            self.record = replace(self.record, ready_at=transition.at)
        if move.after is State.FAILED and self._unit.fault:
            self._error = failure(self._unit.fault, self._runner, self._stage)
        self.record = replace(self.record, state=move.after, reason=move.reason)
        self._publish()
        self._save(lambda: self._claim.append(transition))
        self._tell(lambda listener: listener.moved(transition, self.record))

    def _publish(self) -> None:
        pid = self._unit.pid
        engine: ProcessId | None = identify(pid) if pid else None
        self.record = replace(
            self.record,
            engines=(engine,) if engine else (),
            restarts=self._unit.restart_count,
            log=str(self._runner.log) if self._runner.log else None,
            error=kept(self._error) if self._error else None,
        )
        self._save(lambda: self._claim.write(self.record))

    def _save(self, write: Callable[[], None]) -> None:
        """A full disk must not end a service that works: it is said once, and the next write tries again."""
        try:
            write()
            self._unsaved = False
        except UnfitError as error:
            if not self._unsaved:
                self._unsaved = True
                text = f"state is not up to date: {error.message}"
                self._tell(lambda listener: listener.said(text))

    def _tell(self, say: Callable[[Listener], None]) -> None:
        """A terminal that went away must not end it either; rich leaves a broken pipe by SystemExit."""
        for listener in self._listeners:
            with suppress(OSError, SystemExit):
                say(listener)

    # ---- what a long start waits for ------------------------------------------------------------------------------

    def _look_due(self) -> float | None:
        return self._look_at if self._unit.state is State.STARTING else None

    def _look_at_log(self) -> None:
        now = self._clock()
        if self._unit.state is not State.STARTING or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        seen = [text for line in self._runner.new_lines() if (text := stage(line))]
        if seen and seen[-1] != self._stage:
            self._stage = seen[-1]
            self._tell(lambda listener: listener.stage(self._stage))


def engine_spec(plan: LaunchPlan) -> EngineSpec:
    """The plan's one engine."""
    return EngineSpec(
        argv=plan.argv,
        env=plan.env,
        host=plan.engine_host,
        port=plan.engine_port,
        model=plan.served_model_name,
        dims=plan.max_dims,
        context_length=plan.context_length,
        private=(plan.engine_host, plan.engine_port) != (plan.host, plan.port),
    )


@contextmanager
def stop_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """Signals become events while this lasts; the handlers that were there before are put back.

    An ignored SIGHUP stays ignored: that is what `nohup` asks for.
    """

    def record(number: int, _: FrameType | None) -> None:
        supervisor.stop(signal.Signals(number).name)

    wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, record) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
