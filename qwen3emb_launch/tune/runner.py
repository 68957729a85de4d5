"""The run: what the strategy asks for is planned, started, proven and measured, within the budget, into the journal.

A trial that cannot be planned, does not start, runs out of memory, answers wrongly or dies under load is a result like
any other. The clock and everything that touches an engine are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from qwen3emb_launch.errors import CheckFailedError, EngineFailedError, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.statistics import FEWEST_PAIRS
from qwen3emb_launch.tune import levels, strategy
from qwen3emb_launch.tune.budget import (
    BRIEF,
    Budget,
    Estimates,
    OutOfTimeError,
    estimates,
    next_step,
)
from qwen3emb_launch.tune.contest import BASELINE, Verdict, judge
from qwen3emb_launch.tune.final import Final
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.tune.machine import Listener, Machine, Running, Setup
from qwen3emb_launch.tune.objective import SEARCHED
from qwen3emb_launch.tune.space import TEXTS_OF_A_BATCH
from qwen3emb_launch.tune.trials import SET_ASIDE, Measurement, Moves, Proof, Stage, Status, Trial, label

FINER = 1.5  # step of the search once the baseline's level is known
HEADROOM = 2.0  # what a better setting may have in flight, over the baseline


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
    _budget: Budget = field(init=False)

    def run(self) -> Verdict:
        """Trials, then the final. On Ctrl-C, what is known so far, with `interrupted` set.

        Raises EngineFailedError or InvalidInputError when the baseline itself cannot be served.
        """
        setup = self.setup
        self._budget = Budget(setup.budget, self.clock, setup.seconds, setup.warmup, setup.apart)
        try:
            self._trials()
            return self._final()
        except KeyboardInterrupt:
            self.interrupted = True
            self.untried = _names(self._steps())
            return self._unconfirmed("interrupted")

    # ---- trials ---------------------------------------------------------------------------------------------------

    def _steps(self) -> list[strategy.Step]:
        return list(strategy.steps(self.setup.factors, self.journal.trials, self.setup.objective))

    def _trials(self) -> None:
        for trial in self.journal.trials:
            self._learn(trial)
        while steps := self._steps():
            if steps[0].stage is Stage.BASELINE:
                baseline = self._try(steps[0])
                self._keep(baseline)
                self._check_baseline(baseline)
                continue
            aside = next(filter(None, map(self._set_aside, steps)), None)
            if aside:
                self._keep(aside)
                continue
            seen = self._estimates()
            step = next_step(steps, seen)
            if step is None:
                self._leave(steps, seen)
                return
            self._keep(self._try(step))

    def _estimates(self) -> Estimates:
        trials = self.journal.trials
        candidate = bool(strategy.finalists(trials, self.setup.objective))
        return estimates(self._budget, trials, self.setup.rounds, candidate)

    def _leave(self, steps: Sequence[strategy.Step], seen: Estimates) -> None:
        """No time for these, or none but the final's."""
        self.untried = _names(steps)
        least = min(map(seen.of, steps))
        kept = seen.candidate and seen.brief and least <= seen.left
        what = f"which the final is to have (one more trial takes about {least:.0f} s)"
        other = f"and one more trial takes about {least:.0f} s"
        self.notes.append(
            f"{seen.left:.0f} s of the budget were left, {what if kept else other}: "
            f"untried: {', '.join(self.untried)}; --resume tries them"
        )

    def _learn(self, trial: Trial) -> None:
        """A trial of an earlier run: its command needs no second one."""
        try:
            if trial.status not in SET_ASIDE:
                self._commands.setdefault(self.machine.plan(trial.moves), trial.moves)
        except LaunchError:
            return

    def _set_aside(self, step: strategy.Step) -> Trial | None:
        """The result without a start, where the planner refuses it or knows its command already."""
        at = self.now().isoformat(timespec="seconds")
        try:
            command = self.machine.plan(step.moves)
        except (InvalidInputError, UnfitError) as error:
            return Trial(0, step.stage, step.moves, Status.REFUSED, error.message, error.code, at=at)
        earlier = self._commands.get(command)
        if earlier not in (None, step.moves):
            why = f"the same command as {label(earlier or ())}"
            return Trial(0, step.stage, step.moves, Status.SAME, why, "same_command", at=at)
        unreached = self._unreached(step)
        return Trial(0, step.stage, step.moves, Status.UNREACHED, unreached, "unreached", at=at) if unreached else None

    def _unreached(self, step: strategy.Step) -> str:
        """Why a single setting cannot matter to a load like the baseline's, or nothing."""
        base = self.measured(BASELINE)
        if base is None or step.stage is not Stage.MOVE:
            return ""
        # Of an open loop by Little's law, with the tail for its bursts.
        requests = base.level if not self.setup.open else base.requests_per_s * (base.p99 or 0.0) / 1000
        texts = HEADROOM * requests * base.texts_per_s / base.requests_per_s
        most = {"texts": texts}
        if base.tokens_per_s:
            a_batch = next((f.present for f in self.setup.factors if f.key == TEXTS_OF_A_BATCH), None)
            most["tokens"] = min(texts, a_batch or texts) * base.tokens_per_s / base.texts_per_s
        found = (f.unreached(v, most) for f in self.setup.factors for v in f.values if ((f.key, v),) == step.moves)
        return next(found, "")

    def _try(self, step: strategy.Step) -> Trial:
        number = 1 + max((t.number for t in self.journal.trials), default=0)
        self._commands.setdefault(self.machine.plan(step.moves), step.moves)
        self.listener.trying(number, step.stage, label(step.moves))
        began, at = self.clock(), self.now().isoformat(timespec="seconds")
        trial = Trial(number, step.stage, step.moves, Status.OK, at=at)
        found: list[Measurement] = []
        ready: float | None = None
        proof: Proof | None = None
        try:
            with self.machine.start(step.moves, 0, self._budget.for_a_start) as engine:
                ready = engine.ready_s
                proof = engine.prove()
                if proof.passed:
                    self._measure(engine, step.stage, found)
                else:
                    trial = replace(trial, status=Status.WRONG, code="verification_failed", reason=proof.summary)
        except OutOfTimeError:
            trial = replace(trial, reason="cut short: the budget was over")
            if not found:
                trial = replace(trial, status=Status.TIMEOUT, code="out_of_time")
        except LaunchError as error:
            out = error.code == "out_of_time"
            lines, log = error.details.get("last_lines"), error.details.get("log")
            trial = replace(
                trial,
                status=Status.TIMEOUT if out else Status.FAILED,
                code=error.code,
                reason=error.message,
                details={**({"last_lines": lines[-5:]} if lines else {}), **({"log": log} if log else {})},
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
            self._budget.check(seconds)
            found.append(engine.measure(level, seconds))
            return found[-1]

        if setup.objective.goal not in SEARCHED:
            look(setup.start)
            return
        known = self.measured(BASELINE)
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

    def measured(self, moves: Moves) -> Measurement | None:
        """What a configuration came to in its own trial."""
        return strategy.measured(self.journal.trials, moves, self.setup.objective)

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

    # ---- the final ------------------------------------------------------------------------------------------------

    def _final(self) -> Verdict:
        """The best two against the baseline in turns, as many rounds as the time allows."""
        objective = self.setup.objective
        best = strategy.finalists(self.journal.trials, objective)
        base = self._baseline()
        if not best:
            if self.measured(BASELINE) is None:
                return Verdict(None, "no configuration met the objective")
            if not any(t.moves and t.status is Status.OK for t in self.journal.trials):
                return Verdict(BASELINE, "nothing but the baseline was measured")
            return Verdict(BASELINE, "no other configuration did better than the baseline, already when tried briefly")
        levels_of = self._levels([*([base] if base else []), *best])
        held = self._held(levels_of)
        if held == self.setup.seconds:
            return judge(self.journal.rounds, objective)  # a resumed run with nothing new
        if not self.setup.rounds:
            return self._unconfirmed("a final was not asked for (--rounds 0)")
        budget, entries, trials = self._budget, list(levels_of), self.journal.trials
        while len(entries) > 2 and budget.left < budget.final_time(len(entries), FEWEST_PAIRS, trials):
            entries.pop()
        share = 1.0 if budget.left >= budget.final_time(len(entries), FEWEST_PAIRS, trials) else BRIEF
        if held and share < 1.0:
            self._say_brief(held)
            return judge(self.journal.rounds, objective)  # it would come to the same again
        if budget.left < budget.final_time(len(entries), 1, trials, share):
            takes = budget.final_time(2, FEWEST_PAIRS, trials)
            return self._unconfirmed(f"no time was left for a final, which takes {takes:.0f} s or more (--resume)")
        setup = replace(self.setup, seconds=share * self.setup.seconds)
        if setup != self.setup:
            self._say_brief(setup.seconds)
        final = Final(setup, self.machine, self.journal, budget, self.listener, self.notes)
        final.hold({m: levels_of[m] for m in entries}, self.setup.rounds)
        if not self.journal.rounds:
            return self._unconfirmed("the final could not be held")
        verdict = judge(self.journal.rounds, objective)
        return self._undecided(verdict, final, len(entries)) if verdict.undecided else verdict

    def _undecided(self, verdict: Verdict, final: Final, entries: int) -> Verdict:
        """A final that ended too early to choose: why, and how long one that can takes."""
        held = len(self.journal.rounds)
        count = f"{held} round{'s' * (held != 1)}"
        ended = (
            f"the budget was over after {count} of the final" if final.out_of_time else f"the final ended after {count}"
        )
        takes = self._budget.final_time(entries, FEWEST_PAIRS, self.journal.trials)
        why = f"{ended}, too early to decide"
        more = f"the final alone takes about {takes:.0f} s: --resume with a --budget of more"
        return replace(verdict, sentence=f"{why}: {verdict.sentence}; {more}")

    def _held(self, entries: Collection[Moves]) -> float | None:
        """Seconds of a load in the final between these that an earlier run held to its end."""
        held = self.journal.rounds
        whole = held and len(held) >= self.setup.rounds and set(held[-1].measured) == set(entries)
        return held[-1].seconds if whole else None

    def _say_brief(self, seconds: float) -> None:
        self.notes.append(f"there was time for a final of loads of {seconds:.3g} s, not {self.setup.seconds:g}")

    def _levels(self, trials: Sequence[Trial]) -> dict[Moves, float]:
        """The level each is judged at; a baseline that met the objective nowhere stands at its nearest."""
        objective = self.setup.objective
        found: dict[Moves, float] = {}
        for trial in trials:
            judged = objective.best(trial)
            near = objective.nearest([trial])
            found[trial.moves] = judged.level if judged else near[1].level if near else self.setup.start
        return found

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


def _names(steps: Sequence[strategy.Step]) -> list[str]:
    """Single settings by name; what would have been combined is not known yet, so only how many."""
    single = [label(s.moves) for s in steps if s.stage in (Stage.BASELINE, Stage.MOVE)]
    rest = len(steps) - len(single)
    return [*single, *([f"{rest} combination{'s' * (rest > 1)}"] if rest else [])]
