"""`qwen3emb restart`: every engine of an instance replaced by a fresh one, without losing a request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.up.control import How, Replaced


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: qwen3emb restart   |   qwen3emb restart h100 --in-place --json")(restart)


def restart(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The instance. Default: the only one that runs.",
            show_default=False,
            autocompletion=completion.instances,
        ),
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Only while the old engine serves on; refused where memory is short.")
    ] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Stop the old engine first; requests wait in the gateway.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Let it serve without the smoke test.")] = False,
    json: JsonOption = False,
) -> None:
    """Replace the engines of a running instance one after the other; requests go on meanwhile.

    Each new engine is started beside the old one where memory allows, tested, and given traffic before the old one is
    drained and stopped; where memory is short it takes the old one's place, and requests wait in the gateway. If a new
    engine fails, the old one serves on and the exit status is 4. An engine that was given up is replaced as well.
    Ctrl-C leaves the supervisor at work: it finishes what it began.
    """
    with shell("restart", json) as console:
        from qwen3emb_launch import state
        from qwen3emb_launch.cli.up_view import show_checks, show_last_lines
        from qwen3emb_launch.errors import InvalidInputError, LaunchError
        from qwen3emb_launch.up.control import replace

        if beside and in_place:
            raise InvalidInputError("usage", "--beside and --in-place exclude each other", "qwen3emb restart --help")
        how: How = "beside" if beside else "in_place" if in_place else "auto"
        instance, _ = state.running(name)
        try:
            done = replace(instance, how=how, verify=not no_verify, say=console.say)
        except LaunchError as error:
            show_last_lines(console, error)
            show_checks(console, error)
            raise
        console.result({"name": instance.name, "replaced": done}, lambda c: _show(c, done))


def _show(console: Console, done: tuple[Replaced, ...]) -> None:
    for one in done:
        how = "beside the old one" if one.how == "beside" else "in its place"
        console.text(f"{one.unit} replaced {how} in {one.seconds:.1f} s, pid {one.old_pid or '-'} -> {one.new_pid}")
