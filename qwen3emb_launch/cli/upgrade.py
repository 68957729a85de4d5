"""`qwen3emb upgrade`: another engine environment under a running instance, proven, without a lost request."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.facts import EngineFacts, LaunchPlan
    from qwen3emb_launch.state import Instance
    from qwen3emb_launch.up.control import How, Replaced


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb upgrade   |   qwen3emb upgrade h100 --version 0.5.23   |   "
        "qwen3emb upgrade demo --python /opt/sglang/bin/python --json"
    )(upgrade)


class Depth(StrEnum):
    """Levels of `qwen3emb verify`."""

    QUICK = "quick"
    FULL = "full"


@dataclass(frozen=True)
class Side:
    """An engine environment, as the answer names it."""

    engine: str
    version: str
    python: Path


@dataclass(frozen=True)
class Upgraded:
    """What an upgrade did. `vectors` is same or close, as `qwen3emb diff` says; `cosine` the lowest of any text."""

    name: str
    old: Side
    new: Side
    replaced: tuple[Replaced, ...]
    vectors: str
    cosine: float | None
    removed_old: bool


def upgrade(
    name: Annotated[
        str | None, typer.Argument(help="The instance. Default: the only one that runs.", show_default=False)
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="SGLang release to install. Default: the tested one.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option("--python", help="Adopt this Python's environment instead.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="An environment that is there: `qwen3emb engine list`.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="The profile's file, if the instance was given one.")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Stop the old engine first; requests wait in the gateway.")
    ] = False,
    level: Annotated[Depth, typer.Option("--level", help="How the new engine is verified.")] = Depth.FULL,
    accept_close: Annotated[
        bool, typer.Option("--accept-close", help="Allow vectors that are close to the old ones, not the same.")
    ] = False,
    remove_old: Annotated[bool, typer.Option("--remove-old", help="Remove the old environment at the end.")] = False,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep a new environment that failed, to look at it.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Move a running instance to another engine environment, without losing a request.

    The new environment is made beside the old one; a new engine is started on it, verified, and compared with the old
    one text by text. Only then requests go there, and the old engine is drained and stopped. Whatever fails, the old
    one serves on and the new environment is removed. The old environment stays until `qwen3emb engine remove`.
    """
    with shell("upgrade", json) as console:
        from qwen3emb_launch import state
        from qwen3emb_launch.cli.up_view import show_checks, show_last_lines
        from qwen3emb_launch.cli.upgrade_check import Comparison
        from qwen3emb_launch.errors import InvalidInputError, LaunchError
        from qwen3emb_launch.up.control import replace

        if sum(given is not None for given in (version, python, engine)) > 1:
            raise InvalidInputError(
                "usage", "--version, --python and --engine exclude each other", "qwen3emb upgrade --help"
            )
        instance, record = state.running(name)
        old = read_plan(instance)
        wanted = profile or old.profile
        new_engine, brought = new_environment(old, version, python, engine, console)
        try:
            plan = plan_on(old, wanted, new_engine, console)
            compare = Comparison(instance, record, (old, plan), level.value, accept_close, console.say)
            how: How = "in_place" if in_place else "auto"
            replaced = replace(instance, plan=plan, how=how, confirm=compare, say=console.say)
        except (LaunchError, KeyboardInterrupt) as error:
            forget(new_engine.name, brought and not keep_failed, old.engine.name, console)
            if isinstance(error, LaunchError):
                show_last_lines(console, error)
                show_checks(console, error)
            raise
        answer = Upgraded(
            name=instance.name,
            old=_side(old.engine),
            new=_side(new_engine),
            replaced=replaced,
            vectors=compare.verdict,
            cosine=compare.cosine,
            removed_old=remove_old and removed(old.engine.name, console),
        )
        console.result(answer, lambda c: _show(c, answer))
        say_next(old, new_engine, console)


