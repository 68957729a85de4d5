"""Whether `up` would start what is to be served on this machine: the planner's own word, before anything is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen3emb_launch import planning
from qwen3emb_launch.doctor.report import Check, fail, ok, unknown, warn
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.facts import EngineFacts, GpuFacts, ModelFacts
from qwen3emb_launch.planning.match import USABLE

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

NAME = "launch"
WITHOUT_GPU = "without one: qwen3emb up --profile cpu, or --profile demo; with one: what mends `gpu driver`"


def checks(
    profile: Profile,
    gpus: Sequence[GpuFacts],
    engine: EngineFacts,
    model: ModelFacts | None,
    environ: Mapping[str, str],
    ram_bytes: int | None = None,
) -> list[Check]:
    """What would be refused, and what would be warned of. `model` None: its shape is not known here.

    A card counts as if it were empty, and for the CPU the machine's memory, `ram_bytes`: who holds it has a line of its
    own, and may be this very profile.
    """
    try:
        card = planning.card_for(profile, gpus)
        if model is None:
            says = f"{profile.model} is not on this machine, so what it takes is not known"
            return [unknown(NAME, says, f"qwen3emb download {profile.model}")]
        whole = card and replace(card, free_bytes=max(card.free_bytes, int(card.total_bytes * USABLE)))
        room = None if card else ram_bytes
        plan = planning.plan(planning.PlanRequest(profile, model, engine, whole, environ=environ, ram_bytes=room))
    except LaunchError as error:
        return [fail(NAME, error.message, WITHOUT_GPU if error.code == "no_gpu" else error.hint)]
    if plan.warnings:
        return [warn(NAME, says, f"qwen3emb profiles explain {profile.name}") for says in plan.warnings]
    return [ok(NAME, f"profile {profile.name}, model {model.name}, on {card.name if card else 'the CPU'}")]
