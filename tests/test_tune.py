"""`tune`: what is tried, in what order, how the time is spent, who wins. Engines and the clock are made up here."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import planning_cases as cases
import pytest
import yaml

from qwen3emb_launch import planning
from qwen3emb_launch.cost import Costs
from qwen3emb_launch.errors import CheckFailedError, EngineFailedError, InvalidInputError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.profile_text import parse_profile
from qwen3emb_launch.statistics import parse_slo
from qwen3emb_launch.tune import contest, levels, report, strategy, winner
from qwen3emb_launch.tune.budget import Estimates, next_step
from qwen3emb_launch.tune.contest import Verdict
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.tune.machine import Setup
from qwen3emb_launch.tune.objective import Goal, Objective
from qwen3emb_launch.tune.runner import Tuning
from qwen3emb_launch.tune.space import Factor, View, derive, in_order, read_space
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof, Round, Stage, Status, Trial, moves

SLO = parse_slo("p95=100ms")
THROUGHPUT = Objective(Goal.THROUGHPUT, SLO)
IDENTITY = {"profile_hash": "abc", "space": {"a": ["1"]}}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measurement(level: float = 16, rate: float = 100.0, p95: float = 50.0, **more: object) -> Measurement:
    values = {
        "level": level, "seconds": 4.0, "requests_per_s": rate, "texts_per_s": rate, "tokens_per_s": 33 * rate,
        "p50": p95 / 2, "p95": p95, "p99": p95 * 2, "objective_ms": p95, "error_rate": 0.0, "memory_bytes": 1 << 30,
        "misses": (f"p95 {p95:g} ms > 100 ms",) if p95 > 100 else (),
    }  # fmt: skip
    return Measurement(**{**values, **more})


def trial(number: int, changed: Mapping[str, str], *measured: Measurement, status: Status = Status.OK) -> Trial:
    stage = Stage.MOVE if changed else Stage.BASELINE
    return Trial(number, stage, moves(changed), status, ready_s=10.0, measurements=measured, seconds=20.0)


@dataclass
class Engine:
    """A closed loop on a server of `peak` texts/s that answers one text in `alone` ms: Little's law, and a queue."""

    machine: Machine
    moves: Moves
    ready_s: float = 10.0

    def prove(self) -> Proof:
        self.machine.clock.now += 1
        bad = self.machine.wrong & {key for key, _ in self.moves}
        return Proof(not bad, f"{sorted(bad)} changed the vectors" if bad else "12 checks passed", "f1", 1.0)

    def measure(self, level: float, seconds: float) -> Measurement:
        machine = self.machine
        machine.clock.now += seconds + 1
        machine.measured.append((self.moves, level, seconds))
        if machine.stop_at is not None and len(machine.measured) >= machine.stop_at:
            raise KeyboardInterrupt
        if machine.dies & set(self.moves) or len(machine.measured) == machine.dies_at:
            raise EngineFailedError("engine_died", "the engine died under it", "qwen3emb logs")
        peak, alone = machine.peak(self.moves), machine.alone(self.moves)
        rate = min(peak, level / alone * 1000) * machine.noise()
        p95 = max(alone, level / rate * 1000) * 1.2
        memory = (1 << 30) - sum(machine.saves.get(pair, 0) for pair in self.moves)
        return measurement(level, rate, p95, seconds=seconds + 1, memory_bytes=memory)


@dataclass
class Machine:
    """Engines whose speed is the product of what each setting gives."""

    clock: Clock
    gives: Mapping[tuple[str, str], float] = field(default_factory=dict)
    faster: Mapping[tuple[str, str], float] = field(default_factory=dict)
    saves: Mapping[tuple[str, str], int] = field(default_factory=dict)
    refuses: frozenset[tuple[str, str]] = frozenset()
    same: frozenset[tuple[str, str]] = frozenset()
    fails: frozenset[tuple[str, str]] = frozenset()
    dies: frozenset[tuple[str, str]] = frozenset()
    wrong: frozenset[str] = frozenset()
    places: int = 3
    ready: float = 10.0
    compiles: float = 0.0  # seconds more of the first start
    spread: float = 0.0
    base_peak: float = 400.0
    base_alone: float = 20.0
    stop_at: int | None = None
    dies_at: int | None = None
    started: list[Moves] = field(default_factory=list)
    measured: list[tuple[Moves, float, float]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(1))

    def noise(self) -> float:
        return 1 + self.spread * self.random.uniform(-1, 1)

    def peak(self, changed: Moves) -> float:
        found = self.base_peak
        for pair in changed:
            found *= self.gives.get(pair, 1.0)
        return found

    def alone(self, changed: Moves) -> float:
        found = self.base_alone
        for pair in changed:
            found *= self.faster.get(pair, 1.0)
        return found

    def plan(self, changed: Moves) -> str:
        for pair in changed:
            if pair in self.refuses:
                raise InvalidInputError("known_bad", f"{pair} is known to be bad", "leave it out")
        return json.dumps([p for p in changed if p not in self.same])

    @contextmanager
    def start(self, changed: Moves, slot: int, within: float) -> Iterator[Engine]:
        if self.running >= self.places:
            raise UnfitError("vram", "no room beside the others", "")
        ready = self.ready + (0.0 if self.started else self.compiles)
        self.started.append(changed)
        self.clock.now += min(ready, within)
        if ready > within:
            raise EngineFailedError("out_of_time", "did not serve in time", "")
        if self.fails & set(changed):
            raise EngineFailedError("out_of_memory", "CUDA out of memory", "", {"last_lines": ["OOM"]})
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            yield Engine(self, changed, ready)
        finally:
            self.running -= 1
            self.clock.now += 1


def factors(*pairs: tuple[str, str]) -> tuple[Factor, ...]:
    by: dict[str, tuple[str, ...]] = {}
    for key, value in pairs:
        by[key] = (*by.get(key, ()), value)
    return tuple(Factor(k, v, "because") for k, v in by.items())


