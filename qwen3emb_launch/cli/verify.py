"""`qwen3emb verify`: are this endpoint's vectors right?"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.errors import CheckFailedError
    from qwen3emb_launch.verify.report import Report
    from qwen3emb_launch.verify.runner import Request


class LevelName(StrEnum):
    """How much is asked."""

    QUICK = "quick"
    FULL = "full"


BaseUrlOption = Annotated[
    str | None, typer.Option("--base-url", help="The endpoint as the OpenAI client takes it, ending in /v1.")
]
KeyOption = Annotated[
    str | None, typer.Option("--api-key", help="Seen in the process list: prefer --api-key-file or OPENAI_API_KEY.")
]
KeyFileOption = Annotated[Path | None, typer.Option("--api-key-file", help="A file that holds the key.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb verify · qwen3emb verify --level full --report proof.md · "
        "qwen3emb verify --base-url http://10.0.0.5:30000/v1 --api-key-file key --checkpoint ./my-finetune"
    )(verify)


def verify(
    name: Annotated[
        str | None, typer.Argument(help="A running instance (default: the only one).", show_default=False)
    ] = None,
    base_url: BaseUrlOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Model id to send (default: the first listed).")] = None,
    api_key: KeyOption = None,
    api_key_file: KeyFileOption = None,
    level: Annotated[
        LevelName, typer.Option("--level", help="quick: seconds; full: adds transformers, load, limits.")
    ] = (LevelName.QUICK),
    max_latency: Annotated[
        float | None,
        typer.Option("--max-latency", min=0.1, help="Limit for one short text, ms (default 100; on a CPU a warning)."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Hold the endpoint to a set saved by --save-reference.")
    ] = None,
    save_reference: Annotated[
        Path | None, typer.Option("--save-reference", help="Save this endpoint's vectors, if it passes.")
    ] = None,
    report: Annotated[
        list[Path] | None, typer.Option("--report", help="Write the report: FILE.json or FILE.md. Repeatable.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="The model's folder, for transformers (default: as served).")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Engine environment that runs transformers (default: the instance's)."),
    ] = None,
    engine_python: Annotated[
        Path | None, typer.Option("--engine-python", help="A python with torch and transformers, instead of --engine.")
    ] = None,
    reference_device: Annotated[
        str, typer.Option("--reference-device", help="Where transformers computes: cpu, cuda, cuda:1.")
    ] = "cpu",
    no_transformers: Annotated[
        bool, typer.Option("--no-transformers", help="Leave the comparison with transformers out of `full`.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this check, by its id. Repeatable.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="The endpoint's arithmetic: bfloat16, float16, float32 (default: as told)."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=16, help="Context length in tokens (default: as the server says).")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one request.")] = 60.0,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Require what bare engines lack: base64, error form, unknown models refused."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Prove an endpoint's vectors right: an instance of qwen3emb, or any OpenAI-compatible one.

    A table of checks with what was expected and seen; a failing check names its likely cause. Exit 0 only if all
    required checks hold, 1 otherwise, 5 when the endpoint cannot be reached.
    """
    with shell("verify", json) as console:
        from dataclasses import replace

        from qwen3emb_launch.verify import reference as sets
        from qwen3emb_launch.verify.runner import verify as run
        from qwen3emb_launch.verify.session import Options

        targets = check_report_paths(report or [])
        if save_reference:
            check_folder(save_reference)
        options = Options(level.value, max_latency, context, strict)
        request = replace(
            target(console, name, base_url, options, api_key=read_key(console, api_key, api_key_file), timeout=timeout),
            model=model,
            dtype=check_dtype(dtype),
            device=reference_device,
            reference=sets.load(reference) if reference else None,
            keep_vectors=save_reference is not None,
            only=frozenset(only or ()),
        )
        if checkpoint:
            request = replace(request, folder=check_checkpoint(checkpoint))
        python = None if no_transformers else find_python(request.python, engine, engine_python)
        request = replace(request, python=python)
        with console.progress("verify") as progress:
            result, kept = run(request, progress.step)
        error = None if result.passed else refusal(result)
        write_reports(targets, result, error)
        if save_reference and kept:
            sets.save(kept, save_reference)
            console.say(f"saved {len(kept.vectors)} vectors to {save_reference}")
        elif save_reference:
            console.warn(f"{save_reference} was not written: an endpoint that fails is no reference")
        if error:
            if not console.json:
                show(console, result)
            raise error
        console.result(result, lambda out: show(out, result))


def refusal(result: Report) -> CheckFailedError:
    """The error of an endpoint that failed, with the report in it."""
    from qwen3emb_launch.errors import CheckFailedError

    failed = [f"{c.title}: {c.cause or c.seen}" for c in result.failures]
    error = CheckFailedError(
        "verification_failed",
        f"{len(failed)} required check{'s' * (len(failed) != 1)} failed: " + "; ".join(failed),
        "the table above says what was expected and seen; do not index with these vectors",
    )
    error.result = result
    return error


