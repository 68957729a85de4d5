"""`qwen3emb engine`: the environments that SGLang lives in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.engines import CheckReport, EnvironmentStatus, Installed
    from qwen3emb_launch.facts import Flavour


class FlavourName(StrEnum):
    """What SGLang is built for."""

    CPU = "cpu"
    CUDA = "cuda"


FlavourArgument = Annotated[
    FlavourName | None,
    typer.Argument(
        help="cuda: NVIDIA GPUs; cpu: any x86-64 machine. Default: cuda if a GPU is found.", show_default=False
    ),
]
NameArgument = Annotated[
    str | None,
    typer.Argument(
        help="The environment. Default: the one a launch would take.",
        show_default=False,
        autocompletion=completion.engines,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        help="Install, list, check and remove the environments that SGLang lives in.", no_args_is_help=True
    )
    group.command(epilog="Example: qwen3emb engine install cpu")(install)
    group.command("list", epilog="Example: qwen3emb engine list --json")(list_)
    group.command(epilog="Example: qwen3emb engine check cpu --flags")(check)
    group.command(epilog="Example: qwen3emb engine remove cuda-0.5.20 --yes")(remove)
    app.add_typer(group, name="engine")


def install(
    flavour: FlavourArgument = None,
    version: Annotated[
        str | None, typer.Option("--version", help="Another SGLang release (cuda only).", show_default=False)
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option("--python", help="Adopt this Python's environment instead of building one.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What to call it. Default: its flavour.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build it anew though all is well.")] = False,
    json: JsonOption = False,
) -> None:
    """Build an engine environment with pip, or adopt one.

    Run it again after an interruption: it goes on. Run it on a complete one: it returns at once. Takes 7 GB (cpu) or
    12 GB (cuda). pip's own settings hold: PIP_INDEX_URL, PIP_CONSTRAINT, pip.conf.
    """
    with shell("engine install", json) as console:
        from qwen3emb_launch import engines

        with console.progress("engine") as progress:
            done = engines.install(
                _flavour(flavour), version=version, python=python, name=name, force=force, progress=progress
            )
        if json or done.did == "adopted":  # progress has shown them otherwise
            for note in done.notes:
                console.warn(note)
        console.result(done, lambda c: _show_installed(c, done))


def list_(json: JsonOption = False) -> None:
    """List the environments: flavour, version, size and whether they can be used."""
    with shell("engine list", json) as console:
        from qwen3emb_launch import engines

        found = engines.environments()
        console.result({"environments": found}, lambda c: _show_list(c, found))


def check(
    name: NameArgument = None,
    flags: Annotated[bool, typer.Option("--flags", help="Print every launch flag the engine takes.")] = False,
    json: JsonOption = False,
) -> None:
    """Look at every file of an environment, start its Python once, and report versions, device and flags."""
    with shell("engine check", json) as console:
        from qwen3emb_launch import engines
        from qwen3emb_launch.errors import UnfitError

        with console.progress("engine") as progress:
            report = engines.check(name, progress)
        if not report.ok:
            if not json:
                _show_check(console, report, flags)
            status = report.status
            error = UnfitError("engine_broken", f"environment {status.name!r} is broken: {status.reason}", report.hint)
            error.result = report
            raise error
        console.result(report, lambda c: _show_check(c, report, flags))


def remove(
    name: Annotated[
        str, typer.Argument(help="The environment.", show_default=False, autocompletion=completion.engines)
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove an environment; of an adopted one only its record here, none of its own files."""
    with shell("engine remove", json) as console:
        import sys

        from qwen3emb_launch import engines

        if not yes and not json and sys.stdin.isatty():
            there = engines.status(name)
            what = "forget the adopted" if there.adopted else "delete the"
            typer.confirm(f"{what} environment {name!r}?", abort=True, err=True)
        with console.progress("engine") as progress:
            gone = engines.remove(name, progress)
        console.result(gone, lambda c: c.text(f"{'forgotten' if gone.adopted else 'removed'}: {gone.name}"))


def _flavour(given: FlavourName | None) -> Flavour | None:
    return None if given is None else "cpu" if given is FlavourName.CPU else "cuda"


def _show_installed(console: Console, done: Installed) -> None:
    from qwen3emb_launch.console import size

    facts = done.facts
    took = f", {size(done.size_bytes)}" if done.size_bytes else ""
    what = {
        "installed": f"installed in {done.seconds:.0f} s{took}",
        "repaired": f"repaired in {done.seconds:.0f} s",
        "rebuilt": f"rebuilt in {done.seconds:.0f} s{took}",
        "plugin": "plugin brought up to date",
        "adopted": "adopted",
        "nothing": "already complete",
    }[done.did]
    console.text(f"engine {facts.name} ({facts.flavour}, sglang {facts.version}): {what}")
    console.text(f"  {facts.python}")


def _show_list(console: Console, found: list[EnvironmentStatus]) -> None:
    from qwen3emb_launch.console import size

    if not found:
        console.say("no engine environment yet: qwen3emb engine install")
        return
    console.table(
        ("NAME", "FLAVOUR", "SGLANG", "PYTHON", "PLUGIN", "SIZE", "STATE"),
        (
            (
                e.name,
                e.flavour,
                e.version,
                e.python_version,
                e.plugin,
                None if e.size_bytes is None else size(e.size_bytes),
                f"{e.state}{' (adopted)' if e.adopted else ''}{f': {e.reason}' if e.reason else ''}",
            )
            for e in found
        ),
    )


def _show_check(console: Console, report: CheckReport, flags: bool) -> None:
    status, device = report.status, report.device
    gpus = ", ".join(device.get("gpus") or ()) or "none visible"
    plugins = ", ".join(f"{n} {v or '?'}" for n, v in report.plugins.items()) or "none"
    console.fields(
        (
            ("name", f"{status.name}{' (adopted)' if status.adopted else ''}"),
            ("flavour", status.flavour),
            ("sglang", status.version),
            *report.packages.items(),
            ("python", f"{status.python_version} ({status.python})"),
            (
                "device",
                gpus if device.get("cuda_available") else f"cpu (torch built for CUDA {device.get('cuda_build')})",
            ),
            ("plugins", plugins),
            *((f"env {k}", v) for k, v in report.environment.items()),
            ("flags", len(report.flags)),
            ("state", "ok" if report.ok else "broken"),
            *(("damage", d) for d in report.damage[:10]),
        )
    )
    if flags:
        for flag in report.flags.values():
            value = "" if not flag.takes_value else f" {{{','.join(flag.choices)}}}" if flag.choices else " VALUE"
            console.text(f"  {flag.name}{value}")
