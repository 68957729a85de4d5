"""What the supervisor's machine is told, and what it asks for. Plain data on both sides.

`start` in an event is the number of the engine start it belongs to: an answer that arrives after its engine was
replaced is recognised by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qwen3emb_launch.engine_process.strain import Strain
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Answer

# ---- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Start the engine for the first time."""


@dataclass(frozen=True)
class EngineSpawned:
    """The main process runs."""

    start: int
    pid: int


@dataclass(frozen=True)
class EngineDoomed:
    """It said that it is lost. Its main process has not ended yet."""

    start: int
    reason: str


@dataclass(frozen=True)
class EngineDied:
    """The main process ended, could not be started, or was lost with its guard. Its remains are being removed."""

    start: int
    reason: str


@dataclass(frozen=True)
class EngineGone:
    """Nothing of that start is left."""

    start: int


@dataclass(frozen=True)
class EngineStuck:
    """SIGKILL did not remove these processes so far."""

    start: int
    pids: tuple[int, ...]


@dataclass(frozen=True)
class Probed:
    """A probe's answer. `progress`: the engine worked on other requests meanwhile (its log shows batches); `strain` is
    what the machine kept from it, where there was no answer."""

    start: int
    answer: Answer
    progress: bool = False
    strain: Strain | None = None


@dataclass(frozen=True)
class Checked:
    """The smoke test ended. `faults` is empty when all is well; `report` is the check's own result; `warnings` is what
    to know of an engine that serves all the same."""

    start: int
    faults: tuple[str, ...]
    report: Any = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The gateway gives it no traffic: its vectors are not those that it was to give."""

    start: int
    reason: str


@dataclass(frozen=True)
class StopAsked:
    """SIGTERM, SIGINT or `down`. The second one means at once; so does the first where nothing is left to `drain`."""

    by: str
    drain: bool = True


@dataclass(frozen=True)
class Tick:
    """Time passed: `wake_at` was reached."""


Event = (
    Begin | EngineSpawned | EngineDoomed | EngineDied | EngineGone | EngineStuck | Probed | Checked | Refused
    | StopAsked | Tick
)  # fmt: skip

# ---- actions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spawn:
    """Start the engine; its events carry this number."""

    start: int


@dataclass(frozen=True)
class Probe:
    """Ask for one embedding and answer with `Probed` within about `timeout` seconds."""

    start: int
    timeout: float


@dataclass(frozen=True)
class Check:
    """Run the smoke test and answer with `Checked` within about `timeout` seconds."""

    start: int
    timeout: float


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to the engine's main process alone."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL to everything descended from the engine."""


@dataclass(frozen=True)
class Move:
    """The unit changed its state."""

    before: State
    after: State
    reason: str


@dataclass(frozen=True)
class Note:
    """Something worth a line that is no change of state."""

    text: str


Action = Spawn | Probe | Check | Terminate | Kill | Move | Note


class Cause(StrEnum):
    """Why a unit failed: decides how the supervisor words it."""

    EXIT = "exit"  # the engine's process ended
    DEADLINE = "deadline"  # it never became ready
    ANSWERS = "answers"  # it answers, and wrongly
    CHECK = "check"  # the smoke test failed
    LIVENESS = "liveness"  # it stopped answering
    STUCK = "stuck"  # its processes could not be removed


@dataclass(frozen=True)
class Fault:
    """What went wrong with a start: cause and one sentence. `report` is a failed smoke test's own result."""

    cause: Cause
    reason: str
    report: Any = field(default=None, compare=False)
