"""`qwen3emb tune`: find the launch settings that serve a load best, prove it, and write them down as a profile."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli.launching import LaunchOptions, choose, make_plan
from qwen3emb_launch.cli.shell import JsonOption, shell
from qwen3emb_launch.errors import CheckFailedError, InterruptedByUser, InvalidInputError

if TYPE_CHECKING:
    from qwen3emb_launch.cli.tune_trials import Engines
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.tune.objective import Objective
    from qwen3emb_launch.tune.report import Outcome
    from qwen3emb_launch.tune.space import Space

EPILOG = (
    "Examples: qwen3emb tune --slo p95=100ms · qwen3emb tune --slo p95=100ms --budget 40m --batch 16 --tokens 513 "
    "--out bulk.yaml · qwen3emb tune --goal latency --resume · qwen3emb tune --dry-run"
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune", epilog=EPILOG)(tune)


def tune(
    slo: Annotated[str | None, typer.Option(help="p95=100ms or p50=20ms,p99=1s,errors=0.1%: the bound.")] = None,
    goal: Annotated[str, typer.Option(help="throughput, latency, memory or cost.")] = "throughput",
    budget: Annotated[str, typer.Option(help="Time for everything: 20m, 2h.")] = "20m",
    profile: Annotated[str | None, typer.Option("--profile", "-p", help="Where to start; this GPU's own.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model; the profile's.")] = None,
    engine: Annotated[str | None, typer.Option(help="An engine environment by name.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Fix a setting; repeatable.")
    ] = None,
    space: Annotated[Path | None, typer.Option(help="YAML of settings and values: try these, no others.")] = None,
    vectors_may_change: Annotated[
        bool, typer.Option("--allow-vector-changes", help="Try quantisation and number formats too.")
    ] = False,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=1, help="Clients; where the search begins. 16, latency 1.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.05, help="Requests a second instead: an open loop.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts a request.")] = 1,
    tokens: Annotated[str, typer.Option(help="Tokens a text: 33, 32-512, lognormal:120:0.8@16-2048.")] = "33",
    corpus: Annotated[Path | None, typer.Option(help="Your texts: .jsonl, .txt or .parquet.")] = None,
    column: Annotated[str | None, typer.Option(help="The corpus' field or column.")] = None,
    dims: Annotated[int | None, typer.Option(help="Dimensions to ask for.")] = None,
    duration: Annotated[str, typer.Option("--duration", "-d", help="Of a load in the final; earlier, less.")] = "12s",
    warmup: Annotated[str, typer.Option(help="Left out, before each load.")] = "1s",
    rounds: Annotated[int, typer.Option(min=0, help="Of the final, 3 or more; 0: no final.")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="Client processes.")] = 1,
    seed: Annotated[int, typer.Option(help="Of texts and arrivals.")] = 1,
    gpu_hour: Annotated[float | None, typer.Option(help="Goal cost: rent of the GPU for an hour.")] = None,
    hardware_price: Annotated[float | None, typer.Option(help="Goal cost: its price, over three years.")] = None,
    electricity: Annotated[float | None, typer.Option(help="Goal cost: price of a kWh; power is measured.")] = None,
    currency: Annotated[str, typer.Option(help="Of the prices.")] = "USD",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The profile to write; PROFILE-tuned among your own.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the journal of an earlier run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be tried, start nothing.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Install and download nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Try launch settings, each proven and measured, and write the best as a profile with its evidence.

    Baseline first, then one setting at a time, then winners together, then a final in turns. Exit 1 when nothing meets
    the objective.
    """
    with shell("tune", json) as console, ExitStack() as stack:
        from qwen3emb_launch import planning
        from qwen3emb_launch.bench.target import Work
        from qwen3emb_launch.cli.bench import seconds, with_corpus
        from qwen3emb_launch.cli.tune_run import Job
        from qwen3emb_launch.cli.tune_trials import Engines
        from qwen3emb_launch.statistics import FEWEST_PAIRS, parse_slo
        from qwen3emb_launch.tune.machine import Setup
        from qwen3emb_launch.tune.objective import Goal, Objective

        wanted = _goal(goal)
        objective = Objective(
            wanted,
            parse_slo(slo) if slo else None,
            _costs(wanted is Goal.COST, gpu_hour, hardware_price, electricity, currency),
            batch,
        )
        if rate is not None and concurrency is not None:
            raise InvalidInputError("usage", "--rate and --concurrency exclude each other", "give one of them")
        if 0 < rounds < FEWEST_PAIRS:
            raise InvalidInputError(
                "too_few_rounds",
                f"a final of {rounds} round{'s' * (rounds > 1)} cannot tell a gain from chance: nothing could win it",
                f"--rounds {FEWEST_PAIRS} or more, or --rounds 0 for trials without a final",
            )
        work = Work(batch=batch, tokens=tokens, dims=dims, processes=processes, seed=seed)
        work.check()
        allowed, measured, warm = seconds(budget), seconds(duration), _or_none(warmup)
        if corpus:
            work, notes = with_corpus(work, corpus, column, stack)
            for note in notes:
                console.warn(note)
        words = tuple(settings or ())
        options = LaunchOptions(model, profile, None, None, None, engine, words, offline or dry_run, dry_run)
        chosen = choose(options, console)
        target = _target(out, chosen.profile.name, resume) if not dry_run else Path("tuned.yaml")
        plan = make_plan(options, chosen, console)
        fixed = planning.read_overrides(list(options.settings))
        clients = float(concurrency or (1 if wanted is Goal.LATENCY else 16))
        tried = _space(space, plan, objective, clients, tuple(fixed), vectors_may_change)
        start = rate or clients
        load = {**work.public(), "open": rate is not None, "start": start, "seconds": measured, "warmup": warm}
        engines = Engines(
            options=options,
            chosen=chosen,
            plan_now=plan,
            fixed=fixed,
            work=work,
            objective=objective,
            open_loop=rate is not None,
            warmup=warm,
            vectors=_journal(target, out).with_suffix(".vectors.json"),
            ram_bytes=plan.memory.available_bytes if plan.memory and not chosen.gpu else None,
            changing=frozenset(f.key for f in tried.factors if f.changes_vectors or vectors_may_change),
            warn=console.warn,
            say=console.say,
            texts=seed << 20,
        )
        if dry_run:
            _dry_run(console, tried, engines)
            return
        setup = Setup(
            objective, tried.factors, start, rate is not None, measured, warm, allowed, rounds, not chosen.gpu
        )
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        job = Job(console, setup, engines, tried, load, _journal(target, out), target)
        _finish(console, job.run(resume), objective)


