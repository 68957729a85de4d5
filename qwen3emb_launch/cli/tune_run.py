"""One run of `tune` from its journal to its outcome: the trials, then the winner as a profile."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.bench.record import this_tool
from qwen3emb_launch.cli.tune_trials import Engines, facts_of
from qwen3emb_launch.cli.tune_view import Talk, profile_word, show
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.tune import report, winner
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.tune.machine import Setup
from qwen3emb_launch.tune.runner import Tuning
from qwen3emb_launch.tune.trials import Measurement, Moves

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.tune.contest import Verdict
    from qwen3emb_launch.tune.space import Space

TEXTS_A_TRIAL = 1 << 30  # numbers set aside, so that a resumed run sends no text again


@dataclass
class Job:
    """What the command line came to."""

    console: Console
    setup: Setup
    engines: Engines
    space: Space
    load: dict[str, Any]
    journal: Path
    target: Path

    def run(self, resume: bool) -> report.Outcome:
        """Every trial that the budget allows. On Ctrl-C the outcome is partial and no profile is written."""
        began = time.monotonic()
        journal = Journal(self.journal, self._identity(), resume=resume)
        profile, unwritten = None, None
        try:
            if journal.trials:
                self.engines.load_baseline()
                self.engines.texts += len(journal.trials) * TEXTS_A_TRIAL
            tuning = Tuning(self.setup, self.engines, journal, time.monotonic, Talk(self.console))
            verdict = tuning.run()
            try:
                profile = None if tuning.interrupted else self._write_profile(tuning, verdict)
            except LaunchError as error:
                unwritten = error
            journal.end("interrupted" if tuning.interrupted else "failed" if unwritten else "done")
        finally:
            journal.close()
        outcome = self._outcome(tuning, verdict, profile, time.monotonic() - began)
        if unwritten:  # the figures are not lost for that: --resume only writes
            unwritten.result = outcome
            if not self.console.json:
                show(self.console, outcome, self.setup.objective)
            raise unwritten
        return outcome

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a journal to be gone on with."""
        objective, plan = self.setup.objective, self.engines.plan_now
        facts = {k: v for k, v in facts_of(plan).items() if k not in ("driver", "hardware")}
        return {
            **facts,
            "gpu": plan.gpu.name if plan.gpu else None,
            "set": dict(self.engines.fixed),
            "goal": objective.goal.value,
            "slo": str(objective.slo) if objective.slo else None,
            "load": self.load,
            "space": {f.key: f.values for f in self.space.factors},
        }

    def _outcome(self, tuning: Tuning, verdict: Verdict, profile: Path | None, seconds: float) -> report.Outcome:
        objective, trials = self.setup.objective, tuning.journal.trials
        tried = {f.key: {"values": f.values, "reason": f.reason} for f in self.space.factors}
        return report.Outcome(
            goal=objective.goal.value,
            unit=objective.unit,
            slo=str(objective.slo) if objective.slo else None,
            winner=None if verdict.winner is None else dict(verdict.winner),
            sentence=verdict.sentence,
            confirmed=verdict.confirmed,
            facts=facts_of(self.engines.plan_now),
            load=self.load,
            trials=tuple(trials),
            final=report.finalists(verdict, objective),
            front=report.front(trials, objective),
            nearest=report.nearest(trials, objective),
            space={"tried": tried, "left_out": self.space.left_out},
            untried=tuple(tuning.untried),
            notes=tuple(tuning.notes),
            partial=tuning.interrupted,
            seconds=round(seconds, 1),
            journal=self.journal,
            profile=profile,
            tool=this_tool(),
        )

    # ---- the profile ----------------------------------------------------------------------------------------------

    def _write_profile(self, tuning: Tuning, verdict: Verdict) -> Path | None:
        """The winner as a profile, planned once more: it must come to the command that was measured."""
        won = verdict.winner
        figures = None if won is None else verdict.typical.get(won) or tuning.measured(won)
        if won is None or figures is None:
            return None
        ratio = verdict.ratios.get(won)
        text = winner.profile_text(
            self.engines.chosen.profile,
            self.target.stem,
            {**self.engines.fixed, **dict(won)},
            won,
            self._measured(figures, ratio.value if ratio else None),
            self.engines.plan_now.engine.flags,
            self._model(),
        )
        self._check(text, won)
        winner.save(self.target, text)
        return self.target

    def _measured(self, figures: Measurement, over_baseline: float | None) -> winner.Measured:
        facts, load, slo = facts_of(self.engines.plan_now), self.load, self.setup.objective.slo
        texts = load["corpus"] or f"texts of {load['tokens']} tokens"
        what = f"{texts}, {load['batch']} a request, {report.load_words(figures.level, self.setup.open)}"
        return winner.Measured(
            figures=figures,
            load=what + (f", within {slo}" if slo else ""),
            command=winner.again(profile_word(self.target), load, figures.level, self.setup.open, self.setup.seconds),
            hardware=facts["hardware"],
            versions=facts["versions"],
            day=datetime.now(UTC).date(),
            over_baseline=over_baseline,
        )

    def _model(self) -> str | None:
        """The model that was asked for; a folder so that it is found from anywhere."""
        model = self.engines.options.model
        return str(Path(model).absolute()) if model is not None and Path(model).is_dir() else model

    def _check(self, text: str, won: Moves) -> None:
        from dataclasses import replace

        from qwen3emb_launch import planning
        from qwen3emb_launch.profile_text import parse_profile

        measured = planning.plan(self.engines.request(won))
        request = replace(self.engines.request(()), profile=parse_profile(text, str(self.target)), overrides={})
        if planning.plan(request).argv != measured.argv:
            self.console.warn("the profile does not come to the command that was measured: compare `up --dry-run`")
