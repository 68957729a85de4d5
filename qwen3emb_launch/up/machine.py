"""Decides what a supervised engine needs next. Events and the time go in, actions come out; no effect happens here.

One `Unit` looks after one engine through all its starts. The supervisor feeds it every event and a `Tick` when
`wake_at` is reached, and carries out the actions in order. The clock is the caller's (monotonic seconds), so every
history can be replayed in a test.

    WAITING   probed until one embedding comes back       CHECKING  the smoke test runs
    SERVING   probed every `probe_every` seconds          DRAINING  TERM was sent to the main process
    DYING     the engine is being killed, or died; what it left is being removed
    BACKOFF   nothing runs; the next start is due later   ENDED     stopped or failed

A first start that fails ends the instance: nothing about it would be better the second time, and somebody is waiting.
An engine that was ready once is started again, with growing pauses, until the restart policy's limit.

Liveness is one real embedding. Slow is not dead: behind a long queue the probe waits like everyone else. It counts as a
failure only when the engine's log shows no batch and no answer since the probe was sent, and when the engine had the
machine's time and memory (`starvation`; at most EXCUSES such probes in a row are excused). An answer that is wrong, or
a connection refused, counts always. `probe_failures` in a row are death.
"""

from __future__ import annotations

from enum import StrEnum

from qwen3emb_launch.facts import Deadlines, RestartPolicy
from qwen3emb_launch.lifecycle import State, check_transition
from qwen3emb_launch.probe import Verdict
from qwen3emb_launch.up.events import (
    Action,
    Begin,
    Cause,
    Check,
    Checked,
    EngineDied,
    EngineDoomed,
    EngineSpawned,
    EngineStuck,
    Event,
    Fault,
    Kill,
    Move,
    Note,
    Probe,
    Probed,
    Refused,
    Spawn,
    StopAsked,
    Terminate,
    Tick,
)
from qwen3emb_launch.up.starvation import EXCUSES, starved

READY_PROBE_EVERY = 0.05  # seconds between two questions to an engine that does not listen yet
READY_PROBE_TIMEOUT = 30.0  # the first embeddings may compile kernels
RETRY_PROBE_AFTER = 1.0  # after a failed liveness probe, the next one does not wait the whole period
CHECK_TIMEOUT = 120.0


class Phase(StrEnum):
    """What the unit waits for; the module's first lines explain each."""

    IDLE = "idle"
    WAITING = "waiting"
    CHECKING = "checking"
    SERVING = "serving"
    DRAINING = "draining"
    DYING = "dying"
    BACKOFF = "backoff"
    ENDED = "ended"


