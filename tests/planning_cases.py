"""Requests for the planner's tests: shipped profiles, catalog models, recorded engine releases, cards by name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from qwen3emb_launch import planning, profile_files, recorded_flags
from qwen3emb_launch.catalog import ModelShape
from qwen3emb_launch.facts import GpuFacts, LaunchPlan, ModelFacts
from qwen3emb_launch.profile import Profile

GIB = 2**30
CUDA_RELEASES = ["0.5.14", "0.5.15.post1", "0.5.16", "0.5.23"]
SHIPPED = ["a10", "a100-40g", "a100-80g", "cpu", "demo", "h100", "h200", "l4", "l40s", "rtx3090", "rtx4090", "rtx5090"]


@cache
def load(name: str) -> Profile:
    return profile_files.load(name)


def shipped() -> list[Profile]:
    """Every shipped profile and every variant of it."""
    found = []
    for name in SHIPPED:
        profile = load(name)
        found += [profile, *(profile.variant(v) for v in profile.variants)]
    return found


def model(key: str = "4b") -> ModelFacts:
    if key == "demo":
        shape = ModelShape(256, 2, 4, 2, 64, 512, 264, 16384, True)
        return replace(
            planning.catalog_facts("0.6b", "/models/demo"),
            name="demo",
            shape=shape,
            weight_bytes=2_400_000,
            catalog_key=None,
        )
    return planning.catalog_facts(key, f"/models/Qwen3-Embedding-{key}")


def card(
    name: str, gib: float, capability: tuple[int, int] | None, free: float | None = None, index: int = 0
) -> GpuFacts:
    total = int(gib * GIB)
    return GpuFacts(index, name, f"GPU-{index}", total, int(free * GIB) if free is not None else total, capability)


def request(profile: str | Profile = "rtx4090", key: str = "4b", release: str | None = None, **more: object):
    """A request for the profile's own card and a recorded release; keyword arguments replace fields."""
    chosen = load(profile) if isinstance(profile, str) else profile
    flavour = chosen.engine.flavour
    engine = recorded_flags.engine(release or ("0.5.15.post1" if flavour == "cpu" else "0.5.23"), flavour)
    base = planning.PlanRequest(chosen, model(key), engine, planning.nominal_gpu(chosen))
    return replace(base, **more)


def plan(profile: str | Profile = "rtx4090", key: str = "4b", release: str | None = None, **more: object) -> LaunchPlan:
    return planning.plan(request(profile, key, release, **more))


def said(plan: LaunchPlan, flag: str) -> list[str] | None:
    """The values an option has in the command; [] for a switch, None when it is not there."""
    if flag not in plan.argv:
        return None
    values = []
    for word in plan.argv[plan.argv.index(flag) + 1 :]:
        if word.startswith("--"):
            break
        values.append(word)
    return values
