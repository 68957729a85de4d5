"""The run: what the strategy asks for is planned, started, proven and measured, within the budget, into the journal.

A trial that cannot be planned, does not start, runs out of memory, answers wrongly or dies under load is a result like
any other. The clock and everything that touches an engine are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from qwen3emb_launch.errors import CheckFailedError, EngineFailedError, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.tune import levels, strategy
from qwen3emb_launch.tune.contest import BASELINE, Verdict, judge
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.tune.objective import SEARCHED, Objective
from qwen3emb_launch.tune.space import Factor
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof, Round, Stage, Status, Trial, label

SAFETY = 1.15  # on estimates of time
STOPPING = 4.0  # seconds to end an engine
FEWEST_ROUNDS = 3  # fewer give no interval
HIGHER = 1.6  # a finalist begins so much above its own level at most, where another held a higher one
EASED = 1.25  # and is lowered by that until the objective holds, at most EASINGS times
EASINGS = 5
FINER = 1.5  # step of the search once the baseline's level is known


class Running(Protocol):
    """An engine that serves a configuration."""

    ready_s: float

    def prove(self) -> Proof:
        """`verify --level quick`, the vectors held to the baseline's."""

    def measure(self, level: float, seconds: float) -> Measurement:
        """One load. Raises EngineFailedError when the engine died under it, KeyboardInterrupt when stopped."""


class Machine(Protocol):
    """What starts engines. `slot` tells apart those that run at the same time."""

    def plan(self, moves: Moves) -> str:
        """The command that would be run; equal ones need no second trial. Raises LaunchError where it is refused."""

    def start(self, moves: Moves, slot: int, within: float) -> AbstractContextManager[Running]:
        """Serving within so many seconds. Raises LaunchError, KeyboardInterrupt."""


class Listener:
    """What the run tells while it goes on; the shell shows it."""

    def trying(self, number: int, stage: Stage, name: str) -> None:
        """A trial begins."""

    def tried(self, trial: Trial, verdict: str) -> None:
        """A trial ended."""

    def said(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True)
class Setup:
    """What to tune for and how long. `start` is the level to begin with: clients, or requests a second when `open`.

    `seconds` is the measured time of one load in the final (earlier stages take a share of it), `warmup` goes before
    each. `budget` is seconds for everything; `rounds` of the final, 0 for none.
    """

    objective: Objective
    factors: tuple[Factor, ...]
    start: float
    open: bool
    seconds: float
    warmup: float
    budget: float
    rounds: int