A, B, C = ("a", "1"), ("b", "1"), ("c", "1")


@dataclass
class Run:
    tuning: Tuning
    machine: Machine
    journal: Journal
    clock: Clock
    verdict: Verdict

    @property
    def tried(self) -> dict[str, Status]:
        return {t.label: t.status for t in self.journal.trials}


def tune(
    path: Path,
    *tried: tuple[str, str],
    objective: Objective = THROUGHPUT,
    budget: float = 3600,
    rounds: int = 5,
    resume: bool = False,
    start: float = 4,
    open_loop: bool = False,
    apart: bool = False,
    space: tuple[Factor, ...] = (),
    **machine: object,
) -> Run:
    clock = Clock()
    made = Machine(clock, **machine)
    journal = Journal(path / "run.tune.jsonl", IDENTITY, resume=resume)
    setup = Setup(objective, space or factors(*tried), start, open_loop, 12.0, 1.0, budget, rounds, apart)
    tuning = Tuning(setup, made, journal, clock)
    try:
        return Run(tuning, made, journal, clock, tuning.run())
    finally:
        journal.close()


# ---- the run ------------------------------------------------------------------------------------------------------


def test_what_helps_alone_is_combined_and_wins_the_final(tmp_path: Path) -> None:
    """Two settings that each help are tried together; the final confirms the pair with an interval above 1."""
    run = tune(tmp_path, A, B, C, gives={A: 1.3, B: 1.2, C: 0.8}, spread=0.01)
    assert run.verdict.winner == (A, B)
    assert run.verdict.confirmed
    ratio = run.verdict.ratios[(A, B)]
    assert ratio.low is not None
    assert ratio.low > 1.4
    assert ratio.value == pytest.approx(1.56, rel=0.05)
    assert set(run.tried.values()) == {Status.OK}
    assert list(run.tried) == ["baseline", "a=1", "b=1", "c=1", "a=1 b=1"]
    assert run.machine.most_running == 3


def test_noise_does_not_choose(tmp_path: Path) -> None:
    """Settings that change nothing, measured with 8% of noise, beat the baseline no oftener than chance allows."""
    settings = [(name, "1") for name in "abcde"]
    runs = [tune(tmp_path / str(n), *settings, spread=0.08, random=random.Random(n)) for n in range(30)]
    assert sum(run.verdict.winner != () for run in runs) <= 3  # 2 finalists, 2.5% each


def test_later_stages_measure_for_longer(tmp_path: Path) -> None:
    """A quarter of the time for single settings, half for combinations, all of it in a round of the final."""
    run = tune(tmp_path, A, B, gives={A: 1.3, B: 1.2})
    by_stage = {
        label: {s for m, _, s in run.machine.measured if m == m_} for label, m_ in (("b", ()), ("pair", (A, B)))
    }
    assert by_stage == {"b": {3.0, 6.0, 12.0}, "pair": {6.0, 12.0}}


@pytest.mark.parametrize(
    ("what", "status", "code"),
    [
        ({"refuses": frozenset({A})}, Status.REFUSED, "known_bad"),
        ({"same": frozenset({A})}, Status.SAME, "same_command"),
        ({"fails": frozenset({A})}, Status.FAILED, "out_of_memory"),
        ({"dies": frozenset({A})}, Status.FAILED, "engine_died"),
        ({"wrong": frozenset({"a"}), "gives": {A: 9.0}}, Status.WRONG, "verification_failed"),
    ],
)
def test_a_trial_that_fails_is_a_result_with_its_reason(tmp_path: Path, what, status: Status, code: str) -> None:
    """Refused, same, out of memory, dead under load, wrong vectors: recorded, never chosen, and the run goes on."""
    run = tune(tmp_path, A, B, **{"gives": {B: 1.5}, **what})
    failed = next(t for t in run.journal.trials if t.label == "a=1")
    assert (failed.status, failed.code) == (status, code)
    assert failed.reason
    assert run.verdict.winner in ((B,), ())
    assert all(A not in t.moves for t in run.journal.trials if t.stage is Stage.COMBINATION)
    if status in (Status.REFUSED, Status.SAME):
        assert (A,) not in run.machine.started
        assert failed.number == 0
        assert report.set_aside(run.journal.trials) == (f"a=1: {status}: {failed.reason}",)
    assert [t.number for t in run.journal.trials if t.number] == list(range(1, len(run.tried) + (failed.number > 0)))
    rows = [row[1] for row in report.rows(run.journal.trials, THROUGHPUT, False)]
    assert ("a=1" in rows) is (failed.number > 0)


@pytest.mark.parametrize("open_loop", [False, True])
def test_a_limit_that_the_load_stays_below_costs_no_start(tmp_path: Path, open_loop: bool) -> None:
    """Twice what the baseline had in flight is between 10 and 512 texts; a resumed run knows it too."""
    limits = (Factor("a", ("1024", "10"), "", limits="texts", present=512), Factor("b", ("1",), ""))
    for resume in (False, True):
        start = 300 if open_loop else 4
        run = tune(tmp_path, space=limits, start=start, open_loop=open_loop, resume=resume)
        assert run.tried["a=1024"] is Status.UNREACHED
        assert run.tried["a=10"] is run.tried["b=1"] is Status.OK
        assert not any(("a", "1024") in started for started in run.machine.started)
    (aside,) = report.set_aside(run.journal.trials)
    assert aside.startswith("a=1024: unreached: no batch of this load passes 512 texts (")


def test_a_baseline_that_does_not_serve_ends_the_run(tmp_path: Path) -> None:
    """There is nothing to compare with: the engine's own reason, exit 4."""
    clock = Clock()
    machine = Machine(clock, ready=1e9)
    with Journal_(tmp_path) as journal, pytest.raises(CheckFailedError, match="baseline"):
        Tuning(Setup(THROUGHPUT, factors(A), 4, False, 12, 1, 600, 5), machine, journal, clock).run()
    assert clock.now <= 600


