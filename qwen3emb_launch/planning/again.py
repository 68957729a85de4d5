"""The plan of a running instance once more, for another engine: the same decisions of people, the rules asked anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qwen3emb_launch.facts import EngineFacts, LaunchPlan
from qwen3emb_launch.planning.request import PlanRequest

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

PEOPLE = ("flag", "env")  # origins of what somebody said when the instance was started
ADDRESS = ("server.host", "server.port")  # said apart


def again(
    plan: LaunchPlan, profile: Profile, engine: EngineFacts, *, engine_port: int, ram_bytes: int | None
) -> PlanRequest:
    """What to plan so that `engine` serves the same: model, address, name, and each setting that people gave.

    `profile` is the plan's own, as it is now; what it says about releases is checked when this is planned.
    """
    return PlanRequest(
        profile=profile,
        model=plan.model,
        engine=engine,
        gpu=plan.gpu,
        overrides={
            s.key.removeprefix("--"): _text(s.value)
            for s in plan.settings
            if s.origin in PEOPLE and s.key not in ADDRESS
        },
        name=plan.name,
        host=plan.host,
        port=plan.port,
        engine_port=engine_port,
        served_name=plan.served_model_name,
        ram_bytes=ram_bytes,
        gateway_workers=int((plan.gateway or {}).get("workers", 1)),  # it goes on while the engine changes
    )


def _text(value: Any) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