@dataclass
class Tuning:
    """One run."""

    setup: Setup
    machine: Machine
    journal: Journal
    clock: Callable[[], float]
    listener: Listener = field(default_factory=Listener)
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    untried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    _commands: dict[str, Moves] = field(default_factory=dict)
    _deadline: float = 0.0

    def run(self) -> Verdict:
        """Trials, then the final. On Ctrl-C, what is known so far, with `interrupted` set.

        Raises EngineFailedError or InvalidInputError when the baseline itself cannot be served.
        """
        self._deadline = self.clock() + self.setup.budget
        try:
            self._trials()
            return self._final()
        except KeyboardInterrupt:
            self.interrupted = True
            self.untried = [label(s.moves) for s in self._steps()]
            return self._unconfirmed("interrupted before the final")

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self._deadline - self.clock()

    # ---- trials ---------------------------------------------------------------------------------------------------

    def _steps(self) -> list[strategy.Step]:
        return list(strategy.steps(self.setup.factors, self.journal.trials, self.setup.objective))

    def _trials(self) -> None:
        for trial in self.journal.trials:
            self._learn(trial)
        while steps := self._steps():
            step = steps[0]
            refused = self._refused(step)
            if refused:
                self._keep(refused)
                continue
            needed = self._estimate(step.stage) + self._reserve(step)
            if step.stage is not Stage.BASELINE and self.left < needed:
                self.untried = [label(s.moves) for s in steps]
                self.notes.append(
                    f"{self.left:.0f} s of the budget are left and a trial with its final takes about {needed:.0f} s: "
                    f"untried: {', '.join(self.untried)}"
                )
                return
            trial = self._try(step)
            self._keep(trial)
            if step.stage is Stage.BASELINE:
                self._check_baseline(trial)

    def _learn(self, trial: Trial) -> None:
        """A trial of an earlier run: its command needs no second one."""
        try:
            if trial.status not in (Status.REFUSED, Status.SAME):
                self._commands.setdefault(self.machine.plan(trial.moves), trial.moves)
        except LaunchError:
            return

    def _refused(self, step: strategy.Step) -> Trial | None:
        """The trial without a start, where the planner refuses it or knows its command already."""
        number = len(self.journal.trials) + 1
        at = self.now().isoformat(timespec="seconds")
        try:
            command = self.machine.plan(step.moves)
        except (InvalidInputError, UnfitError) as error:
            if step.stage is Stage.BASELINE:
                raise
            return Trial(number, step.stage, step.moves, Status.REFUSED, error.message, error.code, at=at)
        earlier = self._commands.get(command)
        if earlier is not None:
            why = f"the same command as {label(earlier)}"
            return Trial(number, step.stage, step.moves, Status.SAME, why, "same_command", at=at)
        self._commands[command] = step.moves
        return None

    def _try(self, step: strategy.Step) -> Trial:
        number = len(self.journal.trials) + 1
        self.listener.trying(number, step.stage, label(step.moves))
        began, at = self.clock(), self.now().isoformat(timespec="seconds")
        trial = Trial(number, step.stage, step.moves, Status.OK, at=at)
        found: list[Measurement] = []
        ready: float | None = None
        proof: Proof | None = None
        try:
            with self.machine.start(step.moves, 0, max(1.0, self.left - STOPPING)) as engine:
                ready = engine.ready_s
                proof = engine.prove()
                if proof.passed:
                    self._measure(engine, step.stage, found)
                else:
                    trial = replace(trial, status=Status.WRONG, code="verification_failed", reason=proof.summary)
        except _OutOfTimeError:
            trial = replace(trial, reason="cut short: the budget was over")
            if not found:
                trial = replace(trial, status=Status.TIMEOUT, code="out_of_time")
        except LaunchError as error:
            out = error.code == "out_of_time"
            lines = error.details.get("last_lines")
            trial = replace(
                trial,
                status=Status.TIMEOUT if out else Status.FAILED,
                code=error.code,
                reason=error.message,
                details={"last_lines": lines[-5:]} if lines else {},
            )
        except KeyboardInterrupt:
            self.journal.add(replace(trial, status=Status.INTERRUPTED, seconds=self.clock() - began))
            raise
        return replace(
            trial, ready_s=ready, proof=proof, measurements=tuple(found), seconds=round(self.clock() - began, 3)
        )

    def _measure(self, engine: Running, stage: Stage, found: list[Measurement]) -> None:
        """The loads of a trial, into `found` as they come."""
        setup = self.setup
        seconds = setup.seconds * strategy.SHARE[stage]

        def look(level: float) -> Measurement:
            self._check_time(seconds)
            found.append(engine.measure(level, seconds))
            return found[-1]

        if setup.objective.goal not in SEARCHED:
            look(setup.start)
            return
        known = strategy.judged(self._baseline(), setup.objective)
        start, step = (known.level, FINER) if known else (setup.start, 2.0)
        levels.search(look, setup.objective.meets, start, whole=not setup.open, step=step)

    def _keep(self, trial: Trial) -> None:
        self.journal.add(trial)
        self.listener.tried(trial, self._in_words(trial))

    def _in_words(self, trial: Trial) -> str:
        """How a trial did, beside the baseline."""
        if trial.status is not Status.OK:
            return f"{trial.status}: {trial.reason}"
        objective = self.setup.objective
        best = objective.best(trial)
        if best is None:
            near = objective.nearest([trial])
            return f"misses the objective: {', '.join(near[1].misses)}" if near else "nothing was measured"
        text = f"{objective.value(best):.4g} {objective.unit} at {best.level:g}"
        base, mine = strategy.score(self._baseline(), objective), objective.score(best)
        return f"{text}, {mine / base:.3f} of the baseline's score" if trial.moves and base and mine else text

    def _baseline(self) -> Trial | None:
        return next((t for t in self.journal.trials if not t.moves and t.status is Status.OK), None)

    def _check_baseline(self, trial: Trial) -> None:
        """Without a working baseline there is nothing to compare with."""
        if trial.status is Status.OK:
            return
        self.journal.end("failed")
        kind = CheckFailedError if trial.status in (Status.WRONG, Status.TIMEOUT) else EngineFailedError
        raise kind(
            trial.code or "baseline_failed",
            f"the baseline, the profile as it is, cannot be tuned: {trial.reason}",
            "a longer --budget" if trial.status is Status.TIMEOUT else "make it serve first: qwen3emb up; verify",
            dict(trial.details),
        )

    # ---- time -----------------------------------------------------------------------------------------------------

    def _started(self) -> list[Trial]:
        return [t for t in self.journal.trials if t.ready_s is not None][-3:]

    def _start_time(self) -> float:
        """Seconds that a start with its proof and its end takes, by the slowest of the last three."""
        return max((t.seconds - sum(m.seconds for m in t.measurements) for t in self._started()), default=0.0) * SAFETY

    def _estimate(self, stage: Stage) -> float:
        """Seconds that one more trial takes."""
        loads = max((len(t.measurements) for t in self._started()), default=1)
        return self._start_time() + loads * (self.setup.seconds * strategy.SHARE[stage] + self.setup.warmup) * SAFETY

    def _final_time(self, entries: int, rounds: int) -> float:
        """Seconds of a final whose engines run side by side."""
        load = (self.setup.seconds + self.setup.warmup) * SAFETY
        return entries * (self._start_time() + load * (1 + rounds))

    def _reserve(self, step: strategy.Step) -> float:
        """What is kept back for the final, and for one combination while single settings are tried."""
        final = self._final_time(2, min(FEWEST_ROUNDS, self.setup.rounds)) if self.setup.rounds else 0.0
        return final + (self._estimate(Stage.COMBINATION) if step.stage is Stage.MOVE else 0.0)

    # ---- the final ------------------------------------------------------------------------------------------------

    def _final(self) -> Verdict:
        """The best two against the baseline in turns, as many rounds as the time allows."""
        objective = self.setup.objective
        best = strategy.finalists(self.journal.trials, objective)
        base = self._baseline()
        if not best:
            if base is None or strategy.judged(base, objective) is None:
                return Verdict(None, "no configuration met the objective")
            return Verdict(BASELINE, "no other configuration did better than the baseline, already when tried briefly")
        levels_of = self._levels([*([base] if base else []), *best])
        held = self.journal.rounds
        if held and len(held) >= self.setup.rounds and set(held[-1].measured) == set(levels_of):
            return judge(held, objective)  # a resumed run with nothing new
        if not self.setup.rounds:
            return self._unconfirmed("a final was not asked for (--rounds 0)")
        entries = list(levels_of)
        while len(entries) > 2 and self.left < self._final_time(len(entries), FEWEST_ROUNDS):
            entries.pop()
        per_round = len(entries) * (self.setup.seconds + self.setup.warmup) * SAFETY
        rounds = min(self.setup.rounds, int((self.left - self._final_time(len(entries), 0)) / per_round))
        if rounds < 1:
            return self._unconfirmed("no time was left for the final")
        self._contest({m: levels_of[m] for m in entries}, rounds)
        if not self.journal.rounds:
            return self._unconfirmed("the final could not be held")
        return judge(self.journal.rounds, objective)

    def _levels(self, trials: Sequence[Trial]) -> dict[Moves, float]:
        """The level each is judged at; a baseline that met the objective nowhere stands at its nearest."""
        objective = self.setup.objective
        found: dict[Moves, float] = {}
        for trial in trials:
            judged = objective.best(trial)
            near = objective.nearest([trial])
            found[trial.moves] = judged.level if judged else near[1].level if near else self.setup.start
        return found

    def _contest(self, levels_of: Mapping[Moves, float], rounds: int) -> None:
        """Side by side where all fit; else each is started again for every turn."""
        self.listener.said(f"final: {', '.join(map(label, levels_of))}; {rounds} rounds")
        try:
            with ExitStack() as stack:
                engines = {
                    moves: stack.enter_context(self.machine.start(moves, slot, max(1.0, self.left - STOPPING)))
                    for slot, moves in enumerate(levels_of)
                }
                self._rounds(levels_of, rounds, engines)
            return
        except (UnfitError, EngineFailedError) as error:
            if self.journal.rounds:
                self.notes.append(f"the final ended after {len(self.journal.rounds)} rounds: {error.message}")
                return
            self.notes.append(f"the finalists do not run side by side ({error.message}): started in turns")
        except _OutOfTimeError:
            return
        try:
            self._rounds(levels_of, rounds, None)
        except LaunchError as error:
            self.notes.append(f"the final ended early: {error.message}")
        except _OutOfTimeError:
            return

    def _rounds(self, levels_of: Mapping[Moves, float], rounds: int, engines: Mapping[Moves, Running] | None) -> None:
        """Everybody once a round, in alternating order, each at the level it settled on before its first turn."""
        top = max(levels_of.values())
        chosen = {moves: min(top, level * HIGHER) for moves, level in levels_of.items()}
        self.journal.begin_final(levels_of)
        for number in range(1, rounds + 1):
            measured: dict[Moves, Measurement] = {}
            for moves in list(chosen) if number % 2 else list(reversed(chosen)):
                with self._engine(moves, engines) as engine:
                    if number == 1:
                        chosen[moves] = self._settle(engine, chosen[moves])
                    self._check_time(self.setup.seconds)
                    found = engine.measure(chosen[moves], self.setup.seconds)
                # Side by side the card's memory is everybody's: what the configuration took alone counts.
                measured[moves] = replace(found, memory_bytes=self._alone(moves)) if engines else found
            self.journal.add_round(Round(number, measured))
            self.listener.said(f"final: round {number} of {rounds}: " + ", ".join(map(self._brief, measured.items())))

    def _engine(self, moves: Moves, engines: Mapping[Moves, Running] | None) -> AbstractContextManager[Running]:
        """The one that runs already, or a start for this turn."""
        if engines:
            return nullcontext(engines[moves])
        self._check_time(self._start_time() + self.setup.seconds)
        return self.machine.start(moves, 0, max(1.0, self.left - STOPPING))

    def _check_time(self, seconds: float) -> None:
        if self.left < seconds + self.setup.warmup + STOPPING:
            raise _OutOfTimeError

    def _settle(self, engine: Running, level: float) -> float:
        """The highest level that holds, from the same level for all: which one a brief trial ended at is chance."""
        seconds, searched = self.setup.seconds / 2, self.setup.objective.goal in SEARCHED
        for _ in range(EASINGS):
            self._check_time(seconds)
            if self.setup.objective.meets(engine.measure(level, seconds)) or not searched:
                break
            level = level / EASED if self.setup.open else float(max(1, min(int(level) - 1, round(level / EASED))))
        return level

    def _alone(self, moves: Moves) -> int | None:
        trial = next((t for t in self.journal.trials if t.moves == moves and t.status is Status.OK), None)
        best = self.setup.objective.best(trial) if trial else None
        return best.memory_bytes if best else None

    def _brief(self, pair: tuple[Moves, Measurement]) -> str:
        value = self.setup.objective.value(pair[1])
        return f"{label(pair[0])} {'-' if value is None else f'{value:.4g}'}"

    def _unconfirmed(self, why: str) -> Verdict:
        """Without a final the baseline stays, where it holds; what looked better is named."""
        objective = self.setup.objective
        base = strategy.score(self._baseline(), objective)
        best = strategy.finalists(self.journal.trials, objective)
        if not best:
            held = BASELINE if base is not None else None
            return Verdict(held, f"{why}; nothing tried so far did better than the baseline")
        first = strategy.score(best[0], objective)
        if base is None or first is None:
            return Verdict(best[0].moves, f"{why}; {best[0].label} meets the objective, the baseline does not")
        text = f"{why}: one brief measurement of {best[0].label} gave {first / base:.3f} times the baseline's score"
        return Verdict(BASELINE, f"{text}, which is not enough to choose it")


class _OutOfTimeError(Exception):
    """The budget is over."""
