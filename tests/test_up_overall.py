"""From the states of several processes to the instance's, by table; and that every change has legal moves."""

from __future__ import annotations

from itertools import product

import pytest

from qwen3emb_launch.lifecycle import TERMINAL, State, check_transition
from qwen3emb_launch.up.overall import SERVING, overall, steps

LETTERS = {
    "S": State.STARTING, "R": State.READY, "D": State.DEGRADED, "r": State.RESTARTING, "s": State.STOPPING,
    "-": State.STOPPED, "F": State.FAILED,
}  # fmt: skip


@pytest.mark.parametrize(
    ("engines", "gateway", "was_ready", "expected"),
    [
        ("S", "", False, "S"),
        ("R", "", False, "R"),
        ("F", "", False, "F"),
        ("D", "", True, "D"),
        ("r", "", True, "r"),
        ("S", "", True, "S"),
        ("F", "", True, "F"),
        # the gateway alone is no service, and without it there is none
        ("S", "R", False, "S"),
        ("R", "S", False, "S"),
        ("R", "R", False, "R"),
        ("S", "F", False, "F"),
        ("R", "r", True, "r"),
        ("R", "S", True, "S"),
        ("R", "D", True, "D"),
        ("R", "F", True, "F"),
        ("r", "S", True, "r"),
        ("S", "r", True, "r"),
        ("S", "S", True, "S"),
        # several engines: ready with all of them, degraded with some
        ("RS", "R", False, "S"),
        ("RR", "R", False, "R"),
        ("RF", "R", False, "F"),
        ("RR", "R", True, "R"),
        ("RS", "R", True, "D"),
        ("Rr", "R", True, "D"),
        ("RD", "R", True, "D"),
        ("RF", "R", True, "D"),
        ("Sr", "R", True, "S"),
        ("rr", "R", True, "r"),
        ("rF", "R", True, "r"),
        ("FF", "R", True, "F"),
        # being replaced in its place
        ("s", "R", True, "r"),
        ("-", "R", True, "r"),
        ("-R", "R", True, "D"),
    ],
)
def test_what_users_have(engines: str, gateway: str, was_ready: bool, expected: str) -> None:
    """Nobody is served before all came up; afterwards one engine and the gateway are a service, degraded."""
    seen = overall([LETTERS[e] for e in engines], LETTERS[gateway] if gateway else None, was_ready=was_ready)
    assert seen is LETTERS[expected]


def test_serving_means_that_somebody_is_served() -> None:
    """Over all states of two engines and a gateway: ready or degraded exactly when an engine and the gateway serve."""
    for first, second, gateway in product(State, State, (None, *State)):
        state = overall([first, second], gateway, was_ready=True)
        served = (first in SERVING or second in SERVING) and gateway in (None, *SERVING)
        assert (state in SERVING) == served, (first, second, gateway)


def test_every_change_is_made_of_legal_moves() -> None:
    """Between any two states of a living instance there is a way, each step of which the lifecycle knows."""
    living = [state for state in State if state not in TERMINAL and state is not State.STOPPING]
    for before, after in product(living, [*living, State.FAILED]):
        at = before
        for step in steps(before, after):
            check_transition(at, step)
            at = step
        assert at is after
