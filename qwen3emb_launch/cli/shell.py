"""What every command file shares: the `--json` option and the seam where errors become words and exit statuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from qwen3emb_launch.console import Console
from qwen3emb_launch.errors import Exit, InterruptedByUser, LaunchError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON envelope on stdout.")]


@contextmanager
def shell(command: str, json: bool) -> Iterator[Console]:
    """Run a command's body: deliberate errors are shown and become the exit status, Ctrl-C becomes 130."""
    console = Console(command, json)
    try:
        yield console
    except LaunchError as error:
        console.failure(error, error.result)
        raise typer.Exit(error.exit) from None
    except KeyboardInterrupt:
        console.failure(InterruptedByUser())
        raise typer.Exit(Exit.INTERRUPTED) from None