def test_a_baseline_that_failed_is_tried_again(tmp_path: Path) -> None:
    """Once the cause is mended, with --resume and without: the failure left nothing worth keeping."""
    for resume in (True, False):
        with Journal_(tmp_path, resume=resume) as journal:
            journal.add(trial(1, {}, status=Status.FAILED))
            journal.end("failed")
        with Journal_(tmp_path, resume=resume) as journal:
            assert not journal.trials


@contextmanager
def Journal_(path: Path, resume: bool = False, **identity: object) -> Iterator[Journal]:  # noqa: N802
    journal = Journal(path / "run.tune.jsonl", {**IDENTITY, **identity}, resume=resume)
    try:
        yield journal
    finally:
        journal.close()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("budget", [30, 60, 90, 150, 200, 300, 420])
def test_the_budget_is_never_exceeded(tmp_path: Path, budget: float, apart: bool) -> None:
    """Whatever it is, the run is over in time; what was not tried is named and a final is held only if it fits."""
    run = tune(tmp_path, A, B, C, budget=budget, apart=apart, gives={A: 1.3, B: 1.2})
    assert run.clock.now <= budget
    single = {"a=1", "b=1", "c=1"}
    assert single <= {*run.tried, *run.tuning.untried}
    if run.tuning.untried:
        assert any("untried" in note for note in run.tuning.notes)


def test_a_budget_for_the_baseline_alone_claims_nothing_of_the_rest(tmp_path: Path) -> None:
    """What was not tried is not said to be worse; what the planner refuses is known all the same."""
    run = tune(tmp_path, A, B, budget=45, refuses=frozenset({B}))
    assert run.tuning.untried == ["a=1"]
    assert run.tried == {"baseline": Status.OK, "b=1": Status.REFUSED}
    assert run.verdict == Verdict((), "nothing but the baseline was measured")


@pytest.mark.parametrize(
    ("budget", "tried", "rounds"),
    [
        (45, [], 0),
        (70, ["a=1"], 0),
        (130, ["a=1", "b=1", "c=1", "a=1 b=1"], 0),  # no final would fit after any of them: none is waited for
        (190, ["a=1"], 5),  # the first one helped, and a final of shorter loads still fits: it is held
        (260, ["a=1", "b=1"], 5),
        (300, ["a=1", "b=1", "a=1 b=1"], 5),  # two that helped go together before a third by itself
    ],
)
def test_a_tight_budget_is_spent_on_what_fits(tmp_path: Path, budget: float, tried: list[str], rounds: int) -> None:
    """Trials where no final fits, a final as soon as there is something to hold it for; what was left out is named."""
    run = tune(tmp_path, A, B, C, budget=budget, gives={A: 1.3, B: 1.2})
    assert list(run.tried) == ["baseline", *tried]
    assert len(run.journal.rounds) == rounds
    assert run.clock.now <= budget
    assert run.verdict.winner == (() if not rounds else (A, B) if "a=1 b=1" in tried else (A,))
    notes = " ".join(run.tuning.notes)
    assert ("untried: " in notes) is bool(run.tuning.untried)
    assert ("loads of 6 s, not 12" in notes) is (budget == 190)
    assert ("no time was left for a final" in run.verdict.sentence) is (bool(tried) and not rounds)
    assert ("which the final is to have" in notes) is bool(rounds)


def test_a_final_has_as_many_rounds_as_there_is_time_for(tmp_path: Path) -> None:
    """What is left at its end is less than two turns, and enough to end the engines."""
    run = tune(tmp_path, A, budget=240, rounds=50, gives={A: 1.3})
    assert 3 < len(run.journal.rounds) < 50
    assert 2 * 4.0 < 240 - run.clock.now < 2 * 1.15 * 13 + 2 * 4.0


def test_what_was_tried_without_a_final_has_it_on_resume(tmp_path: Path) -> None:
    """The same budget once more, and nothing is tried twice: the final first, since something helped."""
    first = tune(tmp_path, A, B, C, budget=130, gives={A: 1.3})
    assert first.verdict.winner == ()
    second = tune(tmp_path, A, B, C, budget=180, gives={A: 1.3}, resume=True)
    assert second.verdict.winner == (A,)
    assert second.machine.started == [(), (A,)]


MOVE, PAIR = strategy.Step(Stage.MOVE, (C,)), strategy.Step(Stage.COMBINATION, (A, B))


@pytest.mark.parametrize(
    ("left", "steps", "candidate", "chosen"),
    [
        (700, [MOVE], False, MOVE),
        (490, [MOVE, PAIR], True, MOVE),  # 70 + 80 + 220, with time to spare
        (360, [MOVE, PAIR], True, PAIR),
        (295, [MOVE, PAIR], True, MOVE),
        (285, [MOVE, PAIR], True, None),
        (285, [MOVE], False, MOVE),
        (170, [MOVE], True, MOVE),
        (75, [MOVE], True, MOVE),
        (75, [PAIR], True, None),
        (69, [MOVE], False, None),
    ],
)
def test_time_goes_to_what_it_is_worth_most_for(left: float, steps, candidate: bool, chosen) -> None:
    """A setting takes 70 s, a pair 80, a final 220 or, of shorter loads, 175."""
    assert next_step(steps, Estimates(left, 70, 80, 220, 175, candidate)) == chosen


def test_a_budget_of_minutes_on_a_real_start_still_tries_settings(tmp_path: Path) -> None:
    """An engine that starts in 48 s, loads of 8 s, 260 s in all: three settings, and a final's time said."""
    clock = Clock()
    machine = Machine(clock, ready=48.0, gives={A: 1.2}, base_peak=2400.0, base_alone=30.0)
    with Journal_(tmp_path) as journal:
        tuning = Tuning(Setup(THROUGHPUT, factors(A, B, C), 64, False, 8, 1, 260, 3), machine, journal, clock)
        verdict = tuning.run()
    assert [t.label for t in journal.trials] == ["baseline", "a=1", "b=1", "c=1"]
    assert "no time was left for a final, which takes 218 s or more" in verdict.sentence
    assert "a=1 gave 1.200 times the baseline's score, which is not enough" in verdict.sentence