def _or_none(text: str) -> float:
    """A duration that may be 0."""
    from qwen3emb_launch.cli.bench import seconds

    return 0.0 if text.strip().rstrip("smh") in ("0", "0.0") else seconds(text)


def _goal(word: str) -> Any:
    from qwen3emb_launch.errors import nearest
    from qwen3emb_launch.tune.objective import Goal

    try:
        return Goal(word)
    except ValueError:
        known = [g.value for g in Goal]
        guess = nearest(word, known)
        raise InvalidInputError(
            "bad_goal",
            f"no goal {word!r}: {', '.join(known)}",
            f"did you mean {guess}?" if guess else "--goal throughput",
        ) from None


def _costs(
    needed: bool, gpu_hour: float | None, hardware_price: float | None, electricity: float | None, currency: str
) -> Any:
    """The prices, None where none was given and none is needed."""
    from qwen3emb_launch.cost import Costs
    from qwen3emb_launch.cost.money import check_currency

    if gpu_hour is None and hardware_price is None:
        if needed or electricity is not None:
            raise InvalidInputError(
                "no_costs",
                "what does the hardware cost?",
                "--gpu-hour 2.5, or --hardware-price 5800; --electricity 0.3",
            )
        return None
    costs = Costs(check_currency(currency), hardware_price, gpu_hour=gpu_hour, electricity=electricity)
    costs.check()
    return costs


def _target(out: Path | None, profile: str, resume: bool) -> Path:
    """Where the profile goes: as told, or among the user's own. Refused before anything is started."""
    from qwen3emb_launch.paths import paths
    from qwen3emb_launch.tune.winner import check_target

    path = (out or paths().profiles / f"{profile.replace(':', '-')}-tuned.yaml").absolute()
    check_target(path, resume=resume)
    return path


def _journal(target: Path, out: Path | None) -> Path:
    """Beside the profile that was named, else in the state folder."""
    from qwen3emb_launch.paths import paths

    name = f"{target.stem}.tune.jsonl"
    return target.with_name(name) if out else paths().state / "tune" / name


def _space(
    file: Path | None, plan: Any, objective: Objective, clients: float, given: tuple[str, ...], may_change: bool
) -> Space:
    from qwen3emb_launch.gateway.host import usable_cores
    from qwen3emb_launch.tune.space import View, derive, read_space

    if file:
        return read_space(file, given)
    view = View(plan, objective.texts_per_request, clients, usable_cores())
    return derive(view, objective.goal, given=given, vectors_may_change=may_change)


def _dry_run(console: Console, space: Space, engines: Engines) -> None:
    """The space, with what a run would not start: what the planner refuses, and commands that are known by then."""
    from qwen3emb_launch.cli.tune_view import show_space
    from qwen3emb_launch.errors import LaunchError
    from qwen3emb_launch.tune.space import in_order
    from qwen3emb_launch.tune.trials import Status, label, moves

    refused: dict[str, str] = {}
    same: dict[str, str] = {}
    known = {engines.plan(()): label(())}
    for factor, value in in_order(space.factors):
        name = label(move := moves({factor.key: value}))
        try:
            command = engines.plan(move)
        except LaunchError as error:
            refused[name] = error.message
            continue
        if command in known:
            same[name] = f"the same command as {known[command]}"
        known.setdefault(command, name)
    result = {"space": [vars(f) for f in space.factors], "left_out": space.left_out, "refused": refused, "same": same}
    aside = {name: f"{Status.REFUSED}: {why}" for name, why in refused.items()}
    aside |= {name: f"{Status.SAME}: {why}" for name, why in same.items()}
    console.result(result, lambda c: show_space(c, space, aside))


def _finish(console: Console, outcome: Outcome, objective: Objective) -> None:
    """The tables, and how it ended."""
    from qwen3emb_launch.cli.tune_view import show

    failure: CheckFailedError | InterruptedByUser | None = None
    if outcome.partial:
        failure = InterruptedByUser(
            f"interrupted; what was measured is in {outcome.journal}", "the same command with --resume goes on"
        )
    elif outcome.winner is None:
        near = outcome.nearest
        nearest = f"; nearest: {near['label']} at {near['level']:g}: {', '.join(near['misses'])}" if near else ""
        failure = CheckFailedError(
            "slo_missed",
            f"no setting meets {outcome.slo or 'the goal'}{nearest}",
            "a wider objective, shorter texts, or less load to begin with: --concurrency 1",
        )
    if failure is None:
        console.result(outcome, lambda c: show(c, outcome, objective))
        return
    failure.result = outcome
    if not console.json:
        show(console, outcome, objective)
    raise failure
