"""Profile, model, engine and GPU become a launch plan. Pure: no disk, no clock, no environment but what is handed in.

request   what a plan is made from            ledger    layers (default < rule < profile < env < flag), origins
match     GPU -> profile                      rules     what an embedding server needs, with reasons
planner   all of it -> LaunchPlan             sizing    memory asked for, and whether it fits
serialise LaunchPlan <-> plain data           known_bad combinations refused, with links
"""

from __future__ import annotations

from qwen3emb_launch.planning.again import again
from qwen3emb_launch.planning.match import Match, card_for, generic_profile, match_profile, nominal_gpu
from qwen3emb_launch.planning.planner import catalog_facts, plan
from qwen3emb_launch.planning.request import PlanRequest, read_overrides
from qwen3emb_launch.planning.serialise import plan_from_dict, plan_text, plan_to_dict

__all__ = [
    "Match",
    "PlanRequest",
    "again",
    "card_for",
    "catalog_facts",
    "generic_profile",
    "match_profile",
    "nominal_gpu",
    "plan",
    "plan_from_dict",
    "plan_text",
    "plan_to_dict",
    "read_overrides",
]
