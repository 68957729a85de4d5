"""The supervisor's decisions, replayed as histories of events on a clock that the test turns."""

from __future__ import annotations

from typing import Any

import pytest

from qwen3emb_launch.facts import Deadlines, RestartPolicy
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Answer, Verdict
from qwen3emb_launch.up.events import (
    Action,
    Begin,
    Cause,
    Check,
    Checked,
    EngineDied,
    EngineDoomed,
    EngineGone,
    EngineSpawned,
    Event,
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
from qwen3emb_launch.up.machine import READY_PROBE_EVERY, Phase, Unit

DEADLINES = Deadlines(start=100, probe=10, probe_every=20, probe_failures=3, drain=30, reap=5)
RESTART = RestartPolicy(first=1, factor=2, longest=5, limit=3, window=1000)
OK = Answer(Verdict.OK, 0.01)
SLOW = Answer(Verdict.SLOW, 10, "no answer within 10 s")
NAN = Answer(Verdict.WRONG, 0.01, "NaN")
REFUSED = Answer(Verdict.UNREACHABLE, 0, "connection refused")


class Play:
    """A unit and a clock. `at` turns the clock; ticks that fall due on the way happen when they are due."""

    def __init__(self, *, check: bool = False, restart: RestartPolicy = RESTART) -> None:
        self.unit = Unit(DEADLINES, restart, check=check)
        self.now = 0.0
        self.actions: list[Action] = []

    def feed(self, event: Event) -> list[Action]:
        new = self.unit.handle(event, self.now)
        self.actions += new
        return new

    def wait(self, seconds: float) -> list[Action]:
        """Let time pass, ticking whenever the unit asked for it; no event comes from outside."""
        end, new = self.now + seconds, []
        while self.unit.wake_at is not None and self.unit.wake_at <= end:
            self.now = max(self.now, self.unit.wake_at)
            new += self.feed(Tick())
        self.now = end
        return new

    def start(self) -> Play:
        """Up to ready."""
        self.feed(Begin())
        return self.to_ready()

    def to_ready(self) -> Play:
        self.feed(EngineSpawned(self.unit.start, 4711))
        self.wait(0)
        self.probed(OK)
        if self.unit.phase is Phase.CHECKING:
            self.feed(Checked(self.unit.start, ()))
        assert self.unit.state is State.READY
        return self

    def probed(self, answer: Answer, *, progress: bool = False) -> list[Action]:
        return self.feed(Probed(self.unit.start, answer, progress))

    def dies(self, reason: str = "it died") -> None:
        self.feed(EngineDied(self.unit.start, reason))
        self.feed(EngineGone(self.unit.start))

    @property
    def states(self) -> list[State]:
        return [a.after for a in self.actions if isinstance(a, Move)]

    def count(self, kind: type[Any]) -> int:
        return sum(isinstance(a, kind) for a in self.actions)


def test_ready_means_a_real_embedding() -> None:
    """Nothing but a good answer to a probe makes an instance ready."""
    play = Play()
    assert play.feed(Begin()) == [Spawn(1)]
    play.feed(EngineSpawned(1, 4711))
    assert isinstance(play.wait(0)[0], Probe)
    assert play.unit.state is State.STARTING
    play.probed(OK)
    assert play.states == [State.READY]


def test_a_listening_port_is_asked_again_soon() -> None:
    """An engine that does not listen yet is asked twenty times a second, one question at a time."""
    play = Play()
    play.feed(Begin())
    play.wait(0)
    for _ in range(50):
        play.probed(REFUSED)
        assert play.wait(READY_PROBE_EVERY) == [Probe(1, 30.0)]
    assert play.wait(5) == []  # the question in flight is not repeated


def test_smoke_test_stands_between_embedding_and_ready() -> None:
    """With a smoke test the first good embedding starts it, and only its success is ready."""
    play = Play(check=True)
    play.feed(Begin())
    play.wait(0)
    assert any(isinstance(a, Check) for a in play.probed(OK))
    assert play.states == []
    play.feed(Checked(1, ()))
    assert play.states == [State.READY]


def test_what_the_smoke_test_warns_of_is_said_before_ready() -> None:
    """A warning stops nothing; it is told first, since `up` prints the endpoint at ready."""
    play = Play(check=True)
    play.feed(Begin())
    play.wait(0)
    play.probed(OK)
    first, second = play.feed(Checked(1, (), warnings=("it is noisy",)))
    assert first == Note("warning: it is noisy")
    assert isinstance(second, Move)
    assert play.states == [State.READY]


def test_failed_smoke_test_ends_a_first_start() -> None:
    """A failing smoke test kills the engine, keeps the check's words, and the instance has failed."""
    play = Play(check=True)
    play.feed(Begin())
    play.wait(0)
    play.probed(OK)
    assert Kill() in play.feed(Checked(1, ("order is lost",), {"table": 1}))
    play.feed(EngineGone(1))
    assert play.unit.state is State.FAILED
    assert play.unit.fault is not None
    assert (play.unit.fault.cause, play.unit.fault.report) == (Cause.CHECK, {"table": 1})
    assert "order is lost" in play.unit.fault.reason


def test_a_smoke_test_that_never_ends_is_a_failure() -> None:
    """The check has a deadline too."""
    play = Play(check=True)
    play.feed(Begin())
    play.wait(0)
    play.probed(OK)
    assert Kill() in play.wait(100)


def test_never_ready_is_killed_at_the_deadline() -> None:
    """An engine that says nothing is killed when the start deadline passes, with the last answer in the reason."""
    play = Play()
    play.feed(Begin())
    play.wait(0)
    play.probed(REFUSED)
    assert Kill() in play.wait(100.0)
    assert play.count(Kill) == 1
    play.feed(EngineDied(1, "killed"))
    play.feed(EngineGone(1))
    assert play.unit.state is State.FAILED
    assert play.unit.fault is not None
    assert play.unit.fault.cause is Cause.DEADLINE
    assert "100 s" in play.unit.fault.reason
    assert "connection refused" in play.unit.fault.reason


@pytest.mark.parametrize("answer", [NAN, Answer(Verdict.REFUSED, 0, "HTTP 400", 400)])
def test_hopeless_answers_end_a_start_early(answer: Answer) -> None:
    """NaN, other dims and 4xx do not heal: after a few of them the start is given up before its deadline."""
    play = Play()
    play.feed(Begin())
    for _ in range(3):
        play.wait(READY_PROBE_EVERY)
        play.probed(answer)
    assert play.unit.phase is Phase.DYING
    assert play.now < 1


def test_warming_up_is_not_hopeless() -> None:
    """503 while the engine warms up is waited out."""
    play = Play()
    play.feed(Begin())
    for _ in range(20):
        play.wait(READY_PROBE_EVERY)
        play.probed(Answer(Verdict.REFUSED, 0, "HTTP 503", 503))
    assert play.unit.phase is Phase.WAITING


def test_first_start_that_dies_is_not_repeated() -> None:
    """A crash before the first ready fails the instance at once: somebody is waiting for the reason."""
    play = Play()
    play.feed(Begin())
    play.dies("exit 1")
    assert play.states == [State.FAILED]
    assert play.count(Spawn) == 1


def test_crash_is_answered_by_a_restart_when_nothing_is_left() -> None:
    """After a crash the next engine starts only once the old one's processes are gone, after the first pause."""
    play = Play().start()
    play.feed(EngineDied(1, "killed by SIGKILL"))
    assert play.states[-1] is State.RESTARTING
    assert play.wait(3) == []
    play.feed(EngineGone(1))
    assert play.wait(0.99) == []
    assert Spawn(2) in play.wait(0.01)
    play.to_ready()
    assert play.unit.restart_count == 1


def test_pauses_grow_and_restarts_end_at_the_limit() -> None:
    """Pauses double up to the longest; one restart more than the limit within the window is failure."""
    play = Play().start()
    pauses = []
    while play.unit.state is not State.FAILED:
        play.dies()
        before = play.now
        if play.unit.wake_at is not None:
            pauses.append(play.unit.wake_at - before)
            play.wait(pauses[-1])
    assert pauses == [1, 2, 4]
    assert play.unit.restart_count == 3
    assert play.unit.fault is not None
    assert "3 restarts within 1000 s" in play.unit.fault.reason


def test_old_restarts_are_forgotten() -> None:
    """Crashes further apart than the window never reach the limit, and each pause is the first again."""
    play = Play().start()
    for _ in range(10):
        play.wait(1)
        play.dies()
        assert play.unit.wake_at == play.now + 1
        play.wait(1)
        play.to_ready()
        for _ in range(60):  # a day without faults
            play.wait(20)
            play.probed(OK)
    assert play.unit.state is State.READY


def test_answers_of_a_replaced_engine_are_ignored() -> None:
    """An answer that arrives after its engine was replaced changes nothing."""
    play = Play().start()
    play.wait(20)
    play.dies()
    play.wait(1)
    assert play.unit.start == 2
    assert play.feed(Probed(1, OK)) == []
    assert play.unit.state is State.STARTING


def test_liveness_failures_degrade_then_kill() -> None:
    """A hanging engine is degraded at the first failed probe and killed at the third."""
    play = Play().start()
    play.wait(20)
    play.probed(SLOW)
    assert play.states[-1] is State.DEGRADED
    for _ in range(2):
        play.wait(1)
        play.probed(SLOW)
    assert play.count(Kill) == 1
    assert play.states[-1] is State.RESTARTING
    assert play.unit.fault is not None
    assert play.unit.fault.cause is Cause.LIVENESS


def test_what_says_that_it_is_lost_is_believed_while_it_serves() -> None:
    """Serving, it is killed at once and started again; while it starts, its own end says more than that."""
    play = Play()
    play.feed(Begin())
    assert play.feed(EngineDoomed(1, "lost a process")) == []
    play.to_ready()
    assert [type(action) for action in play.feed(EngineDoomed(1, "lost a process"))] == [Kill, Move]
    play.dies()
    assert play.unit.phase is Phase.BACKOFF
    assert play.unit.fault is not None
    assert (play.unit.fault.cause, play.unit.fault.reason) == (Cause.EXIT, "lost a process")


def test_slow_with_progress_is_busy_not_dead() -> None:
    """Behind a long queue the probe is slow for hours: while batches are seen the engine is neither degraded nor
    killed."""
    play = Play().start()
    for _ in range(200):
        play.wait(20)
        play.probed(SLOW, progress=True)
    assert play.unit.state is State.READY
    assert play.count(Kill) == 0


def test_work_ends_a_row_of_failures() -> None:
    """Slow, busy, slow, busy, slow is an engine that works: a batch seen between two failures parts them."""
    play = Play().start()
    for _ in range(2 * DEADLINES.probe_failures):
        play.wait(20)
        play.probed(SLOW)
        play.wait(20)
        play.probed(SLOW, progress=True)
    assert play.count(Kill) == 0


def test_wrong_vectors_count_though_the_engine_works_on() -> None:
    """NaN is a failure whatever else the engine does."""
    play = Play().start()
    play.wait(20)
    for _ in range(3):
        play.probed(NAN, progress=True)
        play.wait(1)
    assert play.unit.phase is Phase.DYING


def test_one_good_probe_forgives() -> None:
    """A degraded engine that embeds again is ready, and earlier failures no longer count."""
    play = Play().start()
    play.wait(20)
    for _ in range(10):
        play.probed(SLOW)
        play.wait(1)
        play.probed(OK)
        play.wait(20)
    assert play.count(Kill) == 0
    assert play.states[1:5] == [State.DEGRADED, State.READY, State.DEGRADED, State.READY]


def test_stop_drains_then_ends() -> None:
    """SIGTERM goes to the main process; when it has drained, the instance is stopped."""
    play = Play().start()
    assert Terminate() in play.feed(StopAsked("SIGTERM"))
    play.wait(10)
    play.dies()
    assert play.states[-2:] == [State.STOPPING, State.STOPPED]
    assert play.count(Kill) == 0


def test_stop_kills_what_does_not_drain() -> None:
    """After the drain deadline everything is killed."""
    play = Play().start()
    play.feed(StopAsked("SIGTERM"))
    assert play.wait(29.9) == []
    assert Kill() in play.wait(0.2)
    play.dies()
    assert play.unit.state is State.STOPPED


def test_second_stop_does_not_wait() -> None:
    """The second Ctrl-C kills at once."""
    play = Play().start()
    play.feed(StopAsked("SIGINT"))
    assert Kill() in play.feed(StopAsked("SIGINT"))
    assert play.feed(StopAsked("SIGINT")) == []


def test_stop_while_starting_kills_at_once() -> None:
    """Nobody is served yet, so nothing is drained."""
    play = Play(check=True)
    play.feed(Begin())
    assert Kill() in play.feed(StopAsked("SIGINT"))
    play.dies()
    assert play.states == [State.STOPPING, State.STOPPED]


def test_stop_between_restarts_ends_at_once() -> None:
    """During a pause nothing runs: stopped immediately, and no engine starts afterwards."""
    play = Play().start()
    play.dies()
    play.feed(StopAsked("SIGTERM"))
    assert play.states[-2:] == [State.STOPPING, State.STOPPED]
    assert play.wait(100) == []


def test_stop_during_a_crash_waits_for_its_remains() -> None:
    """A stop while a dead engine's remains are removed ends when they are gone, without a restart."""
    play = Play().start()
    play.feed(EngineDied(1, "crash"))
    play.feed(StopAsked("SIGTERM"))
    assert play.unit.state is State.STOPPING
    play.feed(EngineGone(1))
    assert play.unit.state is State.STOPPED
    assert play.count(Spawn) == 1


def test_unkillable_processes_are_a_failure_not_a_second_engine() -> None:
    """Where SIGKILL does not help, no new engine is started beside the old one."""
    play = Play().start()
    play.feed(EngineDied(1, "crash"))
    play.wait(100)
    assert play.unit.state is State.FAILED
    assert play.unit.fault is not None
    assert play.unit.fault.cause is Cause.STUCK
    assert play.count(Spawn) == 1


def test_nothing_happens_after_the_end() -> None:
    """Events after stopped or failed are ignored."""
    play = Play()
    play.feed(Begin())
    play.dies()
    for event in (Tick(), StopAsked("x"), Probed(1, OK), EngineDied(1, "y"), EngineGone(1)):
        assert play.feed(event) == []
    assert play.unit.wake_at is None


def test_a_proven_command_is_tried_again() -> None:
    """Where the same command served before, a first start that fails is answered like a crash, up to the limit."""
    play = Play()
    play.unit = Unit(DEADLINES, RESTART, check=False, proven=True)
    play.feed(Begin())
    play.dies()
    assert play.states == [State.RESTARTING]
    play.wait(RESTART.first)
    play.to_ready()
    assert play.unit.restart_count == 1


def test_nothing_to_drain_is_not_waited_for() -> None:
    """An engine whose gateway has gone is killed at once: nobody waits for its answers."""
    play = Play().start()
    play.feed(StopAsked("SIGTERM", drain=False))
    assert play.count(Terminate) == 0
    assert play.count(Kill) == 1
    play.feed(EngineGone(play.unit.start))
    assert play.unit.state is State.STOPPED


def test_a_refused_engine_is_of_no_use() -> None:
    """What the gateway refuses is killed and started again while it serves, and not heeded while it starts."""
    play = Play()
    play.feed(Begin())
    assert play.feed(Refused(play.unit.start, "another model's vectors")) == []
    play.to_ready()
    play.feed(Refused(play.unit.start, "another model's vectors"))
    assert play.count(Kill) == 1
    assert play.states[-1] is State.RESTARTING
    assert play.unit.fault is not None
    assert play.unit.fault.cause is Cause.ANSWERS
