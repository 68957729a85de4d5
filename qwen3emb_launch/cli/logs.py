"""`qwen3emb logs`: the engine's output, of the current start or the last one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console

LOOK_EVERY = 0.2


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: qwen3emb logs -f demo   |   qwen3emb logs demo -n 200 --events   |   "
        "qwen3emb logs demo --part gateway"
    )(logs)


def logs(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The instance. Default: the only one that runs, or the last that did.",
            show_default=False,
            autocompletion=completion.instances,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the instance ends or Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 100,
    events: Annotated[bool, typer.Option("--events", help="The instance's changes of state instead.")] = False,
    part: Annotated[
        str | None, typer.Option(help="Of which part: engine, engine-2, gateway, supervisor. Default: engine.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what the engine wrote, or another part of the instance.

    Following goes on across restarts. Keys are blanked in the file already.
    """
    with shell("logs", json) as console:
        from qwen3emb_launch import state
        from qwen3emb_launch.engine_process.log_tail import last_lines
        from qwen3emb_launch.errors import InvalidInputError

        if follow and json:
            raise InvalidInputError("usage", "--follow never ends, --json is one envelope", "leave one of them out")
        if events and part:
            raise InvalidInputError("usage", "--events are the whole instance's", "leave --part out")
        instance = state.find(name, or_last=True)
        path = _path(instance.name, events, part)
        if path is None:
            raise InvalidInputError(
                "no_log",
                f"{instance.name} has no log of {part or 'an engine'}",
                f"qwen3emb logs {instance.name} --part gateway" if part else "qwen3emb up",
            )
        if follow:
            _follow(instance.name, path, lines, events, part, console)
            return
        shown = last_lines(path, lines)
        console.result({"path": path, "lines": shown}, lambda c: _print(c, shown))


def _print(console: Console, lines: list[str]) -> None:
    for line in lines:
        console.raw(line)


def _path(name: str, events: bool, part: str | None) -> Path | None:
    """The newest file: the one the record names, or without a record the last by name."""
    from qwen3emb_launch import state

    instance = state.find(name)
    if events:
        return instance.events if instance.events.exists() else None
    if part == "supervisor":
        return instance.supervisor_log if instance.supervisor_log.exists() else None
    record = instance.record
    units = {unit.name: unit.log for unit in record.units} if record else {}
    named = units.get(part) if part else record.log if record else None
    if named and Path(named).exists():
        return Path(named)
    wanted = part or "engine"
    if not wanted.replace("-", "").isalnum():
        return None
    return max(instance.folder.glob(f"logs/{wanted}-{'[0-9]' * 8}*.log"), default=None)


def _follow(name: str, path: Path, lines: int, events: bool, part: str | None, console: Console) -> None:
    """The last lines, then every new one, until the instance has ended and all is shown."""
    from qwen3emb_launch import state
    from qwen3emb_launch.engine_process.log_tail import LogTail

    tail = LogTail(path)
    seen = tail.poll()
    _print(console, seen[max(0, len(seen) - lines) :])
    pause = threading.Event()
    while True:
        running = state.find(name).running  # asked before reading, so that the last lines are not missed
        _print(console, tail.poll())
        newest = _path(name, events, part)
        if newest and newest != tail.path:
            tail = LogTail(newest)
        elif not running:
            return
        pause.wait(LOOK_EVERY)
