"""`qwen3emb bench`: load an endpoint, check every answer, say how fast it is; `bench show` and `bench compare`."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell
from qwen3emb_launch.errors import CheckFailedError, InterruptedByUser, InvalidInputError

if TYPE_CHECKING:
    from qwen3emb_launch.bench.modes import Campaign
    from qwen3emb_launch.bench.record import Record
    from qwen3emb_launch.bench.target import Target, Work
    from qwen3emb_launch.console import Console

EPILOG = (
    "Examples: qwen3emb bench --concurrency 64 --tokens 33 · qwen3emb bench --rate 50 --slo p95=100ms -o out.html · "
    "qwen3emb bench --sweep auto · qwen3emb bench --base-url http://a/v1 --vs http://b/v1"
)
ENDINGS = (".json", ".md", ".csv", ".html")


def register(app: typer.Typer) -> None:
    """Add the command and its sub-commands."""
    group = typer.Typer(help="Measure an endpoint: throughput, latency, errors, energy.", epilog=EPILOG)
    group.callback(invoke_without_command=True, epilog=EPILOG)(bench)
    group.command("show")(show)
    group.command("compare")(compare)
    app.add_typer(group, name="bench")


def seconds(text: str) -> float:
    """`90`, `90s`, `5m`, `72h` as seconds. Raises InvalidInputError (`bad_duration`)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", text.strip().lower())
    value = float(match[1]) * {"ms": 1e-3, "m": 60, "h": 3600, "d": 86400}.get(match[2] or "s", 1) if match else 0
    if value <= 0:
        raise InvalidInputError("bad_duration", f"no duration {text!r}", "for example 30s, 5m or 72h")
    return value


@dataclass(frozen=True)
class Sweep:
    """What `--sweep` asks: by clients or rate, and the levels (None: chosen while sweeping)."""

    shape: str
    levels: tuple[float, ...] | None


def parse_sweep(text: str, open_loop: bool) -> Sweep:
    """`auto`, `rate`, `1,4,16` or `rate:10,20,40`. Raises InvalidInputError (`bad_sweep`)."""
    kind, _, listed = text.strip().lower().rpartition(":")
    if listed in ("auto", "concurrency", "rate"):
        kind, listed = (kind or ("" if listed == "auto" else listed)), ""
    shape = {"": "open" if open_loop else "closed", "concurrency": "closed", "rate": "open"}.get(kind)
    try:
        levels = tuple(float(part) for part in listed.split(",")) if listed else None
    except ValueError:
        shape = None
        levels = None
    if shape is None or (levels and (min(levels) <= 0 or (shape == "closed" and any(v % 1 for v in levels)))):
        raise InvalidInputError(
            "bad_sweep",
            f"no sweep {text!r}",
            "for example --sweep auto, --sweep 1,4,16, --sweep rate, --sweep rate:10,20",
        )
    return Sweep(shape, levels)


