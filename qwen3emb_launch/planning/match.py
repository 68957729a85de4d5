"""Which profile is for the GPU that was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.facts import GpuFacts

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

USABLE = 0.985  # of a card's nominal memory, after what the driver keeps


@dataclass(frozen=True)
class Match:
    """The profile for this machine, and the GPU that decided it. `warning` says when no profile knew the GPU."""

    profile: Profile
    gpu: GpuFacts
    warning: str | None = None


def match_profile(gpus: Sequence[GpuFacts], profiles: Sequence[Profile]) -> Match:
    """The profile whose `gpu` names the first card with the most free memory; a generic one for unknown cards.

    Raises UnfitError `no_gpu` when there is no GPU at all.
    """
    if not gpus:
        raise UnfitError(
            "no_gpu",
            "no NVIDIA GPU was found, so no profile could be chosen",
            "without one: qwen3emb up --profile demo, or qwen3emb up --profile cpu",
        )
    gpu = max(gpus, key=lambda g: (g.free_bytes, -g.index))
    size = gpu.total_bytes / 2**30
    fitting = [p for p in profiles if p.gpu is not None and p.gpu.matches(gpu.name, size)]
    if fitting:
        # Two may match by name (A100 40 GB and 80 GB): the larger memory wins, since a smaller card never matches it.
        # Of equals the first wins: profile_files lists the user's own first.
        return Match(max(fitting, key=lambda p: p.gpu.min_vram_gib if p.gpu else 0.0), gpu)
    capability = "unknown" if gpu.compute_capability is None else ".".join(map(str, gpu.compute_capability))
    return Match(
        generic_profile(gpu),
        gpu,
        f"no profile knows {gpu.name} ({size:.0f} GiB, compute capability {capability}): a generic one is used, "
        "decided by its memory and compute capability alone. `qwen3emb profiles new` makes one of your own",
    )


def generic_profile(gpu: GpuFacts) -> Profile:
    """A profile that decides nothing: the rules go by the card's memory and compute capability."""
    from qwen3emb_launch.profile import EngineChoice, GpuMatch, Profile

    major, minor = gpu.compute_capability or (8, 0)
    size = gpu.total_bytes / 2**30
    escaped = gpu.name.replace("[", "?").replace("]", "?")
    model = next(key for key, least in (("4b", 16.0), ("0.6b", 0.0)) if size >= least)
    return Profile(
        schema=1,
        name="generic",
        description=f"Any other GPU: {gpu.name}",
        model=model,
        gpu=GpuMatch(
            names=(escaped,), vram_gib=round(size, 1), min_vram_gib=0.9 * size, compute_capability=f"{major}.{minor}"
        ),
        engine=EngineChoice(flavour="cuda", versions=">=0.5.14"),
    )


def card_for(profile: Profile, gpus: Sequence[GpuFacts]) -> GpuFacts | None:
    """The GPU to use: of those the profile is for, else of all, the one with the most free memory. None: it needs none.

    Raises UnfitError `no_gpu` where it needs one and there is none.
    """
    if profile.engine.flavour == "cpu":
        return None
    if not gpus:
        raise UnfitError(
            "no_gpu",
            f"profile {profile.name} needs an NVIDIA GPU, and none was found",
            "without one: qwen3emb up --profile demo, or --profile cpu; else: qwen3emb doctor",
        )
    meant = [g for g in gpus if profile.gpu and profile.gpu.matches(g.name, g.total_bytes / 2**30)]
    return max(meant or gpus, key=lambda g: g.free_bytes)


def nominal_gpu(profile: Profile) -> GpuFacts | None:
    """The card a profile is written for, empty: to explain it on a machine without one. None for CPU profiles."""
    if profile.gpu is None:
        return None
    usable = int(profile.gpu.vram_gib * 2**30 * USABLE)
    name = profile.gpu.names[0].replace("*", "").replace("?", " ").strip()
    return GpuFacts(0, name, "", usable, usable, profile.gpu.capability)
