"""Telling an engine that the machine starves from one that hangs: the evidence, the decision, the bound."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_up_machine import DEADLINES, OK, SLOW, Play

from qwen3emb_launch.engine_process import strain as strains
from qwen3emb_launch.engine_process.strain import Sample, Strain, Thread, Watch, between, sample
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Answer, Verdict
from qwen3emb_launch.up.events import Action, Kill, Move, Note, Probed
from qwen3emb_launch.up.starvation import EXCUSES, starved

QUIET = Strain(window=10.0, waited=0.01, ran=0.02, faults=0, memory=0.0, stolen=0.0)
STARVED = replace(QUIET, waited=9.5, ran=0.3)


@pytest.mark.parametrize(
    ("strain", "word"),
    [
        (QUIET, ""),
        (None, ""),
        (Strain(window=0.0), ""),
        (Strain(window=10.0), ""),  # a kernel that tells nothing excuses nothing
        (replace(QUIET, waited=9.5, ran=0.3), "processor"),
        (replace(QUIET, waited=9.5, ran=9.0), ""),  # it had its half
        (replace(QUIET, waited=2.0, ran=0.1), ""),  # it was idle most of the time
        (replace(QUIET, waited=0.0, ran=10.0), ""),  # it spins, and nobody else is there
        (replace(QUIET, late=1.5), "supervisor itself"),
        (replace(QUIET, late=0.2), ""),
        (replace(QUIET, faults=40), "disk"),
        (replace(QUIET, faults=3), ""),
        (replace(QUIET, memory=6.0), "memory"),
        (replace(QUIET, memory=0.5), ""),
        (replace(QUIET, stolen=0.8), "host"),
        (replace(QUIET, stolen=0.05), ""),
    ],
)
def test_what_counts_as_starved(strain: Strain | None, word: str) -> None:
    """Every sign has a threshold that a machine with time and memory does not reach; the sentence names the sign."""
    why = starved(strain)
    assert (word in why) if word else why == ""


class Starving(Play):
    """A ready unit whose probes go unanswered, with what the machine had to do with it."""

    def unanswered(self, strain: Strain | None, answer: Answer = SLOW) -> list[Action]:
        self.wait(DEADLINES.probe_every)
        return self.feed(Probed(self.unit.start, answer, strain=strain))


@pytest.fixture
def play() -> Starving:
    made = Starving()
    made.start()
    return made


def test_starved_engine_is_degraded_and_lives(play: Starving) -> None:
    """An engine without processor time is degraded, with the reason in its state; ready again when it embeds."""
    first, *_ = play.unanswered(STARVED)
    assert isinstance(first, Move)
    assert "9.5 s of 10.0 s for a processor" in first.reason
    for _ in range(EXCUSES - 1):
        assert all(isinstance(action, Note) for action in play.unanswered(STARVED))
        assert play.unit.alive
    play.wait(DEADLINES.probe_every)
    play.probed(OK)
    assert play.unit.state is State.READY
    assert play.count(Kill) == 0


def test_excuses_are_bounded(play: Starving) -> None:
    """A hang that shows the same signs (a spin on a busy machine) is found after so many excuses, and the fault says
    how many there were."""
    for _ in range(EXCUSES):
        play.unanswered(STARVED)
    for count in range(DEADLINES.probe_failures):
        assert play.count(Kill) == 0, count
        play.unanswered(STARVED)
        assert not play.unit.alive
    assert play.count(Kill) == 1
    assert play.unit.fault is not None
    assert f"{EXCUSES} excused before" in play.unit.fault.reason


def test_one_answer_renews_the_excuses(play: Starving) -> None:
    """The bound is for excuses in a row."""
    for _ in range(3):
        for _ in range(EXCUSES):
            play.unanswered(STARVED)
        play.wait(DEADLINES.probe_every)
        play.probed(OK)
    assert play.count(Kill) == 0


def test_work_that_was_seen_renews_the_excuses(play: Starving) -> None:
    """As an answer does."""
    for _ in range(3):
        for _ in range(EXCUSES):
            play.unanswered(STARVED)
        play.wait(DEADLINES.probe_every)
        play.probed(SLOW, progress=True)
    assert play.count(Kill) == 0


def test_hang_on_a_quiet_machine_has_no_excuse(play: Starving) -> None:
    """With time and memory to be had, silence is a hang, as soon as ever."""
    for _ in range(DEADLINES.probe_failures):
        play.unanswered(QUIET)
    assert play.count(Kill) == 1


def test_only_silence_is_excused(play: Starving) -> None:
    """A refused connection has nothing to do with the machine's time."""
    refused = Answer(Verdict.UNREACHABLE, 0.0, "connection refused")
    for _ in range(DEADLINES.probe_failures):
        play.unanswered(STARVED, refused)
    assert play.count(Kill) == 1


# ---- the evidence -------------------------------------------------------------------------------------------------


def longest(before: Sample, after: Sample) -> tuple[float, float]:
    found = between(before, after, 0.0)
    assert found.waited is not None
    assert found.ran is not None
    return round(found.waited, 6), round(found.ran, 6)


