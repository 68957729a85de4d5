"""The supervisor: feeds the machines, carries out their actions, keeps the instance's record, tells its listeners.

One thread decides; everything that may block (engines, the gateway, probes, smoke tests, replacements) runs elsewhere
and puts events into one queue. Signal handlers put an event there too and do nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from qwen3emb_launch.engine_process.guard import become_subreaper
from qwen3emb_launch.errors import LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.lifecycle import TERMINAL, State
from qwen3emb_launch.state import Claim, InstanceRecord
from qwen3emb_launch.up.checks import Checks
from qwen3emb_launch.up.events import Action, Begin, Cause, Check, Event, Move, Note, Probed, Refused, StopAsked, Tick
from qwen3emb_launch.up.gateway_runner import RESTART, GatewayRunner, GatewaySpec
from qwen3emb_launch.up.link import GatewayLink
from qwen3emb_launch.up.machine import Phase, Unit
from qwen3emb_launch.up.member import Member
from qwen3emb_launch.up.overall import SERVING, overall, steps
from qwen3emb_launch.up.reporter import Listener, Reporter
from qwen3emb_launch.up.runner import EngineRunner, EngineSpec, engine_spec
from qwen3emb_launch.up.stages import aside, stage
from qwen3emb_launch.up.verdict import failure

LOOK_EVERY = 0.5  # seconds between two looks at a starting engine's log
PULSE_EVERY = 5.0  # seconds; the loop turns at least that often where somebody watches it


@dataclass(frozen=True)
class Outcome:
    """How an instance's life ended. `stopped_by` is the signal's name; `error` is set when it failed."""

    state: State
    was_ready: bool
    stopped_by: str | None
    error: LaunchError | None


Message = tuple[Member, Event] | StopAsked | Callable[[], None]


class Supervisor:
    """Runs one instance from its claim to its end: its engines, and the gateway before them where there is one."""

    def __init__(
        self,
        plan: LaunchPlan,
        claim: Claim,
        *,
        check_argv: Sequence[str] | None = None,
        gateway: GatewaySpec | None = None,
        listeners: Sequence[Listener] = (),
        pulse: Callable[[bool], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan = plan
        self.claim = claim
        self.engines: list[Member] = []  # the instance's own, in the order of their names
        self.others: list[Member] = []  # candidates of a replacement, and what one replaced
        self.gateway: Member | None = None
        self.link = GatewayLink(gateway, claim.folder) if gateway else None
        self.changed = threading.Condition()  # notified after every event
        self._check_argv = check_argv
        self._reporter = Reporter(plan, claim, listeners, needs_key=gateway is not None and gateway.secured)
        self._pulse = pulse  # called at least every PULSE_EVERY; True: a probe has just spoken for an engine
        self._clock = clock
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._numbers = 0
        self._look_at = 0.0
        self._stopping: StopAsked | None = None
        self._failed: Member | None = None  # with it the instance fails, once the others are gone
        self._error: LaunchError | None = None
        if gateway:
            self.gateway = self._new_gateway(gateway)
        self._checks = Checks(self.gateway)
        for slot in range(plan.replicas):
            spec = engine_spec(plan)
            name, spec = ("engine", spec) if slot == 0 else (f"engine-{slot + 1}", spec.elsewhere())
            self.engines.append(self.new_engine(name, plan, spec=spec))

    # ---- its processes --------------------------------------------------------------------------------------------

    def new_engine(
        self,
        name: str,
        plan: LaunchPlan,
        *,
        spec: EngineSpec | None = None,
        check: bool = True,
        proven: bool = False,
    ) -> Member:
        """An engine of a plan, not started. `proven`: its command served before."""
        self._numbers += 1
        check_argv = self._check_argv if check else None
        unit = Unit(plan.deadlines, plan.restart, check=check_argv is not None, proven=proven)
        runner = EngineRunner(
            name,
            spec or engine_spec(plan),
            self.claim,
            lambda event: self._inbox.put((member, event)),
            self._kept_processes,
            check_argv=check_argv,
            number=self._numbers,
        )
        member = Member(name, unit, runner)
        return member

    def _new_gateway(self, spec: GatewaySpec) -> Member:
        unit = Unit(spec.deadlines(self.plan.deadlines), RESTART, check=False, proof="it listens")
        runner = GatewayRunner(
            spec,
            self.claim,
            lambda event: self._inbox.put((member, event)),
            self._kept_processes,
            lambda: self.link.wanted if self.link else {},
        )
        member = Member("gateway", unit, runner)
        return member

    @property
    def members(self) -> list[Member]:
        """Everything it looks after, the gateway first: it is started first."""
        return [*([self.gateway] if self.gateway else []), *self.engines, *self.others]

    def _kept_processes(self) -> set[int]:
        return set().union(*(member.runner.children for member in self.members))

    # ---- from other threads ---------------------------------------------------------------------------------------

    def stop(self, by: str) -> None:
        """Ask for the end, from any thread or signal handler; a second time means at once."""
        self._inbox.put(StopAsked(by))

    def note(self, text: str) -> None:
        """A line to every listener, from any thread."""
        self._inbox.put(lambda: self.say(text))

    def do(self, order: Callable[[], None]) -> None:
        """Have the deciding thread do something, and wait until it did; what it raises is raised here.

        Raises UnfitError `stopping` when the instance ends before.
        """
        done = threading.Event()
        failed: list[Exception] = []

        def ordered() -> None:
            try:
                if not self.ending:
                    order()
            except Exception as error:  # noqa: BLE001 - it belongs to the one who ordered, not to the supervisor
                failed.append(error)
            done.set()

        self._inbox.put(ordered)
        while not done.wait(0.1):
            if self.ending:
                raise UnfitError("stopping", f"{self.plan.name} is being stopped", f"qwen3emb status {self.plan.name}")
        if failed:
            raise failed[0]

    @property
    def ending(self) -> bool:
        """Whether it was asked to stop, or has failed."""
        return self._stopping is not None or self._failed is not None or self.record.state in TERMINAL

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Serve until stopped or failed. Nothing of engines and gateway is left when it returns."""
        become_subreaper()
        self._reporter.begin()
        try:
            for member in self.members:
                self.feed(member, Begin())
            while self.record.state not in TERMINAL:
                message = self._next_message()
                self._take(message)
                self._look_at_logs()
                if self._pulse:
                    self._pulse(self._shows_life(message))
        finally:
            for member in self.members:
                member.runner.close()
            if self.link:
                self.link.close()
        stopped_by = self._stopping.by if self._stopping else None
        return Outcome(self.record.state, self.record.ready_at is not None, stopped_by, self._error)

    def _shows_life(self, message: Message | None) -> bool:
        """Whether a probe spoke for an engine (see `Unit.alive`), with a gateway before it."""
        if not isinstance(message, tuple) or message[0] not in self.engines:
            return False
        member, event = message
        alive = isinstance(event, Probed) and event.start == member.unit.start and member.unit.alive
        return alive and (self.gateway is None or self.gateway.unit.state in SERVING)

    def _next_message(self) -> Message | None:
        """The next event; None when a machine's time has come."""
        now = self._clock()
        times = [member.unit.wake_at for member in self.members]
        times += [self._look_due(), now + PULSE_EVERY if self._pulse else None]
        due = [t for t in times if t is not None]
        try:
            return self._inbox.get(timeout=max(0.0, min(due) - now)) if due else self._inbox.get()
        except Empty:
            return None

    def _take(self, message: Message | None) -> None:
        if isinstance(message, StopAsked):
            self._stop(message)
        elif isinstance(message, tuple):
            self.feed(*message)
        elif message is not None:
            message()
        now = self._clock()
        for member in self.members:
            if member.unit.wake_at is not None and member.unit.wake_at <= now:
                self.feed(member, Tick())
        with self.changed:
            self.changed.notify_all()

    def feed(self, member: Member, event: Event) -> None:
        """Let one machine decide, do what it says, and see what that makes of the instance."""
        pid = member.unit.pid
        for action in member.unit.handle(event, self._clock()):
            self._act(member, action)
        if isinstance(member.runner, GatewayRunner) and isinstance(event, Probed):
            self._heed(member.runner.refused)
        self.route()
        if member.unit.pid != pid:
            self.publish()

    def _heed(self, refused: Mapping[str, str]) -> None:
        """An engine that the gateway refuses serves nobody, however well it answers: its model's files changed."""
        for engine in self.engines:
            if engine.runner.url in refused:
                reason = f"the gateway refuses it: {refused[engine.runner.url]}"
                self.feed(engine, Refused(engine.unit.start, reason))

    def route(self) -> None:
        """Tell the gateway which engines may have traffic now."""
        if self.link:
            self.link.want(
                {
                    member.runner.url: member.runner.key
                    for member in (*self.engines, *self.others)
                    if member.wants_traffic and isinstance(member.runner, EngineRunner)
                }
            )

    def _act(self, member: Member, action: Action) -> None:
        if isinstance(action, Move):
            self._moved(member, action)
        elif isinstance(action, Note):
            self.say(self._named(member, action.text))
        elif isinstance(action, Check):
            rivals = any(other.wants_traffic for other in self.engines if other is not member)
            first = self.record.ready_at is None and not member.held_back and not rivals
            self._checks.begin(member, action, first=first)
        else:
            member.runner.act(action)

    # ---- changes of state -----------------------------------------------------------------------------------------

    def _moved(self, member: Member, move: Move) -> None:
        member.reason = move.reason
        if move.after is State.READY:
            member.runner.serves()
        if move.after is State.FAILED and member.unit.fault:
            member.error = member.runner.own_words() or failure(member.unit.fault, member.runner, member.stage)
        if member is self.gateway and self.link:
            self.link.there(move.after in SERVING)
            self._checks.gateway_moved()
        if len(self.members) > 1:
            self._reporter.unit_moved(member, move)
        before = self.record.state
        if member in self.others and not (self._stopping or self._failed):
            self.publish()
        else:  # the instance's own, or at its end any: a candidate may be the last to go
            self.settle(member)
        if self.record.state is before and len(self.members) > 1:  # else the instance's own line has said it
            self.say(f"{member.name}: {move.after}: {move.reason}")

    def settle(self, member: Member) -> None:
        """Bring the instance's state up to date after a move of one of its own."""
        if self._stopping or self._failed:
            self._finish()
            self.publish()
            return
        after = overall(
            [m.unit.state for m in self.engines],
            self.gateway.unit.state if self.gateway else None,
            was_ready=self.record.ready_at is not None,
        )
        if after is State.FAILED:
            self._fail(member)
            return
        for state in steps(self.record.state, after):
            self._move(state, self._named(member, member.reason))
        if member.unit.state is State.FAILED and member.error:
            left = sum(m.unit.state is not State.FAILED for m in self.engines)
            self.say(
                f"{member.name} HAS FAILED and is not started again; {left} of {len(self.engines)} engines go on. "
                f"qwen3emb restart {self.plan.name} tries it anew. {member.error.message}"
            )
        self.publish()

    def _fail(self, member: Member) -> None:
        """Nothing can be served any more: end the others, then say so."""
        self._failed = member
        self._error = member.error
        for other in self.members:
            if not other.ended:
                self.feed(other, StopAsked(f"{member.name} failed", drain=False))
        self._finish()

    def _stop(self, asked: StopAsked) -> None:
        """The gateway drains first, and what the engines answer then is all theirs; without one, engines drain."""
        again = self._stopping is not None
        if not again:
            self._stopping = asked
            if not self._failed:
                self._move(State.STOPPING, asked.by)
        gateway = self.gateway
        if gateway and not gateway.ended:  # before ready nobody is served: what waits there is the smoke test
            self.feed(gateway, replace(asked, drain=self.record.ready_at is not None))
        for member in [*self.engines, *self.others]:
            if member.ended or (gateway and member.unit.phase is Phase.SERVING and not again and not gateway.ended):
                continue  # the gateway's requests are still being answered
            self.feed(member, replace(asked, drain=gateway is None and not again))
        self._finish()

    def _finish(self) -> None:
        """While the end is under way: engines follow the gateway, and the instance ends with the last process."""
        if self._stopping and self.gateway and self.gateway.ended:
            for member in [*self.engines, *self.others]:
                if not member.ended and member.unit.state is not State.STOPPING:
                    self.feed(member, StopAsked(self._stopping.by, drain=False))
        if self.record.state in TERMINAL or not all(member.ended for member in self.members):
            return
        stuck = next((m for m in self.members if m.error and m.unit.fault and m.unit.fault.cause is Cause.STUCK), None)
        failed = self._failed or stuck
        if failed:
            self._error = self._error or failed.error
            for state in steps(self.record.state, State.FAILED):
                self._move(state, self._named(failed, failed.reason))
        else:
            self._move(State.STOPPED, "nothing of it is left")

    def _named(self, member: Member, text: str) -> str:
        """Where there are several engines, or it is the gateway, a sentence says whose it is."""
        return text if member.is_engine and len(self.engines) + len(self.others) == 1 else f"{member.name}: {text}"

    # ---- what others see ------------------------------------------------------------------------------------------

    @property
    def record(self) -> InstanceRecord:
        """The instance as instance.json shows it."""
        return self._reporter.record

    def publish(self) -> None:
        """Write instance.json."""
        gateway = [self.gateway] if self.gateway else []
        self._reporter.publish(self.engines, [*self.others, *gateway], self._error)

    def _move(self, after: State, reason: str) -> None:
        self.publish()
        self._reporter.moved(after, reason)

    def say(self, text: str) -> None:
        """A line to every listener; from the deciding thread."""
        self._reporter.say(text)

    # ---- what a long start waits for ------------------------------------------------------------------------------

    def _look_due(self) -> float | None:
        starting = any(m.is_engine and m.unit.state is State.STARTING for m in self.members)
        return self._look_at if starting else None

    def _look_at_logs(self) -> None:
        now = self._clock()
        if self._look_due() is None or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        for member in self.members:
            if not member.is_engine or member.unit.state is not State.STARTING:
                continue
            lines = member.runner.new_lines()
            for missing in filter(None, map(aside, lines)):
                if missing not in member.asides:
                    member.asides.add(missing)
                    self.say(self._named(member, missing))
            seen = [text for line in lines if (text := stage(line))]
            if seen and seen[-1] != member.stage:
                member.stage = seen[-1]
                self._reporter.stage(self._named(member, member.stage))