def test_a_first_start_that_compiled_kernels_is_no_measure_of_the_next(tmp_path: Path) -> None:
    """110 s, then 45 s each: ten minutes hold settings, what helped together, and a final."""
    run = tune(
        tmp_path, A, B, C, budget=600, ready=45.0, compiles=65.0, gives={A: 1.2, B: 1.1}, start=64, base_peak=2400.0
    )
    assert list(run.tried) == ["baseline", "a=1", "b=1", "a=1 b=1"]
    assert (run.verdict.winner, len(run.journal.rounds)) == ((A, B), 5)
    assert run.clock.now <= 600


@pytest.mark.parametrize(
    ("budget", "tried"),
    [
        (600, {"replicas=2", "quantization=fp8", "quantization=fp8 replicas=2"}),
        (1200, {"replicas=3", "batch_tokenize=singles", "prefill_max_requests=64", "gateway.workers=4"}),
    ],
)
def test_the_time_of_an_h100_is_spent_on_several_settings(tmp_path: Path, budget: float, tried: set[str]) -> None:
    """256 clients, first start 109 s, then 45 s: ten minutes hold what matters most, twenty nearly everything."""
    request = cases.request("h100", "4b", "0.5.16", gateway_workers=2)
    plan = planning.plan(replace(request, engine=replace(request.engine, plugin="0.4.0")))
    space = derive(View(plan, 1, 256, 16), Goal.THROUGHPUT, vectors_may_change=True).factors
    run = tune(
        tmp_path, space=space, budget=budget, start=256, ready=45.0, compiles=64.0, base_peak=1600.0, base_alone=11.0,
        gives={("replicas", "2"): 1.4, ("quantization", "fp8"): 1.05}, objective=Objective(Goal.THROUGHPUT),
    )  # fmt: skip
    assert tried <= {name for name, status in run.tried.items() if status is Status.OK}
    assert run.tried["max_prefill_tokens=8192"] is Status.UNREACHED, "a batch has 128 texts, 4,224 tokens"
    assert len(run.journal.rounds) == 5
    assert run.verdict.winner == (("quantization", "fp8"), ("replicas", "2"))


def test_without_a_final_the_baseline_stays(tmp_path: Path) -> None:
    """One brief measurement is not enough to choose, and the sentence says what it gave."""
    run = tune(tmp_path, A, rounds=0, gives={A: 1.5})
    assert run.verdict.winner == ()
    assert not run.verdict.confirmed
    assert "a=1" in run.verdict.sentence
    assert "not enough" in run.verdict.sentence


def test_finalists_that_do_not_fit_together_are_started_in_turns(tmp_path: Path) -> None:
    """One place on the GPU: every turn is a start of its own, and the winner is the same."""
    run = tune(tmp_path, A, gives={A: 1.4}, places=1, spread=0.01)
    assert run.verdict.winner == (A,)
    assert run.machine.most_running == 1
    assert len(run.machine.started) == 2 + 1 + 10  # trials, the try side by side, five rounds of two
    assert any("in turns" in note for note in run.tuning.notes)


def test_engines_that_would_disturb_each_other_are_started_in_turns(tmp_path: Path) -> None:
    """On a CPU one that polls takes a core from the other: never two at a time, and no start is wasted to find out."""
    run = tune(tmp_path, A, gives={A: 1.4}, apart=True, spread=0.01)
    assert run.verdict.winner == (A,)
    assert run.machine.most_running == 1
    assert len(run.machine.started) == 2 + 10
    assert not run.tuning.notes


def test_a_setting_that_alone_meets_the_objective_wins(tmp_path: Path) -> None:
    """The baseline misses it at every level: there is no ratio, but a winner."""
    run = tune(tmp_path, A, base_alone=150.0, faster={A: 0.3})
    assert run.verdict.winner == (A,)
    assert "the baseline does not" in run.verdict.sentence


def test_an_objective_that_nothing_meets_names_the_nearest(tmp_path: Path) -> None:
    """No winner; the nearest is the one whose percentile is least over the limit."""
    run = tune(tmp_path, A, B, base_alone=900.0, faster={A: 0.5})
    assert run.verdict.winner is None
    near = report.nearest(run.journal.trials, THROUGHPUT)
    assert near is not None
    assert near["label"] == "a=1"
    assert "p95 540 ms > 100 ms" in near["misses"]


def test_latency_is_tuned_at_the_load_given(tmp_path: Path) -> None:
    """One load a trial, and the lower percentile wins."""
    run = tune(tmp_path, A, objective=Objective(Goal.LATENCY, SLO), start=1, faster={A: 0.6})
    assert run.verdict.winner == (A,)
    assert {level for _, level, _ in run.machine.measured} == {1}


def test_memory_counts_what_an_engine_took_alone(tmp_path: Path) -> None:
    """Side by side the card's memory is everybody's: the trial's own figure is compared."""
    run = tune(tmp_path, A, objective=Objective(Goal.MEMORY, SLO), saves={A: 1 << 29})
    assert run.verdict.winner == (A,)
    assert run.verdict.typical[(A,)].memory_bytes == 1 << 29


def test_cost_follows_from_rate_power_and_prices() -> None:
    """2.50 an hour at 1,000 tokens/s is 0.694 a million; power comes on top where electricity has a price."""
    objective = Objective(Goal.COST, None, Costs("USD", gpu_hour=2.5))
    assert objective.value(measurement(rate=1000 / 33)) == pytest.approx(2.5 / 3.6, rel=1e-6)
    powered = Objective(Goal.COST, None, Costs("USD", gpu_hour=2.5, electricity=0.5))
    assert powered.value(measurement(rate=1000 / 33, watts=1000.0)) == pytest.approx(3.0 / 3.6, rel=1e-6)


