"""From the states of an instance's processes to the state of the instance. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3emb_launch.lifecycle import TRANSITIONS, State

SERVING = frozenset({State.READY, State.DEGRADED})
WAY = (State.RESTARTING, State.STARTING)  # the states on the way where a change has none of its own


def overall(engines: Sequence[State], gateway: State | None, *, was_ready: bool) -> State:
    """What users have of it. `gateway` is None where they call the engine itself; `was_ready`: all came up once.

    Nobody is served before everything came up. From then on it serves while one engine and the gateway do, degraded
    unless all do. An engine that was given up leaves the others serving; with the last one, or with the gateway, the
    instance has failed. An engine on its way out, to be replaced in its place, counts as one that restarts.
    """
    if gateway is State.FAILED or all(state is State.FAILED for state in engines):
        return State.FAILED
    parts = [*engines, *([gateway] if gateway else [])]
    if not was_ready:
        if State.FAILED in engines:
            return State.FAILED  # the first start of one of several: nothing would be better the second time
        return State.READY if all(state in SERVING for state in parts) else State.STARTING
    served = any(state in SERVING for state in engines)
    if served and gateway in (None, *SERVING):
        return State.READY if all(state is State.READY for state in parts) else State.DEGRADED
    waits_for = set()
    if not served:
        waits_for.add(State.STARTING if State.STARTING in engines else State.RESTARTING)
    if gateway is not None and gateway not in SERVING:
        waits_for.add(State.STARTING if gateway is State.STARTING else State.RESTARTING)
    return State.RESTARTING if State.RESTARTING in waits_for else State.STARTING


def steps(before: State, after: State) -> tuple[State, ...]:
    """The legal moves that lead from one state to another; empty when they are the same."""
    if before is after:
        return ()
    if after in TRANSITIONS[before]:
        return (after,)
    for between in WAY:
        if between in TRANSITIONS[before] and after in TRANSITIONS[between]:
            return (between, after)
    return tuple(s for s in (*WAY, after) if s is not before)