def bench(
    context: typer.Context,
    base_url: Annotated[str | None, typer.Option(help="Endpoint as the OpenAI client takes it, ending in /v1.")] = None,
    name: Annotated[str | None, typer.Option(help="A running instance; without --base-url the only one.")] = None,
    profile: Annotated[str | None, typer.Option(help="Start this profile for the run, stop it after.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name to ask for; the only one served by default.")] = None,
    vs: Annotated[
        list[str] | None, typer.Option(help="Another URL, instance or profile, in turns. Repeatable.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", "-c", min=1, help="Closed loop: clients; 16.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Open loop: Poisson arrivals a second.")] = None,
    sweep: Annotated[str | None, typer.Option(help="auto, rate, 1,4,16 or rate:10,20: to the knee.")] = None,
    burst: Annotated[str | None, typer.Option(help="A burst of so many times the load, such as 3x.")] = None,
    soak: Annotated[str | None, typer.Option(help="Load for so long (72h), checkpointed beside --output.")] = None,
    window: Annotated[str, typer.Option(help="Soak: length of one window.")] = "60s",
    resume: Annotated[bool, typer.Option("--resume", help="Soak: go on from the checkpoint.")] = False,
    preset: Annotated[str | None, typer.Option(help="seed: the published table, claim by claim.")] = None,
    duration: Annotated[str, typer.Option("--duration", "-d", help="Measured time of each load.")] = "20s",
    warmup: Annotated[str, typer.Option(help="Left out, before each load; 0 for none.")] = "3s",
    requests: Annotated[int | None, typer.Option(min=1, help="End a load after so many requests.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Repeat; 1, or 5 with --vs, where 3 give an interval.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts a request.")] = 1,
    tokens: Annotated[str, typer.Option(help="Tokens a text: 33, 32-512, lognormal:120:0.8@16-2048.")] = "33",
    corpus: Annotated[Path | None, typer.Option(help="Your texts: .jsonl, .txt or .parquet.")] = None,
    column: Annotated[str | None, typer.Option(help="The corpus' field or column.")] = None,
    repeat_rate: Annotated[float, typer.Option(help="Share of texts sent before, to measure a cache.")] = 0.0,
    dims: Annotated[int | None, typer.Option(help="Dimensions to ask for.")] = None,
    encoding: Annotated[str, typer.Option("--format", help="base64 or float.")] = "base64",
    any_norm: Annotated[bool, typer.Option("--any-norm", help="Do not ask for norm 1.")] = False,
    slo: Annotated[str | None, typer.Option(help="p95=100ms or p50=20ms,p99=1s,errors=0.1%.")] = None,
    timeout: Annotated[str, typer.Option(help="A request without an answer for so long failed.")] = "60s",
    max_in_flight: Annotated[int, typer.Option(help="Open loop: connections at most.")] = 1000,
    processes: Annotated[int, typer.Option(help="Client processes.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Repeat texts and arrivals of an earlier bench.")] = None,
    gpu: Annotated[int | None, typer.Option(help="GPU to watch (NVML index).")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable with the key; OPENAI_API_KEY.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do not check TLS certificates.")] = False,
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Report: .json, .md, .csv or .html. Repeatable.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure an embedding endpoint. Every answer is checked while timing: count, dimensions, finite, norm 1."""
    if context.invoked_subcommand:
        return
    with shell("bench", json) as console, ExitStack() as stack:
        from secrets import randbelow

        from qwen3emb_launch.bench.modes import Campaign, Shaping
        from qwen3emb_launch.bench.target import Work, prepare
        from qwen3emb_launch.cli import bench_targets as named
        from qwen3emb_launch.cli.bench_view import Shown
        from qwen3emb_launch.statistics import FEWEST_PAIRS, parse_slo

        outputs = _outputs(output)
        if encoding not in ("base64", "float"):
            raise InvalidInputError("bad_load", f"--format {encoding}: base64 or float", "--format base64")
        if sum(map(bool, (sweep, burst, soak, preset))) > 1:
            raise InvalidInputError(
                "usage", "one of --sweep, --burst, --soak and --preset at a time", "qwen3emb bench -h"
            )
        modes_given = {"--sweep": sweep, "--burst": burst, "--soak": soak, "--preset": preset}
        _refuse_ignored(
            next((word for word, value in modes_given.items() if value), ""), rate, concurrency, requests, rounds
        )
        if resume and not soak:
            raise InvalidInputError("usage", "--resume goes on with a soak", "repeat its command, --soak and all")
        if sum(map(bool, (base_url, name, profile))) > 1:
            raise InvalidInputError("usage", "one of --base-url, --name and --profile", "qwen3emb bench -h")
        if soak and vs:
            raise InvalidInputError("usage", "a soak has one target", "leave --vs out")
        objective = parse_slo(slo) if slo else None
        swept = parse_sweep(sweep, rate is not None) if sweep else None
        work = Work(
            batch=batch,
            tokens=tokens,
            corpus=None,
            repeat_rate=repeat_rate,
            dims=dims,
            encoding="float" if encoding == "float" else "base64",
            unit_norm=not any_norm,
            timeout=seconds(timeout),
            max_in_flight=max_in_flight,
            processes=processes,
            seed=randbelow(1 << 30) if seed is None else seed,
        )
        work.check()
        if vs and rounds and rounds < FEWEST_PAIRS:
            console.warn(
                f"--rounds {rounds} gives ratios without an interval: a difference cannot be told from chance. "
                f"{FEWEST_PAIRS} rounds or more can"
            )
        notes: list[str] = []
        if corpus:
            work, notes = with_corpus(work, corpus, column, stack)
        shape = swept.shape if swept else ("open" if rate is not None else "closed")
        shaping = Shaping(
            shape="open" if shape == "open" else "closed",
            level=rate if rate is not None and not swept else concurrency or 16,
            seconds=seconds(duration),
            warmup=0.0 if warmup.strip().rstrip("smh") in ("0", "0.0") else seconds(warmup),
            requests=requests,
            rounds=rounds or (5 if vs else 1),
        )

        def started(word: str) -> Target:
            return stack.enter_context(named.profile(word, model, console))

        if base_url:
            first = named.endpoint(base_url, model, api_key_env, not insecure, gpu)
        elif profile:
            first = started(profile)
        else:
            first = named.instance(name, model)
        others = [
            named.versus(word, model if base_url else None, api_key_env, not insecure, gpu) or started(word)
            for word in vs or []
        ]
        targets = [prepare(named.introduced(t), work) for t in named.distinct([first, *others])]
        view = stack.enter_context(Shown(console))
        campaign = Campaign(targets=targets, work=work, shaping=shaping, slo=objective, listener=view, warnings=notes)
        campaign.text_start = work.seed << 20
        if preset:
            record = _preset(preset, campaign)
        elif soak:
            record = _soak(campaign, seconds(soak), seconds(window), resume, outputs)
        elif burst:
            record = _burst(campaign, burst)
        elif swept:
            from qwen3emb_launch.bench import modes

            record = modes.sweep(campaign, swept.levels)
        else:
            from qwen3emb_launch.bench import modes

            record = modes.steady(campaign)
        _finish(console, record, outputs)


def _refuse_ignored(
    mode: str, rate: float | None, concurrency: int | None, requests: int | None, rounds: int | None
) -> None:
    """Raise InvalidInputError for what this way to load would not heed. A sweep finds its rates by the clients."""
    if rate is not None and concurrency is not None and mode != "--sweep":
        raise InvalidInputError("usage", "--rate and --concurrency exclude each other", "give one of them")
    for word, value, unheeded in (
        ("--rounds", rounds, ("--sweep", "--burst", "--soak", "--preset")),
        ("--requests", requests, ("--burst", "--soak", "--preset")),
        ("--rate", rate, ("--preset",)),
        ("--concurrency", concurrency, ("--preset",)),
    ):
        if value is not None and mode in unheeded:
            raise InvalidInputError("usage", f"{mode} does not heed {word}", f"leave {word} out")


def _burst(campaign: Campaign, text: str) -> Record:
    from qwen3emb_launch.bench import modes

    match = re.fullmatch(r"(\d+(?:\.\d+)?)x?", text.strip().lower())
    if not match or float(match[1]) <= 1:
        raise InvalidInputError("bad_burst", f"no burst {text!r}", "for example --burst 3x")
    return modes.burst(campaign, float(match[1]))


def _soak(campaign: Campaign, total: float, window: float, resume: bool, outputs: list[Path]) -> Record:
    from qwen3emb_launch.bench.soak import Checkpoint, checkpoint_path, soak

    first = next((p for p in outputs if p.suffix == ".json"), outputs[0] if outputs else None)
    if first is None:
        campaign.warnings.append("without --output a soak keeps no checkpoint and cannot be resumed")
    identity = {
        "target": campaign.targets[0].spec.url,
        "model": campaign.targets[0].spec.model,
        "level": campaign.shaping.level,
        "shape": campaign.shaping.shape,
        "window": window,
        **{k: v for k, v in campaign.work.public().items() if k != "seed"},
    }
    return soak(campaign, total, window, Checkpoint(checkpoint_path(first), identity), resume)


def _preset(text: str, campaign: Campaign) -> Record:
    from qwen3emb_launch.bench.seed import seed_table

    if text != "seed":
        raise InvalidInputError("bad_preset", f"no preset {text!r}", "--preset seed")
    return seed_table(campaign)


def with_corpus(work: Work, path: Path, column: str | None, stack: ExitStack) -> tuple[Work, list[str]]:
    """The corpus rewritten for the load in a folder of its own, and what was left out of it."""
    from dataclasses import replace

    from qwen3emb_launch.bench.corpus import convert

    into = Path(stack.enter_context(TemporaryDirectory(prefix="qwen3emb-bench-"))) / path.name
    read = convert(path, into, column)
    return replace(work, corpus=str(into), corpus_name=str(path)), read.notes(path)


def _outputs(given: list[Path] | None) -> list[Path]:
    for path in given or []:
        if path.suffix.lower() not in ENDINGS:
            raise InvalidInputError("bad_output", f"{path}: a report ends in {', '.join(ENDINGS)}", "-o bench.html")
    return given or []


def _write(record: Record, outputs: list[Path], console: Console) -> None:
    from qwen3emb_launch.bench import html, report
    from qwen3emb_launch.bench.record import save, write_text

    for path in outputs:
        kind = path.suffix.lower()
        if kind == ".json":
            save(record, path)
        else:
            render = {".md": report.markdown, ".csv": report.csv_text, ".html": html.page}[kind]
            write_text(path, render(record))
        console.say(f"wrote {path}")


def _finish(console: Console, record: Record, outputs: list[Path]) -> None:
    """Reports, the table, and how it ended. A report that cannot be written does not lose the figures."""
    from qwen3emb_launch.bench.report import knee_lines, slo_lines
    from qwen3emb_launch.cli.bench_view import show
    from qwen3emb_launch.errors import LaunchError

    failure: LaunchError | None = None
    try:
        _write(record, outputs, console)
    except LaunchError as error:
        failure = error
    wrong = sum(sum(r.figures.failed.values()) for r in record.runs)
    missed = [r for r in record.runs if r.figures.slo_misses]
    if failure is None and record.partial:
        failure = InterruptedByUser(
            "interrupted; the figures so far are kept, marked partial", "qwen3emb bench show RECORD"
        )
    elif failure is None and not any(r.figures.requests for r in record.runs):
        kinds = sorted({k for r in record.runs for k in r.figures.failed})
        failure = (
            CheckFailedError(
                "no_right_answer", f"not one right answer in {wrong} requests: {', '.join(kinds)}", "qwen3emb verify"
            )
            if wrong
            else CheckFailedError(
                "too_short",
                f"no request began within the measured {record.load.get('seconds'):g} s: each takes longer than that",
                "a longer --duration, or fewer clients (-c)",
            )
        )
    elif failure is None and record.slo and missed and (record.knee is None or len(missed) == len(record.runs)):
        lines = [line for line in (*knee_lines(record), *slo_lines(record)) if "missed" in line or "nothing" in line]
        hint = (
            "less load, or a wider objective"
            if record.knee
            else "qwen3emb bench --sweep auto finds the load that meets it"
        )
        failure = CheckFailedError("slo_missed", "; ".join(lines), hint)
    if failure is None:
        console.result(record, lambda c: show(c, record))
        return
    failure.result = record
    if not console.json:
        show(console, record)
    raise failure


def show(
    file: Annotated[Path, typer.Argument(help="A record: bench --output FILE.json")],
    output: Annotated[
        list[Path] | None, typer.Option("--output", "-o", help="Render again as .md, .csv, .html.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show a kept record: qwen3emb bench show out.json -o out.html"""
    with shell("bench show", json) as console:
        from qwen3emb_launch.bench.record import load
        from qwen3emb_launch.cli import bench_view

        record = load(file)
        _write(record, _outputs(output), console)
        console.result(record, lambda c: bench_view.show(c, record))


def compare(
    files: Annotated[list[Path], typer.Argument(help="Two or more records; the first is the baseline.")],
    json: JsonOption = False,
) -> None:
    """Put records side by side: qwen3emb bench compare before.json after.json"""
    with shell("bench compare", json) as console:
        from qwen3emb_launch.bench import report
        from qwen3emb_launch.bench.compare import compared
        from qwen3emb_launch.bench.record import load

        if len(files) < 2:
            raise InvalidInputError("usage", "one record is nothing to compare", "qwen3emb bench compare A.json B.json")
        result = compared([(str(path), load(path)) for path in files])

        def human(c: Console) -> None:
            c.table(("load", "measure", *result.names, "ratio to the first"), report.compared_rows(result))
            for difference in result.differences:
                c.warn(difference)

        console.result(result, human)
