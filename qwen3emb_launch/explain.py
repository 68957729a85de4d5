"""What a profile would launch, without launching it: the machine may have neither the GPU nor the engine nor the model.

What is missing is assumed (the profile's own card, a recorded SGLang release, the catalog's shape) and said.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3emb_launch import planning, recorded_flags
from qwen3emb_launch.catalog import ModelShape, find_model
from qwen3emb_launch.demo_model import EOS_ID, VOCAB, DemoShape
from qwen3emb_launch.errors import InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.facts import EngineFacts, Flavour, GpuFacts, LaunchPlan, ModelFacts

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

# Codes of UnfitError that mean "not here, yet": the engine is assumed instead.
NO_ENGINE = ("engine_missing", "engine_incomplete", "engine_broken")


@dataclass(frozen=True)
class Explanation:
    """A plan with what was assumed to make it. `evidence` is `none` or the profile's measured figures."""

    plan: LaunchPlan
    assumptions: tuple[str, ...]
    evidence: Any

    def to_dict(self) -> dict[str, Any]:
        """The plan's data with the command as one line that a shell takes."""
        return {
            "assumptions": self.assumptions,
            "evidence": self.evidence,
            "command": shlex.join(self.plan.argv),
            "plan": planning.plan_to_dict(self.plan),
        }


@dataclass(frozen=True)
class Ask:
    """What to explain: as `up` takes it. `settings` are `--set` words."""

    model: str | None = None
    engine: str | None = None
    settings: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    gateway_workers: int = 1


def explain(profile: Profile, ask: Ask) -> Explanation:
    """Plan as `up` would, with what is here, and with assumptions for what is not.

    Raises what planning.plan raises, and InvalidInputError `unknown_model`.
    """
    notes: list[str] = []
    engine = _engine(profile, ask.engine, notes)
    gpu = _gpu(profile, notes)
    model = _model(ask.model or profile.model, notes)
    plan = planning.plan(
        planning.PlanRequest(
            profile=profile,
            model=model,
            engine=engine,
            gpu=gpu,
            overrides=planning.read_overrides(list(ask.settings)),
            environ=ask.environ,
            gateway_workers=ask.gateway_workers,
        )
    )
    return Explanation(plan, tuple(notes), profile.to_dict().get("evidence", "none"))


def problems_with(profile: Profile) -> list[LaunchError]:
    """What is wrong with a valid profile once it is planned: its own combination, and each variant's.

    Planned for the card it names, on a recorded release: a profile is checked for what it says, not for this machine.
    """
    found: list[LaunchError] = []
    for candidate in (profile, *(profile.variant(name) for name in profile.variants)):
        try:
            engine = recorded(candidate)
            model = published(candidate.model) or planning.catalog_facts("4b")
            planning.plan(planning.PlanRequest(candidate, model, engine, planning.nominal_gpu(candidate)))
        except LaunchError as error:
            error.message = f"{candidate.name}: {error.message}"
            found.append(error)
    return found


def to_be_installed(flavour: Flavour) -> EngineFacts:
    """What `engine install` would bring: the release it takes by default, with the plugin."""
    from qwen3emb_launch.engines import plugin_wheel, releases

    version = releases.build(flavour).version
    return replace(recorded_flags.engine(version, flavour), plugin=plugin_wheel.version())


def recorded(profile: Profile) -> EngineFacts:
    """The newest recorded release that the profile admits and that runs on its flavour."""
    flavour = profile.engine.flavour
    admitted = [v for v in recorded_flags.versions() if profile.engine.admits(v)]
    if flavour == "cpu":
        admitted = [v for v in admitted if v == recorded_flags.CPU]
    if not admitted:
        raise UnfitError(
            "engine_version",
            f"profile {profile.name} is for sglang {profile.engine.versions}; known are "
            f"{', '.join(recorded_flags.versions())}",
            f"qwen3emb engine install {flavour}",
        )
    return recorded_flags.engine(admitted[-1], flavour)


def _engine(profile: Profile, name: str | None, notes: list[str]) -> EngineFacts:
    from qwen3emb_launch import engines

    try:
        return engines.find(profile.engine.flavour, name)
    except UnfitError as error:
        if name is not None or error.code not in NO_ENGINE:
            raise
    assumed = to_be_installed(profile.engine.flavour)
    if not profile.engine.admits(assumed.version):
        assumed = recorded(profile)
    with_plugin = f" with plugin {assumed.plugin}" if assumed.plugin else ""
    notes.append(f"no {assumed.flavour} engine is installed: sglang {assumed.version}{with_plugin} is assumed")
    return assumed


def _gpu(profile: Profile, notes: list[str]) -> GpuFacts | None:
    from qwen3emb_launch import gpu

    if profile.gpu is None:
        return None
    cards = gpu.inventory()
    meant = [c for c in cards if profile.gpu.matches(c.name, c.total_bytes / 2**30)]
    if meant:
        return max(meant, key=lambda c: c.free_bytes)
    card = planning.nominal_gpu(profile)
    notes.append(f"no such GPU is here: an empty {profile.gpu.vram_gib:g} GiB card of the profile's kind is assumed")
    return card


def _model(name: str, notes: list[str]) -> ModelFacts:
    from qwen3emb_launch import hub

    found = hub.local(name)
    if found is not None:
        return found
    assumed = published(name)
    if assumed is None:
        raise InvalidInputError(
            "unknown_model", f"{name} is not on this machine, so its shape is unknown", f"qwen3emb download {name}"
        )
    notes.append(f"the model {assumed.name} is not on this machine: its published shape is assumed")
    return assumed


def published(name: str) -> ModelFacts | None:
    """A model whose shape is known without its files, or None."""
    known = find_model(name)
    if known:
        return planning.catalog_facts(known.key)
    if name == "demo":
        demo = DemoShape()
        shape = ModelShape(
            demo.hidden_size, demo.layers, demo.heads, demo.kv_heads, demo.head_dim, demo.mlp_size, VOCAB,
            demo.max_positions, True,
        )  # fmt: skip
        return ModelFacts("demo", Path("demo"), "demo", None, shape, 2 * shape.parameters, EOS_ID)
    return None
