"""`qwen3emb up`: from nothing to a served, smoke-tested endpoint."""

from __future__ import annotations

import os
import shlex
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.launching import LaunchOptions, check_front, choose, make_plan
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.facts import LaunchPlan
    from qwen3emb_launch.state import Claim

EXAMPLES = "Examples: qwen3emb up --profile demo   |   qwen3emb up --profile rtx4090 --port 8000 --detach"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EXAMPLES)(up)


def up(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="0.6b, 4b, 8b, demo, a hub id or a folder. Default: the profile's.",
            autocompletion=completion.models,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            "-p",
            help="A profile's name or file. Default: the one for this GPU.",
            autocompletion=completion.profiles,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The instance's name. Default: the profile's.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: this machine only.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: 30000.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it serves; it goes on behind.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print command and environment, start nothing.")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="Engines behind the gateway. Default: 1.")] = None,
    no_gateway: Annotated[
        bool, typer.Option("--no-gateway", help="The bare engine: no cache, no keys, no requests held over restarts.")
    ] = False,
    api_keys: Annotated[
        str | None, typer.Option(help="File of those who may call: [NAME] KEY \\[rpm=N] \\[tpm=N] \\[admin] a line.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve other machines without API keys.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Call it ready without the smoke test.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="An engine environment by name: `qwen3emb engine list`.", autocompletion=completion.engines),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Install and download nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Serve an embedding model: fetch what is missing, start engine and gateway, prove them, keep them alive.

    Serves until Ctrl-C (a second one does not wait for running requests), or behind the shell with --detach. With
    --json one envelope is printed as soon as it serves.
    """
    short = {
        "replicas": replicas,
        "gateway.enabled": "false" if no_gateway else None,
        "gateway.api_keys": api_keys,
        "gateway.insecure": "true" if insecure else None,
    }
    words = (*(settings or ()), *(f"{key}={value}" for key, value in short.items() if value is not None))
    options = LaunchOptions(model, profile, name, host, port, engine, words, offline or dry_run, dry_run)
    with shell("up", json) as console:
        if dry_run:
            plan = make_plan(options, choose(options, console), console)
            console.result(_dry(plan), lambda c: _show_dry(c, plan))
            return
        claim = _claim_and_plan(options, console)
        _warn_of_proxies(console)
        flags = ["--json"] * json + ["--no-verify"] * no_verify
        if detach:
            _detach(claim, flags, console)
        else:
            from qwen3emb_launch.up.detached import become

            # Ctrl-C waits until the supervisor can take it: not a traceback from the middle of its imports.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            become(claim, flags)


def _claim_and_plan(options: LaunchOptions, console: Console) -> Claim:
    """Everything that can be refused is refused here; the plan lies in the instance's folder afterwards."""
    from qwen3emb_launch import state
    from qwen3emb_launch.planning import plan_text

    chosen = choose(options, console)
    claim = state.claim(chosen.name)
    check_front(options, chosen)  # before the long part
    plan = make_plan(options, chosen, console)
    state.write_private(claim.plan, plan_text(plan))
    return claim


def _warn_of_proxies(console: Console) -> None:
    """What is pasted from the snippet, in the shell that has these variables, would not reach the endpoint."""
    if not {"HTTP_PROXY", "ALL_PROXY"} & {name.upper() for name, value in os.environ.items() if value}:
        return
    from qwen3emb_launch.doctor.network import proxy

    check = proxy(os.environ)
    if check.mend:
        console.warn(f"{check.says}: {check.mend}")


def _detach(claim: Claim, flags: list[str], console: Console) -> None:
    from qwen3emb_launch.cli.up_view import show_checks, show_last_lines, show_serving
    from qwen3emb_launch.errors import LaunchError
    from qwen3emb_launch.up.detached import detach
    from qwen3emb_launch.up.serving import serving

    behind = detach(claim, ["--behind", *(flag for flag in flags if flag != "--json")])
    try:
        record = behind.wait_ready(lambda line: console.say(line))
    except KeyboardInterrupt:
        behind.stop()
        raise
    except LaunchError as error:
        show_last_lines(console, error)
        show_checks(console, error)
        raise
    answer = serving(record)
    console.result(answer, lambda c: show_serving(c, answer))
    console.say(f"It goes on behind: qwen3emb logs -f {answer.name}, qwen3emb down {answer.name}")


def _dry(plan: LaunchPlan) -> dict[str, object]:
    from qwen3emb_launch.planning import plan_to_dict

    return {**plan_to_dict(plan), "command": shlex.join(plan.argv)}


def _show_dry(console: Console, plan: LaunchPlan) -> None:
    lines = [f"{key}={shlex.quote(value)}" for key, value in sorted(plan.env.items())]
    console.text(" \\\n  ".join([*lines, shlex.join(plan.argv)]))
    if plan.gateway:
        engines = f"{plan.replicas} such engines, each on a port" if plan.replicas > 1 else "this engine, on a port"
        console.say(f"Before {engines} of its own, the gateway listens on {plan.host}:{plan.port}.")
    console.say("Nothing was started. A start adds --config FILE: a private file with the engine's fresh admin key.")