def target(
    console: Console,
    name: str | None,
    base_url: str | None,
    options: Any,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
) -> Request:
    """The request for an instance by name or an endpoint by URL. Exactly one of them may be given."""
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.paths import paths
    from qwen3emb_launch.verify.runner import Request

    memory = paths().cache / "weights.json"
    if base_url:
        if name:
            raise InvalidInputError("usage", f"instance {name!r} and --base-url exclude each other", "give one of them")
        if not base_url.rstrip("/").endswith("/v1"):
            console.warn(f"{base_url} does not end in /v1, as the OpenAI client takes it; trying both")
        return Request(base_url, options, memory, api_key=api_key, timeout=timeout)
    from qwen3emb_launch import state

    instance, record = state.running(name)
    known, python = read_plan(instance.plan)
    return Request(record.base_url, options, memory, api_key=api_key, timeout=timeout, known=known, python=python)


def read_plan(path: Path) -> tuple[dict[str, Any], Path | None]:
    """What the instance's plan says of its model and engine; nothing when it cannot be read."""
    import json

    from qwen3emb_launch.verify.identity import from_plan

    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        python = plan.get("engine", {}).get("python")
        return from_plan(plan), Path(python) if python else None
    except (OSError, ValueError, AttributeError):
        return {}, None


def read_key(console: Console, given: str | None, file: Path | None) -> str | None:
    """The API key: from the file, the option, or OPENAI_API_KEY."""
    if file:
        from qwen3emb_launch.errors import InvalidInputError

        try:
            return check_key(file.read_text(encoding="utf-8").strip(), str(file))
        except (OSError, UnicodeDecodeError) as exc:
            raise InvalidInputError(
                "bad_key_file", f"cannot read {file}: {exc}", "a text file with the key in it"
            ) from exc
    if given:
        console.warn("--api-key is seen in the process list; --api-key-file or OPENAI_API_KEY are not")
        return check_key(given, "--api-key")
    return check_key(os.environ.get("OPENAI_API_KEY", ""), "OPENAI_API_KEY")


def check_key(key: str, origin: str) -> str | None:
    """A key as a header can carry it, None for an empty one. It is never shown."""
    from qwen3emb_launch.errors import InvalidInputError

    if all("!" <= letter <= "~" for letter in key):
        return key or None
    raise InvalidInputError(
        "bad_key",
        f"{origin} holds no API key: it has spaces, several lines or letters that no key has",
        "one key, nothing else",
    )


def check_dtype(name: str | None) -> str | None:
    """A known number format, or none given."""
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.verify.tolerance import REPRESENTATION, canonical_dtype

    if name and canonical_dtype(name) is None:
        raise InvalidInputError("bad_dtype", f"no number format {name!r}", f"one of {', '.join(REPRESENTATION)}")
    return name


def check_checkpoint(folder: Path) -> Path:
    """A folder with a config.json in it, absolute."""
    from qwen3emb_launch.errors import InvalidInputError

    if not (folder / "config.json").is_file():
        raise InvalidInputError(
            "not_a_model",
            f"{folder} holds no config.json",
            "give the folder that the engine serves: --checkpoint FOLDER",
        )
    return folder.absolute()


def check_report_paths(files: list[Path]) -> list[Path]:
    """Report files by ending, refused before anything is asked."""
    from qwen3emb_launch.errors import InvalidInputError

    for file in files:
        if file.suffix not in (".json", ".md"):
            raise InvalidInputError(
                "bad_report", f"a report is written as .json or .md, not {file.name!r}", "--report r.md"
            )
        check_folder(file)
    return files


def check_folder(file: Path) -> None:
    """What is written at the end of minutes has a place to go."""
    from qwen3emb_launch.errors import UnfitError

    if not file.absolute().parent.is_dir():
        raise UnfitError("unwritable", f"there is no folder {file.parent} for {file.name}", f"mkdir -p {file.parent}")


def find_python(plan_python: Path | None, engine: str | None, given: Path | None) -> Path | None:
    """The python that runs transformers: as told, the named environment's, the instance's, any complete one."""
    from qwen3emb_launch.errors import InvalidInputError, UnfitError

    if given:
        if not os.access(given, os.X_OK):
            raise InvalidInputError("bad_python", f"{given} cannot be executed", "--engine-python ENV/bin/python")
        return given.absolute()
    from qwen3emb_launch import engines

    if engine:
        return engines.find(name=engine).python
    if plan_python and os.access(plan_python, os.X_OK):
        return plan_python
    try:
        return engines.find().python
    except UnfitError:
        return None


def write_reports(files: list[Path], result: Report, error: CheckFailedError | None) -> None:
    """The report as Markdown, or as JSON in the envelope that --json prints, by each file's ending."""
    from qwen3emb_launch.results import failure, success
    from qwen3emb_launch.verify.reference import write_whole
    from qwen3emb_launch.verify.report import markdown

    envelope = failure("verify", error, result) if error else success("verify", result)
    for file in files:
        write_whole(file, markdown(result) if file.suffix == ".md" else envelope + "\n")


def show(out: Console, result: Report) -> None:
    """The table for people: verdicts first, then causes."""
    out.table(
        ("check", "verdict", "expected", "seen"),
        [(c.title, c.verdict.value.upper(), c.expected or None, c.seen or None) for c in result.checks],
        title=f"{result.endpoint}  {result.model}",
    )
    for check in result.checks:
        if check.cause:
            out.text(f"{check.verdict.value}: {check.title}: {check.cause}")
    out.text(f"precision: {result.precision}")
    out.text(f"fingerprint: {result.fingerprint['id']}")
    out.text(f"{'passed' if result.passed else 'FAILED'}: {result.summary}")
