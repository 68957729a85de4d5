"""The lifecycle of an instance, and the moves that are legal.

    starting -> ready -> (degraded -> ready) -> restarting -> starting ...
    any of them -> stopping -> stopped,     starting | restarting -> failed

Only the supervisor moves an instance; everyone else (status, journal, sd_notify, the gateway) reads the events.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


TRANSITIONS: dict[State, frozenset[State]] = {
    # starting -> degraded: one of several engines is back, the others are not.
    State.STARTING: frozenset({State.READY, State.DEGRADED, State.RESTARTING, State.STOPPING, State.FAILED}),
    State.READY: frozenset({State.DEGRADED, State.RESTARTING, State.STOPPING, State.FAILED}),
    State.DEGRADED: frozenset({State.READY, State.RESTARTING, State.STOPPING, State.FAILED}),
    State.RESTARTING: frozenset({State.STARTING, State.STOPPING, State.FAILED}),
    State.STOPPING: frozenset({State.STOPPED, State.FAILED}),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}

TERMINAL = frozenset({State.STOPPED, State.FAILED})


class IllegalTransitionError(AssertionError):
    """A bug in the supervisor: a move that the table above does not know."""


@dataclass(frozen=True)
class Transition:
    """One event of an instance's life. `at` is seconds since the epoch, `reason` is for people."""

    instance: str
    before: State
    after: State
    reason: str
    at: float
    unit: str = ""  # of which of its processes; empty: of the whole instance

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the event log and `--json`."""
        return asdict(self)


def check_transition(before: State, after: State) -> None:
    """Raise IllegalTransitionError unless `before -> after` is in the table."""
    if after not in TRANSITIONS[before]:
        raise IllegalTransitionError(f"illegal lifecycle move {before} -> {after}")