# ---- Ctrl-C and the journal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3, 6, 9, 14, 20, 99])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, stop_at: int) -> None:
    """Ctrl-C at any measurement: nothing runs on, the resumed run starts nothing twice and comes to the same end."""
    gives = {A: 1.3, B: 1.2}
    whole = tune(tmp_path / "whole", A, B, gives=gives)
    first = tune(tmp_path / "cut", A, B, gives=gives, stop_at=min(stop_at, len(whole.machine.measured)))
    assert first.tuning.interrupted
    assert first.machine.running == 0
    second = tune(tmp_path / "cut", A, B, gives=gives, resume=True)
    assert second.verdict.winner == whole.verdict.winner == (A, B)
    assert list(second.tried) == list(whole.tried)
    finished = {t.moves for t in first.journal.trials if t.status is Status.OK}
    again = [m for m in second.machine.started[: len(second.machine.started) - 3] if m in finished]
    assert not again


def test_a_finished_final_is_not_held_again(tmp_path: Path) -> None:
    """--resume on a run with nothing left starts no engine and says the same."""
    first = tune(tmp_path, A, gives={A: 1.4})
    second = tune(tmp_path, A, gives={A: 1.4}, resume=True)
    assert second.verdict == first.verdict
    assert not second.machine.started


def test_a_final_of_short_loads_is_held_again_where_there_is_time(tmp_path: Path) -> None:
    """--resume with a longer budget measures for the whole time; with too short a one it says again what it says."""
    first = tune(tmp_path, A, budget=165, gives={A: 1.4})
    assert {one.seconds for one in first.journal.rounds} == {6.0}
    assert len(first.journal.rounds) == 5
    again = tune(tmp_path, A, budget=60, gives={A: 1.4}, resume=True)
    assert (again.verdict, again.machine.started) == (first.verdict, [])
    assert again.tuning.notes == ["there was time for a final of loads of 6 s, not 12"]
    longer = tune(tmp_path, A, budget=3600, gives={A: 1.4}, resume=True)
    assert {one.seconds for one in longer.journal.rounds} == {12.0}
    assert not longer.tuning.notes
    last = tune(tmp_path, A, budget=3600, gives={A: 1.4}, resume=True)
    assert (last.verdict, last.machine.started) == (longer.verdict, [])


@pytest.mark.parametrize(("budget", "rounds", "apart"), [(126, 2, False), (130, 1, True), (160, 2, True)])
def test_a_budget_too_short_to_decide_is_said_and_how_long_it_takes(
    tmp_path: Path, budget: float, rounds: int, apart: bool
) -> None:
    """Fewer rounds than an interval needs choose nothing, and that is not called a baseline that nothing beats. The
    time that the sentence names is enough on --resume, and nothing is tried twice."""
    first = tune(tmp_path, A, budget=budget, gives={A: 1.4}, apart=apart)
    assert len(first.journal.rounds) == rounds
    assert (first.verdict.winner, first.verdict.confirmed) == ((), False)
    count = f"{rounds} round{'s' * (rounds > 1)}"
    assert f"the budget was over after {count} of the final, too early to decide" in first.verdict.sentence
    assert f"a=1: 1.4 ({count}: no interval)" in first.verdict.sentence
    assert "nothing beats" not in first.verdict.sentence
    takes = re.search(r"the final alone takes about (\d+) s: --resume", first.verdict.sentence)
    assert takes is not None
    second = tune(tmp_path, A, budget=float(takes[1]) + 1, gives={A: 1.4}, apart=apart, resume=True)
    assert (second.verdict.winner, second.verdict.confirmed) == ((A,), True)
    assert len(second.journal.rounds) >= 3
    assert {one.seconds for one in second.journal.rounds} == {12.0}
    assert len([t for t in second.journal.trials if t.moves == ()]) == 1


def test_a_final_that_an_engine_ended_early_is_not_blamed_on_the_budget(tmp_path: Path) -> None:
    """After two rounds an engine dies: the note says why, the sentence that nothing is decided."""
    whole = tune(tmp_path / "whole", A, gives={A: 1.4})
    run = tune(tmp_path, A, gives={A: 1.4}, dies_at=len(whole.machine.measured) - 5)  # of five rounds of two
    assert len(run.journal.rounds) == 2
    assert run.verdict.undecided
    assert run.verdict.sentence.startswith("the final ended after 2 rounds, too early to decide: ")
    assert any("the final ended after 2 rounds: " in note for note in run.tuning.notes)


def test_a_bigger_budget_tries_what_was_left(tmp_path: Path) -> None:
    """The first run names what it had no time for; the resumed one tries it."""
    first = tune(tmp_path, A, B, C, budget=90, gives={C: 1.5})
    assert "c=1" in first.tuning.untried
    second = tune(tmp_path, A, B, C, budget=3600, gives={C: 1.5}, resume=True)
    assert second.verdict.winner == (C,)
    assert not second.tuning.untried


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    """Every whole line counts, the torn one is tried again."""
    tune(tmp_path, A, gives={A: 1.4})
    path = tmp_path / "run.tune.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:-20])
    run = tune(tmp_path, A, gives={A: 1.4}, resume=True)
    assert run.verdict.winner == (A,)
    assert run.machine.started[0] == (A,)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    """What differs is named; an unfinished run is not written over; two writers exclude each other."""
    with Journal_(tmp_path) as journal:
        journal.add(trial(1, {}, measurement()))
        with pytest.raises(UnfitError) as locked, Journal_(tmp_path, resume=True):
            pass
        assert locked.value.code == "tune_running"
    with pytest.raises(InvalidInputError) as differs, Journal_(tmp_path, resume=True, profile_hash="other"):
        pass
    assert differs.value.code == "journal_mismatch"
    assert differs.value.details["differ"] == ["profile_hash"]
    with pytest.raises(InvalidInputError) as unfinished, Journal_(tmp_path):
        pass
    assert unfinished.value.code == "journal_exists"
    (tmp_path / "run.tune.jsonl").write_text('{"kind": "other"}\n')
    with pytest.raises(InvalidInputError) as foreign, Journal_(tmp_path, resume=True):
        pass
    assert foreign.value.code == "bad_journal"


