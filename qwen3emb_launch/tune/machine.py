"""What a run is given: what to tune for, what starts engines, and who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from qwen3emb_launch.tune.objective import Objective
from qwen3emb_launch.tune.space import Factor
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof, Stage, Trial


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
    each. `budget` is seconds for everything; `rounds` of the final, 0 for none. `apart`: an engine that waits for its
    turn would not leave the others alone, as on a CPU whose cores it polls on; each is started for its turn then.
    """

    objective: Objective
    factors: tuple[Factor, ...]
    start: float
    open: bool
    seconds: float
    warmup: float
    budget: float
    rounds: int
    apart: bool = False
