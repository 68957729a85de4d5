"""`qwen3emb down`: stop instances and wait until nothing of them is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.state import Instance
    from qwen3emb_launch.up.stopping import Stopped


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: qwen3emb down demo   |   qwen3emb down --all")(down)


def down(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The instance. Default: the only one that runs.",
            show_default=False,
            autocompletion=completion.instances,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every instance that runs.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to let running requests end before everything is killed.")
    ] = 60.0,
    json: JsonOption = False,
) -> None:
    """Stop an instance: running requests are answered first, then nothing of it is left.

    An instance that is not running is no error; a name that does not exist is.
    """
    with shell("down", json) as console:
        from qwen3emb_launch.up.stopping import stop

        done = []
        for instance in _chosen(name, everything):
            if instance.running:
                console.say(f"stopping {instance.name} …")
            done.append(stop(instance, timeout))
        console.result({"stopped": done}, lambda c: _show(c, done))


def _chosen(name: str | None, everything: bool) -> list[Instance]:
    from qwen3emb_launch import state
    from qwen3emb_launch.errors import InvalidInputError

    if everything and name is not None:
        raise InvalidInputError("usage", "a name and --all exclude each other", "qwen3emb down --help")
    if name is not None:
        return [state.find(name)]
    running = [i for i in state.instances() if i.running]
    if everything or not running:
        return running
    return [state.find()]


def _show(console: Console, done: list[Stopped]) -> None:
    if not done:
        console.text("nothing is running")
    for one in done:
        if not one.was_running:
            console.text(f"{one.name} was not running")
        else:
            how = "killed" if one.killed else "stopped"
            console.text(f"{one.name} {how} after {one.seconds:.1f} s")
