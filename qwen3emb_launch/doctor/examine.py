"""All checks, in the order in which a start needs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen3emb_launch import engines, hub, state
from qwen3emb_launch import gpu as inventory
from qwen3emb_launch.catalog import find_model
from qwen3emb_launch.doctor import engine, gpu, launch, machine, network, serving
from qwen3emb_launch.doctor.report import Check, Report, Status, fail, unknown
from qwen3emb_launch.engines import releases
from qwen3emb_launch.errors import LaunchError

if TYPE_CHECKING:
    from qwen3emb_launch.facts import EngineFacts, ModelFacts
    from qwen3emb_launch.profile import Profile

PORT = 30000


def examine(
    profile: Profile | None,
    expect: Callable[[Profile], tuple[EngineFacts, ModelFacts | None]],
    *,
    offline: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Look at everything. `profile` is what is to be served, None: nothing in particular.

    `expect` gives the engine and the model that its start would have, here or still to be fetched; None for a model of
    which nothing is known yet.
    """
    found: list[Check] = []
    for name, look in _parts(profile, expect, offline=offline):
        step(name)
        try:
            found += look()
        except LaunchError as error:
            found.append(unknown(name, error.message, error.hint))
    return Report(tuple(found))


def _parts(
    profile: Profile | None, expect: Callable[[Profile], tuple[EngineFacts, ModelFacts | None]], *, offline: bool
) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    flavour = profile.engine.flavour if profile else engines.default_flavour()
    model = profile.model if profile else None

    def cards() -> list[Check]:
        used = engine.usable("cuda")
        seen = gpu.checks(used, engine.cuda_build(used))
        return [unused(check) for check in seen] if profile and flavour == "cpu" else seen

    def start() -> list[Check]:
        if profile is None:
            return []
        try:
            here, facts = expect(profile)
        except LaunchError as error:  # a model that cannot be served: `up` would say no more
            return [fail(launch.NAME, error.message, error.hint)]
        return launch.checks(profile, inventory.inventory(), here, facts, os.environ, machine.ram_bytes())

    def surroundings() -> list[Check]:
        return machine.checks(
            profile.server.port if profile else PORT,
            [one for one in state.instances() if one.running],
            engine_needed=0 if engine.usable(flavour) else releases.DISK[flavour],
            model_needed=_still_to_download(model),
            bare=profile is not None and profile.gateway.enabled is False,
        )

    yield "gpu", cards
    yield "engine", lambda: engine.checks(flavour, model)
    yield "launch", start
    yield "machine", surroundings
    yield "network", lambda: network.checks(offline=offline)
    yield "processes", serving.checks


def unused(check: Check) -> Check:
    """What is wrong with a GPU stops nothing that is served from the CPU."""
    if check.status is not Status.FAIL:
        return check
    return replace(check, status=Status.WARN, says=f"{check.says}; not needed for a profile of the CPU")


def _still_to_download(model: str | None) -> int:
    """Bytes of an official model that is not here; 0 where it is, or where its size is not known."""
    known = find_model(model) if model else None
    return known.file_bytes if known and hub.local(known.key) is None else 0