def test_a_finished_journal_is_set_aside(tmp_path: Path) -> None:
    """A new run keeps the old one's lines under another name."""
    with Journal_(tmp_path) as journal:
        journal.add(trial(1, {}, measurement()))
        journal.end("done")
    with Journal_(tmp_path) as journal:
        assert not journal.trials
    assert (tmp_path / "run.tune.jsonl.1").read_text().count("\n") == 3


def test_what_the_journal_holds_comes_back_as_it_was(tmp_path: Path) -> None:
    """Trials and rounds survive the disk field by field."""
    kept = replace(
        trial(1, {"a": "1"}, measurement(), measurement(8, p95=200)), proof=Proof(True, "ok", "f", 0.99), at="now"
    )
    one = Round(1, {(): measurement(), (A, B): measurement(rate=120)}, 12.0)
    with Journal_(tmp_path) as journal:
        journal.add(kept)
        journal.begin_final({(): 4.0})
        journal.add_round(one)
    with Journal_(tmp_path, resume=True) as journal:
        assert journal.trials == [kept]
        assert journal.rounds == [one]


# ---- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peak", "alone", "best"), [(400, 20, 33), (50, 20, 4), (4000, 20, 333), (30, 20, 2)])
def test_the_search_finds_the_most_clients_that_hold(peak: float, alone: float, best: float) -> None:
    """Within a quarter of the largest level whose p95 is in the objective, in at most six measurements."""
    clock = Clock()
    machine = Machine(clock, base_peak=peak, base_alone=alone)
    engine = Engine(machine, ())
    found = levels.search(lambda level: engine.measure(level, 3), THROUGHPUT.meets, 16, whole=True)
    top = max(m.texts_per_s for m in found if THROUGHPUT.meets(m))
    reached = min(peak, best / alone * 1000)
    assert top >= 0.8 * reached
    assert len(found) <= levels.MOST
    assert all(m.level == int(m.level) >= 1 for m in found)


def test_the_search_ends_where_nothing_holds() -> None:
    """Down to one client, and no further."""
    engine = Engine(Machine(Clock(), base_alone=900), ())
    found = levels.search(lambda level: engine.measure(level, 3), THROUGHPUT.meets, 4, whole=True)
    assert [m.level for m in found] == [1, 2, 4]


def test_a_winner_must_hold_the_objective_in_most_rounds() -> None:
    """A candidate that is faster but misses the objective does not win; the baseline stays."""
    rounds = [Round(n, {(): measurement(), (A,): measurement(rate=150, p95=120)}) for n in range(1, 6)]
    assert contest.judge(rounds, THROUGHPUT).winner == ()
    fewer = [Round(n, {(): measurement(), (A,): measurement(rate=150, p95=120 if n == 1 else 90)}) for n in range(1, 6)]
    assert contest.judge(fewer, THROUGHPUT).winner == (A,)


def test_of_equals_the_simpler_wins() -> None:
    """Two winners that cannot be told apart: the one with fewer changes."""
    shaky = [1.0, 1.05, 0.97, 1.02, 0.99]
    rounds = [
        Round(n, {(): measurement(rate=100), (A,): measurement(rate=130), (A, B): measurement(rate=131 * f)})
        for n, f in enumerate(shaky, 1)
    ]
    assert contest.judge(rounds, THROUGHPUT).winner == (A,)


@pytest.mark.parametrize(("count", "confirmed"), [(1, False), (2, False), (3, True)])
def test_a_baseline_that_missed_the_objective_in_few_rounds_is_no_proof(count: int, confirmed: bool) -> None:
    """The other wins, as without a final, but that is called confirmed from three rounds on."""
    rounds = [Round(n, {(): measurement(p95=101), (A,): measurement()}) for n in range(count)]
    verdict = contest.judge(rounds, THROUGHPUT)
    assert (verdict.winner, verdict.confirmed) == ((A,), confirmed)
    assert ("only: --resume" in verdict.sentence) is not confirmed


def test_too_few_rounds_decide_nothing() -> None:
    """Two rounds have no interval: the baseline stays, not as a winner, and the sentence says why."""
    rounds = [Round(n, {(): measurement(), (A,): measurement(rate=200)}) for n in (1, 2)]
    verdict = contest.judge(rounds, THROUGHPUT)
    assert (verdict.winner, verdict.confirmed, verdict.undecided) == ((), False, True)
    assert "it takes 3 rounds" in verdict.sentence
    assert "(2 rounds: no interval)" in verdict.sentence
    assert "(1 round: no interval)" in contest.judge(rounds[:1], THROUGHPUT).sentence


def test_a_trials_end_is_a_word_and_its_reason_if_there_is_one() -> None:
    """An interrupted one has none."""
    ended = trial(1, {"a": "1"}, status=Status.INTERRUPTED)
    assert report.result(ended, None) == "interrupted"
    assert report.result(replace(ended, status=Status.FAILED, reason="out of memory"), None) == "failed: out of memory"


def test_the_front_holds_what_nothing_else_dominates() -> None:
    """Faster, or sooner, or smaller: worse in all three is off the front."""
    trials = [
        trial(1, {}, measurement(rate=100, p95=50, memory_bytes=10)),
        trial(2, {"a": "1"}, measurement(rate=120, p95=60, memory_bytes=10)),
        trial(3, {"b": "1"}, measurement(rate=90, p95=70, memory_bytes=12)),
        trial(4, {"c": "1"}, measurement(rate=50, p95=90, memory_bytes=4)),
        trial(5, {"d": "1"}, status=Status.FAILED),
    ]
    assert report.front(trials, THROUGHPUT) == (1, 2, 4)


