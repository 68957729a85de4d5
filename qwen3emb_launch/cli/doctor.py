"""`qwen3emb doctor`: is this machine fit to serve, and what mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.doctor.report import Report
    from qwen3emb_launch.facts import EngineFacts, ModelFacts
    from qwen3emb_launch.profile import Profile

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "dim"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb doctor   |   qwen3emb doctor --profile rtx4090 --json   |   "
        "qwen3emb doctor --command 'python -m sglang.launch_server --model-path Qwen/Qwen3-Embedding-4B'"
    )(doctor)


def doctor(
    profile: Annotated[
        str | None, typer.Option("--profile", "-p", help="What is to be served. Default: what fits the GPU.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Judge this SGLang command instead of the machine.")
    ] = None,
    sglang: Annotated[
        str | None, typer.Option(metavar="VERSION", help="With --command: the SGLang release. Default: the newest.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no hub.")] = False,
    json: JsonOption = False,
) -> None:
    """Check driver, GPU, engine, models, disk, ports, limits, network, clock and running servers.

    Each line is ok, warn, fail or unknown, with the command that mends it. Exit status 1 when any line says fail.
    """
    with shell("doctor", json) as console:
        from qwen3emb_launch.doctor.report import Report, Status
        from qwen3emb_launch.errors import CheckFailedError

        if command is not None:
            from qwen3emb_launch.doctor import serving

            report = Report(tuple(serving.of_command(command, sglang)))
        else:
            from qwen3emb_launch.doctor.examine import examine

            with console.progress("doctor") as progress:
                report = examine(_profile(profile), _expected, offline=offline, step=progress.step)
        failed = [check.name for check in report.checks if check.status is Status.FAIL]
        if not failed:
            console.result(report, lambda c: _show(c, report))
            return
        if not json:
            _show(console, report)
        error = CheckFailedError(
            "unfit",
            f"{len(failed)} of {len(report.checks)} checks fail: {', '.join(dict.fromkeys(failed))}",
            "each line names what mends it",
        )
        error.result = report
        raise error


def _profile(name: str | None) -> Profile | None:
    """The named profile, or the one for the GPU; None without either."""
    from qwen3emb_launch import gpu, planning, profile_files

    if name:
        return profile_files.load(name)
    cards = gpu.inventory()
    return planning.match_profile(cards, profile_files.profiles()).profile if cards else None


def _expected(profile: Profile) -> tuple[EngineFacts, ModelFacts | None]:
    """The engine and the model that `up` would take, here or fetched; None for a model whose shape is not known yet."""
    from qwen3emb_launch import hub
    from qwen3emb_launch.doctor import engine
    from qwen3emb_launch.explain import published, to_be_installed

    flavour = profile.engine.flavour
    here = engine.usable(flavour) or to_be_installed(flavour)
    return here, hub.local(profile.model) or published(profile.model)


def _show(console: Console, report: Report) -> None:
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        line = f"{check.status:<8} {check.name:<{width}}  {check.says}"
        console.out.print(line, style=STYLES[check.status], markup=False, highlight=False, soft_wrap=True)
        if check.mend:
            console.text(f"{'':<8} {'':<{width}}  -> {check.mend}")
