"""All checks, in the order in which a start needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from qwen3emb_launch import engines, hub, state
from qwen3emb_launch.catalog import find_model
from qwen3emb_launch.doctor import engine, gpu, machine, network, serving
from qwen3emb_launch.doctor.report import Check, Report, unknown
from qwen3emb_launch.engines import releases
from qwen3emb_launch.errors import LaunchError

if TYPE_CHECKING:
    from qwen3emb_launch.facts import Flavour
    from qwen3emb_launch.profile import Profile

PORT = 30000


def examine(profile: Profile | None, *, offline: bool = False, step: Callable[[str], None] = lambda _: None) -> Report:
    """Look at everything. `profile` is what is to be served, None: nothing in particular."""
    flavour = profile.engine.flavour if profile else engines.default_flavour()
    model = profile.model if profile else None
    number = profile.server.port if profile else PORT
    found: list[Check] = []
    bare = profile is not None and profile.gateway.enabled is False
    for name, look in _parts(flavour, model, number, bare=bare, offline=offline):
        step(name)
        try:
            found += look()
        except LaunchError as error:
            found.append(unknown(name, error.message, error.hint))
    return Report(tuple(found))


def _parts(
    flavour: Flavour, model: str | None, number: int, *, bare: bool, offline: bool
) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    def cards() -> list[Check]:
        used = engine.usable("cuda")
        return gpu.checks(used, engine.cuda_build(used))

    def surroundings() -> list[Check]:
        return machine.checks(
            number,
            [one for one in state.instances() if one.running],
            engine_needed=0 if engine.usable(flavour) else releases.DISK[flavour],
            model_needed=_still_to_download(model),
            bare=bare,
        )

    yield "gpu", cards
    yield "engine", lambda: engine.checks(flavour, model)
    yield "machine", surroundings
    yield "network", lambda: network.checks(offline=offline)
    yield "processes", serving.checks


def _still_to_download(model: str | None) -> int:
    """Bytes of an official model that is not here; 0 where it is, or where its size is not known."""
    known = find_model(model) if model else None
    return known.file_bytes if known and hub.local(known.key) is None else 0