def test_the_best_value_of_a_setting_goes_into_combinations() -> None:
    """Two values of one setting are never together; losers stay out."""
    space = factors(("a", "1"), ("a", "2"), B, C)
    done = [
        trial(1, {}, measurement(rate=100)),
        trial(2, {"a": "1"}, measurement(rate=110)),
        trial(3, {"a": "2"}, measurement(rate=130)),
        trial(4, {"b": "1"}, measurement(rate=105)),
        trial(5, {"c": "1"}, measurement(rate=101)),
    ]
    assert strategy.combinations(space, done, THROUGHPUT) == [(("a", "2"), ("b", "1"))]


def test_what_is_left_of_the_time_refines_the_best() -> None:
    """One setting less, then one more that did no harm alone; a loser and a failure are not added."""
    space = factors(A, B, C, ("d", "1"), ("e", "1"))
    done = [
        trial(1, {}, measurement(rate=100)),
        trial(2, dict([A]), measurement(rate=110)),
        trial(3, dict([B]), measurement(rate=105)),
        trial(4, dict([C]), measurement(rate=99)),
        trial(5, {"d": "1"}, measurement(rate=80)),
        trial(6, {"e": "1"}, status=Status.FAILED),
        trial(7, dict([A, B]), measurement(rate=118)),
    ]
    left = list(strategy.steps(space, done, THROUGHPUT))
    assert left == [strategy.Step(Stage.REFINEMENT, (A, B, C))]
    done.append(trial(8, dict([A, B, C]), measurement(rate=125)))
    assert [s.moves for s in strategy.steps(space, done, THROUGHPUT)] == [(B, C), (A, C)]


# ---- the space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [2, 4])
@pytest.mark.parametrize("name", cases.SHIPPED)
@pytest.mark.parametrize("goal", list(Goal))
def test_every_value_of_the_space_is_planned_or_refused_by_the_planner(name: str, goal: Goal, cores: int) -> None:
    """No value is a mistake of ours: unknown settings, malformed values and what the profile has already would be."""
    release = None if name in ("cpu", "demo") else "0.5.16"
    request = cases.request(name, "demo" if name == "demo" else "0.6b" if name == "cpu" else "4b", release)
    base = planning.plan(request)
    space = derive(View(base, 1, 256, cores), goal, vectors_may_change=True)
    assert all(f.reason for f in space.factors)
    refused: dict[str, str] = {}
    for factor in space.factors:
        for value in factor.values:
            try:
                changed = planning.plan(replace(request, overrides={factor.key: value}))
            except (InvalidInputError, UnfitError) as error:
                refused[factor.key] = error.code
            else:
                assert _launch(changed) != _launch(base), (factor, value)
    assert not {"bad_setting", "unknown_setting", "unknown_flag", "bad_flag_value"} & set(refused.values()), refused


def _launch(made: LaunchPlan) -> object:
    """What starts: a value that a profile says already is another setting by its origin alone."""
    return made.argv, made.env, made.replicas, made.gateway


def test_the_space_of_an_h100_starts_with_what_is_expected_most() -> None:
    """`full` graphs where they are not yet, and replicas; what changes the vectors only when allowed."""
    plan = cases.plan("h100", "4b", "0.5.16")
    factors = derive(View(plan, 1, 64, 16), Goal.THROUGHPUT).factors
    keys = [f.key for f in factors]
    assert plan.setting("prefill_graph_backend") == "breakable"  # recorded releases have no plugin
    assert keys[:2] == ["prefill_graph_backend", "replicas"]
    assert factors[0].values == ("full",)
    assert "quantization" not in keys
    allowed = derive(View(plan, 1, 64, 16), Goal.THROUGHPUT, vectors_may_change=True)
    assert "quantization" in [f.key for f in allowed.factors]


def test_a_further_value_of_a_setting_waits_for_the_first_of_others() -> None:
    """Replicas 2, then fp8, then replicas 3; a space without expected gains stays as it is."""
    plan = cases.plan("h100", "4b", "0.5.16")
    space = derive(View(plan, 1, 256, 16), Goal.THROUGHPUT, vectors_may_change=True)
    first = [f"{f.key}={v}" for f, v in in_order(space.factors)]
    assert first[:4] == ["prefill_graph_backend=full", "replicas=2", "quantization=fp8", "replicas=3"]
    own = (Factor("a", ("1", "2"), ""), Factor("b", ("1",), ""))
    assert [(f.key, v) for f, v in in_order(own)] == [("a", "1"), ("a", "2"), ("b", "1")]


@pytest.mark.parametrize(
    ("cores", "workers", "tried"), [(16, 2, "4"), (8, 2, "4"), (8, 1, "2"), (4, 2, None), (2, 1, None)]
)
def test_more_gateway_workers_are_tried_where_there_are_cores(cores: int, workers: int, tried: str | None) -> None:
    """Twice what the plan has, two cores for each, before many clients."""
    plan = cases.plan("h100", "4b", "0.5.16", gateway_workers=workers)
    by = {f.key: f.values for f in derive(View(plan, 1, 256, cores), Goal.THROUGHPUT).factors}
    assert by.get("gateway.workers") == ((tried,) if tried else None)


WIDER = {"max_prefill_tokens=32768", "max_running_requests=1024"}
NARROWER = {"max_prefill_tokens=8192", "max_running_requests=256"}
GRAPHS = {"prefill_graph_requests=257", "prefill_graph_sizes"}


