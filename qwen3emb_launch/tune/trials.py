"""What was tried and what came of it: plain data that the journal keeps and reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Moves = tuple[tuple[str, str], ...]  # (setting, value) as `--set` takes them, in order of the settings' names


def moves(overrides: Mapping[str, str]) -> Moves:
    """Overrides in the form that can be compared and kept."""
    return tuple(sorted(overrides.items()))


class Stage(StrEnum):
    """Why a configuration is tried. Each stage measures for longer than the one before."""

    BASELINE = "baseline"
    MOVE = "move"  # one setting changed
    COMBINATION = "combination"  # several that each were better alone
    REFINEMENT = "refinement"  # one setting more or less than the best


class Status(StrEnum):
    """What became of a trial."""

    OK = "ok"
    REFUSED = "refused"  # by the planner: never started
    SAME = "same"  # the same command as another trial: nothing to measure
    UNREACHED = "unreached"  # a limit that this load does not come to: nothing to measure
    FAILED = "failed"  # did not start, ran out of memory, died under load
    WRONG = "wrong"  # its vectors did not pass `verify --level quick`
    TIMEOUT = "timeout"  # its share of the budget was over
    INTERRUPTED = "interrupted"  # by the user: no result, tried again on --resume


SET_ASIDE = frozenset({Status.REFUSED, Status.SAME, Status.UNREACHED})  # without a start


@dataclass(frozen=True)
class Measurement:
    """One load on one configuration. `level` is clients or requests a second; latencies are milliseconds.

    `objective_ms` is the percentile that `latency` tunes for. `memory_bytes` is the GPU's (without one, the engine
    processes' resident memory). None is unknown. `misses` are the objectives not met, in words.
    """

    level: float
    seconds: float
    requests_per_s: float
    texts_per_s: float
    tokens_per_s: float | None
    p50: float | None
    p95: float | None
    p99: float | None
    objective_ms: float | None
    error_rate: float
    misses: tuple[str, ...] = ()
    memory_bytes: int | None = None
    watts: float | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `results.plain`."""
        return cls(**{**data, "misses": tuple(data.get("misses", ()))})


@dataclass(frozen=True)
class Proof:
    """What `verify --level quick` said. `cosine` is the smallest one to the baseline's vectors, None for itself."""

    passed: bool
    summary: str
    fingerprint: str | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Trial:
    """One configuration tried. `seconds` is all the time it took, `ready_s` from its start to serving.

    `number` counts what was started, from 1; 0 was set aside without a start (SET_ASIDE).
    """

    number: int
    stage: Stage
    moves: Moves
    status: Status
    reason: str = ""
    code: str = ""
    ready_s: float | None = None
    proof: Proof | None = None
    measurements: tuple[Measurement, ...] = ()
    seconds: float = 0.0
    at: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`baseline`, or the settings that differ from it."""
        return label(self.moves)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `results.plain`. Raises KeyError, TypeError or ValueError for anything else."""
        proof = data.get("proof")
        return cls(
            **{
                **data,
                "stage": Stage(data["stage"]),
                "status": Status(data["status"]),
                "moves": tuple((str(k), str(v)) for k, v in data["moves"]),
                "proof": Proof(**proof) if proof else None,
                "measurements": tuple(Measurement.from_dict(m) for m in data["measurements"]),
            }
        )


@dataclass(frozen=True)
class Round:
    """One turn of the final: every finalist measured once, one after another, by loads of `seconds` (None: unknown)."""

    number: int
    measured: Mapping[Moves, Measurement]
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON keys are text, so a list of pairs."""
        pairs = [[list(map(list, k)), v] for k, v in self.measured.items()]
        return {"number": self.number, "measured": pairs, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Round:
        """The inverse of `to_dict`."""
        pairs = [(tuple((str(a), str(b)) for a, b in k), Measurement.from_dict(v)) for k, v in data["measured"]]
        seconds = data.get("seconds")
        return cls(int(data["number"]), dict(pairs), None if seconds is None else float(seconds))


def label(changed: Moves) -> str:
    """A configuration's name for people."""
    return " ".join(f"{key}={value}" for key, value in changed) or "baseline"
