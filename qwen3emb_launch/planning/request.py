"""What a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import EngineFacts, GpuFacts, ModelFacts

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile


@dataclass(frozen=True)
class PlanRequest:
    """Everything the planner decides on. It looks at nothing else: no clock, no disk, no environment of its own.

    `environ` is the launcher's environment; only QWEN3EMB_SET_* is read. `overrides` are the `--set` values by key.
    `host` and `port` are where users call. `engine_host`/`engine_port` is where the engine listens when the gateway
    stands between (left out: 127.0.0.1 and the first private port; the supervisor takes another where it is not free).
    `ram_bytes` is the free host memory, for engines without a GPU; None is unknown. `gateway_workers` is what suits the
    machine where nobody says how many (`front.workers_for`).
    """

    profile: Profile
    model: ModelFacts
    engine: EngineFacts
    gpu: GpuFacts | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    host: str | None = None
    port: int | None = None
    engine_host: str | None = None
    engine_port: int | None = None
    served_name: str | None = None
    ram_bytes: int | None = None
    gateway_workers: int = 1


def read_overrides(words: list[str]) -> dict[str, str]:
    """`--set key=value` words as a mapping. InvalidInputError `bad_setting` for one without `=` or given twice."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InvalidInputError(
                "bad_setting", f"--set {word}: not of the form key=value", "--set tp=2, for example"
            )
        if key in found:
            raise InvalidInputError("bad_setting", f"--set {key} is given twice", "give it once")
        found[key] = value.strip()
    return found