@pytest.mark.parametrize(
    ("goal", "texts", "tokens", "unreached"),
    [
        (Goal.THROUGHPUT, 100, 2000, WIDER | NARROWER | GRAPHS),
        (Goal.THROUGHPUT, 150, 5000, WIDER | NARROWER),
        (Goal.THROUGHPUT, 300, 10_000, WIDER),
        (Goal.LATENCY, 2, 66, {"max_prefill_tokens=32768", "max_prefill_tokens=8192"}),
        (Goal.MEMORY, 2, 66, set()),
    ],
)
def test_a_limit_that_no_batch_comes_to_is_known(goal: Goal, texts: int, tokens: int, unreached: set[str]) -> None:
    """An H100 with the plugin has 16,384 tokens and 512 texts a batch, and graphs of 4,224 tokens and 129 texts."""
    request = cases.request("h100", "4b", "0.5.16")
    plan = planning.plan(replace(request, engine=replace(request.engine, plugin="0.4.0")))
    pairs = in_order(derive(View(plan, 1, 64, 16), goal).factors)
    found = [(f.key, v) for f, v in pairs if f.unreached(v, {"texts": texts, "tokens": tokens})]
    assert {key if " " in v else f"{key}={v}" for key, v in found} == unreached


def test_what_the_user_fixed_is_not_tried() -> None:
    """--set takes a setting out, and that is said."""
    plan = cases.plan("h100", "4b", "0.5.16")
    space = derive(View(plan, 1, 64, 16), Goal.THROUGHPUT, given=("replicas",))
    assert "replicas" not in [f.key for f in space.factors]
    assert space.left_out["replicas"] == "given with --set"


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: {b: 1}\n", "a: []\n", "a: [", "1: [2]\n", "x: [1]\n" * 10_000, "fixed: [1]\n"]
)
def test_a_space_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """Not a mapping of settings to values, too large, or fixed already: named, nothing started."""
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError) as found:
        read_space(path, ("fixed",))
    assert found.value.code == "bad_space"


def test_a_space_of_the_users_own_keeps_its_order(tmp_path: Path) -> None:
    """Values are written as --set takes them."""
    path = tmp_path / "space.yaml"
    path.write_text("sleep_on_idle: [false]\nprefill_graph_sizes: [[64, 128], [256]]\nmax_prefill_tokens: 8192\n")
    assert [(f.key, f.values) for f in read_space(path).factors] == [
        ("sleep_on_idle", ("false",)),
        ("prefill_graph_sizes", ("64 128", "256")),
        ("max_prefill_tokens", ("8192",)),
    ]


# ---- the profile --------------------------------------------------------------------------------------------------


def test_the_profile_comes_to_the_command_that_was_measured() -> None:
    """Settings, parts, environment and options of the engine find their places; evidence is valid; no variants."""
    request = cases.request("h100", "4b", "0.5.16")
    overrides = {
        "prefill_graph_backend": "breakable", "max_prefill_tokens": "8192", "prefill_graph_sizes": "64 128",
        "gateway.enabled": "false", "env.OMP_NUM_THREADS": "4", "schedule-policy": "lpm", "enable-metrics": "true",
    }  # fmt: skip
    measured = winner.Measured(
        figures=measurement(), load="texts of 33 tokens", command="qwen3emb bench", hardware="NVIDIA H100",
        versions={"sglang": "0.5.16"}, day=date(2026, 11, 22), over_baseline=1.21,
    )  # fmt: skip
    text = winner.profile_text(
        request.profile, "mine", overrides, moves(overrides), measured, request.engine.flags
    )  # fmt: skip
    profile = parse_profile(text, "mine.yaml")
    assert not profile.variants
    assert [e.unit for e in profile.evidence] == ["texts/s", "ms", "GB", "times"]
    again = planning.plan(replace(request, profile=profile))
    wanted = planning.plan(replace(request, overrides=overrides))
    assert sorted(again.argv) == sorted(wanted.argv)
    assert again.env == wanted.env
    assert again.gateway is wanted.gateway is None


def test_a_decision_that_is_taken_back_leaves_the_profile() -> None:
    """`null` gives a setting back to the planner."""
    request = cases.request("rtx4090", "4b", "0.5.16")
    measured = winner.Measured(
        measurement(memory_bytes=None), "load", "qwen3emb bench", "RTX", {"sglang": "x"},
        date(2026, 11, 22),
    )  # fmt: skip
    overrides = {"mem_fraction_static": "null"}
    text = winner.profile_text(
        request.profile, "mine", overrides, moves(overrides), measured, request.engine.flags
    )  # fmt: skip
    assert "mem_fraction_static" not in yaml.safe_load(text)["settings"]


@pytest.mark.parametrize("name", ["My Profile.yaml", "x.json", "-a.yaml"])
def test_a_file_that_cannot_be_a_profile_is_refused_first(tmp_path: Path, name: str) -> None:
    """Before anything is started."""
    with pytest.raises(InvalidInputError, match="cannot name a profile"):
        winner.check_target(tmp_path / name)


def test_a_profile_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    """The user's own work stays."""
    (tmp_path / "a.yaml").write_text("x")
    with pytest.raises(InvalidInputError, match="is there already"):
        winner.check_target(tmp_path / "a.yaml")


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["--goal", "troughput"], "bad_goal", 2),
        (["--slo", "p95"], "bad_slo", 2),
        (["--budget", "soon"], "bad_duration", 2),
        (["--goal", "cost"], "no_costs", 2),
        (["--electricity", "0.3"], "no_costs", 2),
        (["--rate", "5", "--concurrency", "2"], "usage", 2),
        (["--tokens", "many"], "bad_load", 2),
        (["--profile", "demoo"], "unknown_profile", 2),
        (["--profile", "demo", "--out", "Bad Name.yaml"], "bad_profile_name", 2),
        (["--profile", "demo", "--out", "profiles/demo.yaml"], "profile_exists", 2),
        (["--profile", "demo", "--corpus", "nowhere.txt"], "no_corpus", 2),
    ],
)
def test_bad_input_is_refused_before_anything_starts(words: list[str], code: str, status: int, capsys) -> None:
    """Each has its code and a next step."""
    from qwen3emb_launch.cli.app import run as command

    assert command(["tune", *words, "--json"]) == status
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code, error
    assert error["hint"]
