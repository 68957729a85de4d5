"""Holding the final: the engines of the finalists, the level each settles on, and the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace

from qwen3emb_launch.errors import EngineFailedError, LaunchError, UnfitError
from qwen3emb_launch.tune import strategy
from qwen3emb_launch.tune.budget import Budget, OutOfTimeError
from qwen3emb_launch.tune.journal import Journal
from qwen3emb_launch.tune.machine import Listener, Machine, Running, Setup
from qwen3emb_launch.tune.objective import SEARCHED
from qwen3emb_launch.tune.trials import Measurement, Moves, Round, label

HIGHER = 1.6  # a finalist begins so much above its own level at most, where another held a higher one
EASED = 1.25  # and is lowered by that until the objective holds, at most EASINGS times
EASINGS = 5


@dataclass
class Final:
    """One final. Rounds go into the journal as they end; what went otherwise than meant into `notes`.

    `out_of_time` tells that the budget ended it before its last round.
    """

    setup: Setup
    machine: Machine
    journal: Journal
    budget: Budget
    listener: Listener
    notes: list[str] = field(default_factory=list)
    out_of_time: bool = False

    def hold(self, levels_of: Mapping[Moves, float], rounds: int) -> None:
        """Side by side where all fit; else each is started again for every turn. It ends early with the budget."""
        self.listener.said(f"final: {', '.join(map(label, levels_of))}; up to {rounds} rounds")
        if not self.setup.apart and self._side_by_side(levels_of, rounds):
            return
        try:
            self._rounds(levels_of, rounds, None)
        except LaunchError as error:
            self.notes.append(f"the final ended early: {error.message}")
        except OutOfTimeError:
            self.out_of_time = True

    def _side_by_side(self, levels_of: Mapping[Moves, float], rounds: int) -> bool:
        """Whether it was held so, or cannot be held at all for want of time."""
        try:
            with ExitStack() as stack:
                engines = {
                    moves: stack.enter_context(self.machine.start(moves, slot, self.budget.for_a_start))
                    for slot, moves in enumerate(levels_of)
                }
                self._rounds(levels_of, rounds, engines)
        except (UnfitError, EngineFailedError) as error:
            if not self.journal.rounds:
                self.notes.append(f"the finalists do not run side by side ({error.message}): started in turns")
                return False
            self.notes.append(f"the final ended after {len(self.journal.rounds)} rounds: {error.message}")
        except OutOfTimeError:
            self.out_of_time = True
        return True

    def _rounds(self, levels_of: Mapping[Moves, float], rounds: int, engines: Mapping[Moves, Running] | None) -> None:
        """Everybody once a round, in alternating order, each at the level it settled on before its first turn."""
        top = max(levels_of.values())
        chosen = {moves: min(top, level * HIGHER) for moves, level in levels_of.items()}
        self.journal.begin_final(levels_of)
        for number in range(1, rounds + 1):
            measured: dict[Moves, Measurement] = {}
            for moves in list(chosen) if number % 2 else list(reversed(chosen)):
                with self._engine(moves, engines) as engine:
                    running = len(engines) if engines else 1
                    if number == 1:
                        chosen[moves] = self._settle(engine, chosen[moves], running)
                    self.budget.check(self.setup.seconds, running)
                    found = engine.measure(chosen[moves], self.setup.seconds)
                # Side by side the card's memory is everybody's: what the configuration took alone counts.
                measured[moves] = replace(found, memory_bytes=self._alone(moves)) if engines else found
            self.journal.add_round(Round(number, measured, self.setup.seconds))
            self.listener.said(f"final: round {number} of {rounds}: " + ", ".join(map(self._brief, measured.items())))

    def _engine(self, moves: Moves, engines: Mapping[Moves, Running] | None) -> AbstractContextManager[Running]:
        """The one that runs already, or a start for this turn."""
        if engines:
            return nullcontext(engines[moves])
        self.budget.check(self.budget.start_time(self.journal.trials) + self.setup.seconds)
        return self.machine.start(moves, 0, self.budget.for_a_start)

    def _settle(self, engine: Running, level: float, running: int) -> float:
        """The highest level that holds, from the same level for all: which one a brief trial ended at is chance."""
        seconds, searched = self.setup.seconds / 2, self.setup.objective.goal in SEARCHED
        for _ in range(EASINGS):
            self.budget.check(seconds, running)
            if self.setup.objective.meets(engine.measure(level, seconds)) or not searched:
                break
            level = level / EASED if self.setup.open else float(max(1, min(int(level) - 1, round(level / EASED))))
        return level

    def _alone(self, moves: Moves) -> int | None:
        best = strategy.measured(self.journal.trials, moves, self.setup.objective)
        return best.memory_bytes if best else None

    def _brief(self, pair: tuple[Moves, Measurement]) -> str:
        value = self.setup.objective.value(pair[1])
        return f"{label(pair[0])} {'-' if value is None else f'{value:.4g}'}"