def test_the_longest_waiter_tells() -> None:
    """Of many threads the one that waited longest counts; a wait that has not ended is counted from its state."""
    before = Sample(0.0, {1: Thread(1, 1, False), 2: Thread(5, 5, False), 3: Thread(2, 2, True)})
    after = Sample(4.0, {1: Thread(1.5, 1.2, False), 2: Thread(5.1, 8.0, False), 4: Thread(0.5, 1.5, True)})
    assert longest(before, after) == (3.0, 0.1)
    stuck = Sample(4.0, {3: Thread(2, 2, True)})
    assert longest(before, stuck) == (4.0, 0.0)
    unborn = Sample(4.0, {1: Thread(1, 1, False), 5: Thread(0, 0, True)})
    assert longest(before, unborn) == (4.0, 0.0)  # it was made, and never ran
    asleep = Sample(4.0, {3: Thread(2, 2, False)})
    assert longest(before, asleep) == (0.0, 0.0)


def test_counters_become_shares() -> None:
    """Faults of processes that are in both looks, memory stalls in seconds, stolen time as a share."""
    before = Sample(0.0, faults={7: 10, 8: 1}, memory=1.0, stolen=2.0, processors=2)
    found = between(before, Sample(10.0, faults={7: 35, 9: 99}, memory=4.0, stolen=7.0, processors=2), 0.0)
    assert (found.faults, found.memory, found.stolen, found.waited) == (25, 3.0, 0.25, None)


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    """Missing files are unknown, not zero, and no error."""
    found = sample(os.getpid(), tmp_path, tmp_path)
    assert (found.threads, found.faults, found.memory, found.stolen) == ({}, {}, None, None)


def test_the_own_control_group_comes_first(tmp_path: Path) -> None:
    """Memory pressure is asked of the process's own group, where it has one; else of the machine."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "cgroup").write_text("3:cpu:/x\n0::/system.slice/qwen3emb.service\n")
    (tmp_path / "pressure").mkdir()
    (tmp_path / "pressure" / "memory").write_text("some avg10=0 avg60=0 avg300=0 total=2000000\nfull total=1\n")
    groups = tmp_path / "groups"
    assert sample(1, tmp_path, groups).memory == 2.0
    (groups / "system.slice" / "qwen3emb.service").mkdir(parents=True)
    (groups / "system.slice" / "qwen3emb.service" / "memory.pressure").write_text("some avg10=0 total=500000\n")
    assert sample(1, tmp_path, groups).memory == 0.5


SPIN = "import os\nos.sched_setaffinity(0, {cpu})\nprint(flush=True)\nwhile True: pass\n"


@pytest.fixture
def rivals() -> Iterator[list[subprocess.Popen[str]]]:
    """Eight processes that spin on one processor; the first of them is the one that is looked at."""
    script = SPIN.replace("{cpu}", repr({min(os.sched_getaffinity(0))}))
    group = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    try:
        for one in group:
            assert one.stdout
            one.stdout.readline()
        yield group
    finally:
        for one in group:
            one.kill()
            one.communicate()


def waits(before: Sample, after: Sample) -> str:
    """Whether a process was starved by what the test does: memory and host are the machine's own affair."""
    return starved(replace(between(before, after, 0.0), memory=None, stolen=None))


def test_a_real_waiter_and_a_real_hang(rivals: list[subprocess.Popen[str]]) -> None:
    """One of eight that want one processor is starved, as the kernel counts it; stopped by SIGSTOP it hangs, however
    busy the machine is."""
    pid = rivals[0].pid
    begin = sample(pid)
    if not begin.threads[pid].ran:
        pytest.skip("this kernel counts no waits (CONFIG_SCHED_INFO)")
    while waits(begin, now := sample(pid)) == "" and now.at - begin.at < 20:
        time.sleep(0.05)
    assert "for a processor" in waits(begin, now)
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    begin = sample(pid)
    while (now := sample(pid)).at - begin.at < 0.5:
        time.sleep(0.05)
    assert waits(begin, now) == ""


def test_watch_looks_only_at_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answered question costs no look at all; an unanswered one has two, and says how late the timers were."""
    looks: list[int] = []

    def look(root: int) -> Sample:
        looks.append(root)
        return Sample(time.monotonic())

    monkeypatch.setattr(strains, "sample", look)
    assert Watch(1, 100.0).end(slow=False) is None
    assert looks == []
    watch = Watch(1, 0.04)
    while not looks:
        time.sleep(0.005)
    found = watch.end(slow=True)
    assert found is not None
    assert looks == [1, 1]
    assert found.window > 0


def test_watch_that_cannot_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first look that failed is no sign of a timer that never ran: there is no evidence at all."""
    tried = threading.Event()

    def look(_: int) -> Sample:
        tried.set()
        raise OSError("no descriptor left")

    monkeypatch.setattr(strains, "sample", look)
    watch = Watch(1, 0.04)
    tried.wait(10)
    watch._timer.join(10)
    watch._begun -= 90.0
    assert watch.end(slow=True) is None


def test_watch_whose_timer_never_ran() -> None:
    """When not even the timer came to run, the supervisor itself was starved: that is the evidence."""
    watch = Watch(1, 100.0)
    watch._begun -= 90.0  # as if these seconds had passed in no time of this process's own
    found = watch.end(slow=True)
    assert found is not None
    assert "supervisor itself" in starved(found)
