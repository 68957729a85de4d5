"""A launch plan as JSON-ready data and back: `up` writes it into the instance's folder, the supervisor reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import (
    Deadlines,
    EngineFacts,
    EngineFlag,
    GpuFacts,
    LaunchPlan,
    MemoryEstimate,
    ModelFacts,
    RestartPolicy,
    Setting,
)
from qwen3emb_launch.results import plain

SCHEMA = 1


def plan_to_dict(plan: LaunchPlan) -> dict[str, Any]:
    """Plain data. The engine's list of options is left out: the plan's command was checked against it already."""
    data: dict[str, Any] = plain(plan)
    data["engine"].pop("flags")
    return {"schema": SCHEMA, **data}


def plan_text(plan: LaunchPlan) -> str:
    """The text of plan.json."""
    return json.dumps(plan_to_dict(plan), ensure_ascii=False, indent=1)


def plan_from_dict(data: Mapping[str, Any]) -> LaunchPlan:
    """The plan again, with an engine that has no options listed.

    Raises InvalidInputError `bad_plan` for data that is no plan, or one of another schema.
    """
    try:
        if data["schema"] != SCHEMA:
            raise InvalidInputError(
                "bad_plan", f"a launch plan of schema {data['schema']}; this launcher reads {SCHEMA}", "start it again"
            )
        return _plan({key: value for key, value in data.items() if key != "schema"})
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise InvalidInputError("bad_plan", f"not a launch plan: {exc!r}", "start it again") from exc


def _plan(data: dict[str, Any]) -> LaunchPlan:
    model, engine, gpu, memory = data["model"], data["engine"], data["gpu"], data["memory"]
    return LaunchPlan(
        **data
        | {
            "model": ModelFacts(**model | {"path": Path(model["path"]), "shape": ModelShape(**model["shape"])}),
            "engine": EngineFacts(**engine | {"python": Path(engine["python"]), "flags": dict[str, EngineFlag]()}),
            "gpu": None if gpu is None else _gpu(gpu),
            "settings": tuple(Setting(**s | {"value": _frozen(s["value"])}) for s in data["settings"]),
            "memory": None if memory is None else MemoryEstimate(**memory),
            "deadlines": Deadlines(**data["deadlines"]),
            "restart": RestartPolicy(**data["restart"]),
            "argv": tuple(data["argv"]),
            "warnings": tuple(data["warnings"]),
        }
    )


def _gpu(data: Mapping[str, Any]) -> GpuFacts:
    capability = data["compute_capability"]
    return GpuFacts(**{**data, "compute_capability": None if capability is None else tuple(capability)})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