def read_plan(instance: Instance) -> LaunchPlan:
    """The plan that an instance runs. Raises InvalidInputError `bad_plan`."""
    import json

    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.planning import plan_from_dict

    try:
        return plan_from_dict(json.loads(instance.plan.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            "bad_plan", f"{instance.plan} cannot be read: {error}", f"qwen3emb down {instance.name}, then qwen3emb up"
        ) from error


def new_environment(
    old: LaunchPlan, version: str | None, python: Path | None, engine: str | None, console: Console
) -> tuple[EngineFacts, bool]:
    """The environment to move to, and whether it was made now: then a failure takes it away again.

    Raises InvalidInputError `same_engine` when the instance runs on it already, and as `engines.install`.
    """
    from qwen3emb_launch import engines
    from qwen3emb_launch.errors import InvalidInputError

    flavour = old.engine.flavour
    there = {e.name for e in engines.environments()}
    if engine is not None:
        found, brought = engines.find(flavour, engine), False
    else:
        with console.progress("engine") as progress:
            name = _free_name(f"{flavour}-adopted", there) if python else _versioned(flavour, version, old, there)
            done = engines.install(flavour, version=version, python=python, name=name, progress=progress)
        found, brought = done.facts, name not in there
    if found.python == old.engine.python:
        if brought:
            engines.remove(found.name)
        raise InvalidInputError(
            "same_engine",
            f"{old.name} runs on {old.engine.name} (sglang {found.version}) already",
            f"another release: qwen3emb upgrade {old.name} --version X.Y.Z; fresh engines: qwen3emb restart {old.name}",
        )
    return found, brought


def _versioned(flavour: str, version: str | None, old: LaunchPlan, there: set[str]) -> str:
    """A name for the release: never the running environment's own, whose folder would be rebuilt under its feet."""
    from qwen3emb_launch.engines.releases import build

    wanted = build("cuda" if flavour == "cuda" else "cpu", version).version
    name = f"{flavour}-{wanted}"
    if wanted == old.engine.version and not old.engine.adopted:
        return old.engine.name  # that very release: told as `same_engine`, unless what it is made of has changed
    return name if name != old.engine.name else _free_name(name, there)


def _free_name(name: str, there: set[str]) -> str:
    number = 1
    while (free := name if number == 1 else f"{name}-{number}") in there:
        number += 1
    return free


def plan_on(old: LaunchPlan, profile: str, engine: EngineFacts, console: Console) -> LaunchPlan:
    """The instance's plan on another engine. Raises what planning raises: an option it lacks, a release it refuses."""
    from qwen3emb_launch import planning, profile_files
    from qwen3emb_launch.cli.launching import with_gateway
    from qwen3emb_launch.engine_process.ports import private_port

    request = planning.again(
        old, profile_files.load(profile), engine, engine_port=private_port("127.0.0.1"), ram_bytes=None
    )
    plan = planning.plan(request)
    for warning in plan.warnings:
        console.warn(warning)
    return with_gateway(plan)


def forget(name: str, brought: bool, old: str, console: Console) -> None:
    """Take a failed environment away, so that the next start does not choose it; else say that it might."""
    if not brought:
        if name != old:
            console.warn(f"the next `up` may choose environment {name}: qwen3emb up --engine {old}, or remove it")
        return
    removed(name, console)


def say_next(old: LaunchPlan, new: EngineFacts, console: Console) -> None:
    """A later `up` takes the newest release that is installed: say so where that is not the one that serves now."""
    from qwen3emb_launch import engines

    choice = engines.find(old.engine.flavour).name
    if choice != new.name:
        console.warn(
            f"the next `up` would choose environment {choice}: remove it (qwen3emb engine remove {choice}), "
            f"or start with --engine {new.name}"
        )


def removed(name: str, console: Console) -> bool:
    """Whether an environment could be removed. That it could not ends nothing."""
    from qwen3emb_launch import engines
    from qwen3emb_launch.errors import LaunchError

    try:
        engines.remove(name)
    except LaunchError as error:
        console.warn(f"environment {name} was not removed: {error.message}")
        return False
    console.say(f"environment {name} removed")
    return True


def _side(engine: EngineFacts) -> Side:
    return Side(engine.name, engine.version, engine.python)


def _show(console: Console, done: Upgraded) -> None:
    for one in done.replaced:
        console.text(
            f"{one.unit}: {one.how.replace('_', ' ')}, {one.seconds:.1f} s, pid {one.old_pid} -> {one.new_pid}"
        )
    console.text(
        f"{done.name} runs on {done.new.engine} (sglang {done.new.version}), before {done.old.engine} "
        f"({done.old.version}); vectors {done.vectors}"
    )
    if not done.removed_old:
        console.say(f"the old environment stays until: qwen3emb engine remove {done.old.engine}")