class Unit:
    """One engine's life. `state` is public knowledge, `phase` and the rest are for the supervisor's own use."""

    def __init__(
        self,
        deadlines: Deadlines,
        restart: RestartPolicy,
        *,
        check: bool,
        proven: bool = False,
        proof: str = "it embeds",
    ) -> None:
        """`proven`: the same command served before, so that a failing first start is tried again as well. `proof`:
        what a good answer to a probe shows, in words."""
        self.state = State.STARTING
        self.phase = Phase.IDLE
        self.start = 0  # number of the current (or last) engine start
        self.pid: int | None = None
        self.fault: Fault | None = None
        self.restarts: list[float] = []  # when, as far back as the policy's window
        self.restart_count = 0
        self.alive = False  # whether the last probe spoke for it: an answer, work seen, or an excuse
        self._deadlines = deadlines
        self._restart = restart
        self._check = check
        self._proof = proof
        self._was_ready = proven
        self._stopping = False
        self._failures = 0
        self._excused = 0  # probes in a row that the machine kept from being answered
        self._probing = False
        self._due: float | None = None  # when the phase's next own step is due
        self._deadline: float | None = None  # when the phase has lasted too long
        self._last_answer = ""

    @property
    def wake_at(self) -> float | None:
        """When a Tick is due at the latest; None while only events matter."""
        due = [t for t in (self._due, self._deadline) if t is not None]
        return min(due) if due else None

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about an event at `now`."""
        if self.phase is Phase.ENDED:
            return []
        if isinstance(event, StopAsked):
            return self._stop(event, now)
        if isinstance(event, Begin):
            return self._spawn(now)
        if isinstance(event, Tick):
            return self._tick(now)
        if event.start != self.start:
            return []  # of an engine that has been replaced
        if isinstance(event, EngineSpawned):
            self.pid = event.pid
            return []
        if isinstance(event, Probed):
            return self._probed(event, now)
        if isinstance(event, Checked):
            return self._checked(event, now)
        if isinstance(event, EngineDoomed):
            serves = self.phase is Phase.SERVING  # before, its own last words say more
            return self._give_up(Fault(Cause.EXIT, event.reason), now) if serves else []
        if isinstance(event, EngineDied):
            return self._died(event.reason, now)
        if isinstance(event, Refused):
            useless = self.phase is Phase.SERVING
            return self._give_up(Fault(Cause.ANSWERS, event.reason), now) if useless else []
        if isinstance(event, EngineStuck):
            return [Note(f"not gone after SIGKILL: {', '.join(map(str, event.pids))}")]
        return self._gone(now)

    # ---- starting -------------------------------------------------------------------------------------------------

    def _spawn(self, now: float) -> list[Action]:
        self.start += 1
        self.pid = None
        self.alive = False
        self._failures = self._excused = 0
        self._probing = False
        self._last_answer = ""
        self.fault = None
        self._enter(Phase.WAITING, due=now, deadline=now + self._deadlines.start)
        return [Spawn(self.start)]

    def _tick(self, now: float) -> list[Action]:
        if self._deadline is not None and now >= self._deadline:
            return self._deadline_passed(now)
        if self._due is None or now < self._due:
            return []
        self._due = None
        if self.phase is Phase.WAITING:
            return self._probe(min(READY_PROBE_TIMEOUT, self._deadlines.start))
        if self.phase is Phase.SERVING:
            return self._probe(self._deadlines.probe)
        if self.phase is Phase.BACKOFF:
            return [self._move(State.STARTING, f"restart {self.restart_count}"), *self._spawn(now)]
        return []

    def _probe(self, timeout: float) -> list[Action]:
        self._probing = True
        return [Probe(self.start, timeout)]

    def _probed(self, event: Probed, now: float) -> list[Action]:
        if not self._probing:
            return []
        self._probing = False
        self.alive = event.answer.ok
        if self.phase is Phase.WAITING:
            return self._probed_while_starting(event, now)
        if self.phase is Phase.SERVING:
            return self._probed_while_serving(event, now)
        return []

    def _probed_while_starting(self, event: Probed, now: float) -> list[Action]:
        answer = event.answer
        if answer.ok:
            if not self._check:
                return self._ready(now, self._proof)
            self._enter(Phase.CHECKING, deadline=min(self._deadline or now, now + CHECK_TIMEOUT))
            return [Note(f"{self._proof}; smoke test"), Check(self.start, (self._deadline or now) - now)]
        self._due = now + READY_PROBE_EVERY
        self._last_answer = answer.detail
        # 4xx and wrong vectors do not heal with time; a few chances cover an engine that is still warming up.
        hopeless = answer.verdict is Verdict.WRONG or (
            answer.verdict is Verdict.REFUSED and 400 <= (answer.status or 500) < 500
        )
        self._failures = self._failures + 1 if hopeless else 0
        if self._failures < self._deadlines.probe_failures:
            return []
        return self._give_up(Fault(Cause.ANSWERS, answer.detail), now)

    def _checked(self, event: Checked, now: float) -> list[Action]:
        if self.phase is not Phase.CHECKING:
            return []
        if event.faults:
            return self._give_up(Fault(Cause.CHECK, "; ".join(event.faults), event.report), now)
        told = [Note(f"warning: {text}") for text in event.warnings]
        return [*told, *self._ready(now, "smoke test passed")]

    def _ready(self, now: float, reason: str) -> list[Action]:
        self._was_ready = True
        self._failures = 0
        self._enter(Phase.SERVING, due=now + self._deadlines.probe_every)
        return [self._move(State.READY, reason)]

    # ---- serving --------------------------------------------------------------------------------------------------

    def _probed_while_serving(self, event: Probed, now: float) -> list[Action]:
        answer = event.answer
        self._due = now + self._deadlines.probe_every
        if answer.ok:
            self._failures = self._excused = 0
            if self.state is State.DEGRADED:
                return [self._move(State.READY, f"{self._proof} again")]
            return []
        if answer.verdict is Verdict.SLOW and event.progress:
            self.alive = True
            self._failures = self._excused = 0  # it works: what came before is no longer in a row
            return [Note(f"busy: {answer.detail} to a probe, but the engine works on")]
        why = starved(event.strain) if answer.verdict is Verdict.SLOW else ""
        if why and self._excused < EXCUSES:
            return self._excuse(f"{answer.detail}, and none counted: {why}")
        self._failures += 1
        if self._failures >= self._deadlines.probe_failures:
            excused = f" ({self._excused} excused before)" if self._excused else ""
            reason = f"{self._failures} probes failed{excused}: {answer.detail}"
            return self._give_up(Fault(Cause.LIVENESS, reason), now)
        self._due = now + min(RETRY_PROBE_AFTER, self._deadlines.probe_every)
        if self.state is State.READY:
            return [self._move(State.DEGRADED, answer.detail)]
        return []

    def _excuse(self, reason: str) -> list[Action]:
        """No answer, and the machine is why: not the engine's fault, and still nothing that users would call ready."""
        self._excused += 1
        self.alive = True
        text = f"the machine is starved ({self._excused} of {EXCUSES}): {reason}"
        return [self._move(State.DEGRADED, text)] if self.state is State.READY else [Note(text)]

    # ---- dying ----------------------------------------------------------------------------------------------------

    def _give_up(self, fault: Fault, now: float) -> list[Action]:
        """The engine runs and is of no use: kill it."""
        return [Kill(), *self._die(fault, now)]

    def _died(self, reason: str, now: float) -> list[Action]:
        if self.phase is Phase.DYING:
            return []
        if self.phase is Phase.DRAINING:
            self._enter(Phase.DYING, deadline=now + self._deadlines.reap)
            return []
        return self._die(Fault(Cause.EXIT, reason), now)

    def _die(self, fault: Fault, now: float) -> list[Action]:
        self.fault = fault
        self._enter(Phase.DYING, deadline=now + self._deadlines.reap)
        return [self._move(State.RESTARTING, fault.reason)] if self._was_ready else []

    def _deadline_passed(self, now: float) -> list[Action]:
        if self.phase is Phase.DRAINING:
            self._enter(Phase.DYING, deadline=now + self._deadlines.reap)
            return [Note(f"not drained within {self._deadlines.drain:g} s"), Kill()]
        if self.phase is Phase.DYING:
            reason = f"its processes are still there {self._deadlines.reap:g} s after SIGKILL"
            return self._fail(Fault(Cause.STUCK, reason))
        if self.phase is Phase.CHECKING:
            return self._give_up(Fault(Cause.CHECK, "the smoke test did not end in time"), now)
        last = f" (last answer: {self._last_answer})" if self._last_answer else ""
        return self._give_up(Fault(Cause.DEADLINE, f"not ready within {self._deadlines.start:g} s{last}"), now)

    def _gone(self, now: float) -> list[Action]:
        if self._stopping:
            return self._stopped()
        if self.phase is not Phase.DYING or self.fault is None:
            return []
        if not self._was_ready:
            return self._fail(self.fault)
        self.restarts = [t for t in self.restarts if now - t < self._restart.window]
        if len(self.restarts) >= self._restart.limit:
            text = f"{len(self.restarts)} restarts within {self._restart.window:g} s; last: {self.fault.reason}"
            return self._fail(Fault(self.fault.cause, text, self.fault.report))
        pause = min(self._restart.longest, self._restart.first * self._restart.factor ** len(self.restarts))
        self.restarts.append(now)
        self.restart_count += 1
        self.pid = None
        self._enter(Phase.BACKOFF, due=now + pause)
        return [Note(f"next start in {pause:g} s")]

    # ---- stopping -------------------------------------------------------------------------------------------------

    def _stop(self, event: StopAsked, now: float) -> list[Action]:
        if self._stopping:
            if self.phase is Phase.DRAINING:
                self._enter(Phase.DYING, deadline=now + self._deadlines.reap)
                return [Note(f"{event.by}: killing it now"), Kill()]
            return []
        self._stopping = True
        moved = self._move(State.STOPPING, event.by)
        if self.phase in (Phase.IDLE, Phase.BACKOFF):
            return [moved, *self._stopped()]
        if self.phase is Phase.SERVING and event.drain:
            self._enter(Phase.DRAINING, deadline=now + self._deadlines.drain)
            return [moved, Terminate()]
        if self.phase is Phase.DYING:
            return [moved]
        self._enter(Phase.DYING, deadline=now + self._deadlines.reap)  # nobody is served: nothing to drain
        return [moved, Kill()]

    def _stopped(self) -> list[Action]:
        self.pid = None
        self._enter(Phase.ENDED)
        return [self._move(State.STOPPED, "nothing of it is left")]

    def _fail(self, fault: Fault) -> list[Action]:
        self.fault = fault
        self._enter(Phase.ENDED)
        return [self._move(State.FAILED, fault.reason)]

    def _enter(self, phase: Phase, *, due: float | None = None, deadline: float | None = None) -> None:
        self.phase, self._due, self._deadline = phase, due, deadline

    def _move(self, after: State, reason: str) -> Move:
        check_transition(self.state, after)
        before, self.state = self.state, after
        return Move(before, after, reason)
