"""How `tune` shows itself: a line a trial while it runs, tables and the sentence at the end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qwen3emb_launch.tune.machine import Listener
from qwen3emb_launch.tune.report import columns, final_columns, final_rows, rows, set_aside
from qwen3emb_launch.tune.space import in_order
from qwen3emb_launch.tune.trials import label

if TYPE_CHECKING:
    from pathlib import Path

    from qwen3emb_launch.console import Console
    from qwen3emb_launch.tune.objective import Objective
    from qwen3emb_launch.tune.report import Outcome
    from qwen3emb_launch.tune.space import Space
    from qwen3emb_launch.tune.trials import Stage, Trial


class Talk(Listener):
    """Lines on stderr, each with the time since the start."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = time.monotonic()

    def trying(self, number: int, stage: Stage, name: str) -> None:
        self._say(f"trial {number}, {stage}: {name}")

    def tried(self, trial: Trial, verdict: str) -> None:
        ready = f", ready after {trial.ready_s:.1f} s" if trial.ready_s is not None else ""
        what = f"trial {trial.number}, {trial.label}" if trial.number else f"not tried, {trial.label}"
        self._say(f"{what}: {verdict}{ready}")

    def said(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str) -> None:
        self._console.say(f"[{time.monotonic() - self._begin:6.1f} s] {text}")


def show(console: Console, outcome: Outcome, objective: Objective) -> None:
    """The outcome on stdout: every trial, the final, what is to be said of it."""
    facts, load = outcome.facts, outcome.load
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    texts = load["corpus"] or f"{load['tokens']} tokens a text"
    console.fields(
        [
            ("goal", outcome.goal + (f", within {outcome.slo}" if outcome.slo else "")),
            ("load", f"{load['batch']} texts a request, {texts}" + (f", {load['dims']} dims" if load["dims"] else "")),
            ("on", f"{facts['hardware']}; profile {facts['profile']}, model {facts['model']}; {versions}"),
            ("journal", outcome.journal),
        ]
    )
    console.text("")
    console.table(columns(objective), rows(outcome.trials, objective, bool(load["open"])))
    if outcome.final:
        console.text("")
        console.table(final_columns(objective), final_rows(outcome, objective))
    console.text("")
    console.text("* is on the front: none is better in one of texts/s, p95 and memory without being worse in another.")
    for line in set_aside(outcome.trials):
        console.text(f"Not tried: {line}.")
    console.text(f"Result: {outcome.sentence}.")
    if outcome.nearest:
        near = outcome.nearest
        console.text(f"Nearest to the objective: {near['label']} at {near['level']:g}: {', '.join(near['misses'])}.")
    for note in outcome.notes:
        console.say(f"note: {note}")
    if outcome.profile:
        console.text(f"Wrote {outcome.profile}: qwen3emb up --profile {profile_word(outcome.profile)}")


def profile_word(path: Path) -> str:
    """How `--profile` finds a file that was written: by name in the user's folder, else from its own folder."""
    from qwen3emb_launch.paths import paths

    return path.stem if path.parent == paths().profiles else f"./{path.name}"


def show_space(console: Console, space: Space, aside: dict[str, str]) -> None:
    """What would be tried, in order, and what not; `aside` says by its name why a value would not be started."""
    console.table(
        ("setting", "value", "why it is tried", "not started"),
        [(f.key, v, f.reason, aside.get(label(((f.key, v),)), "")) for f, v in in_order(space.factors)],
    )
    for key, why in space.left_out.items():
        console.say(f"left out: {key}: {why}")
