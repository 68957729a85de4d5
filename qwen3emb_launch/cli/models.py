"""`qwen3emb models`: what there is to serve, what is here, whether it is whole, and away with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.download import RevisionOption
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from pathlib import Path

    from qwen3emb_launch.catalog import CatalogModel, ModelShape
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.hub import ModelRow, RemoveResult, VerifyResult

ModelArgument = Annotated[
    str,
    typer.Argument(help="0.6b, 4b, 8b, demo, a hub id (owner/name) or a folder.", autocompletion=completion.models),
]
_LENGTHS = (512, 2048, 8192)  # tokens, for the arithmetic shown


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="List, show, verify and remove models.", no_args_is_help=True)
    group.command("list", epilog="Example: qwen3emb models list --json")(list_)
    group.command(epilog="Example: qwen3emb models show 4b")(show)
    group.command(epilog="Example: qwen3emb models verify 4b --repair")(verify)
    group.command(epilog="Example: qwen3emb models remove 8b --yes")(remove)
    app.add_typer(group, name="models")


def list_(json: JsonOption = False) -> None:
    """The known models and those on this machine. No network."""
    with shell("models list", json) as console:
        from qwen3emb_launch import hub

        found = hub.rows()
        console.result(found, lambda out: _list(out, found))


def show(model: ModelArgument, json: JsonOption = False) -> None:
    """Everything known of a model: shape, memory and arithmetic a token, scores, where it is. No network."""
    with shell("models show", json) as console:
        found = _facts(model)
        console.result(found, lambda out: _show(out, found))


def verify(
    model: ModelArgument,
    revision: RevisionOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Delete bad files and fetch them again.")] = False,
    json: JsonOption = False,
) -> None:
    """Read every byte again and compare with the hashes that the hub gave. Exit status 1 names the bad files."""
    with shell("models verify", json) as console:
        from qwen3emb_launch import hub

        with console.progress("verify") as progress:
            result = hub.verify(model, revision=revision, repair=repair, progress=progress)
        console.result(result, lambda out: _verified(out, result))


def remove(
    model: ModelArgument,
    revision: RevisionOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: JsonOption = False,
) -> None:
    """Delete a downloaded model, from the cache that it shares with other tools too. Asks first on a terminal."""
    with shell("models remove", json) as console:
        from qwen3emb_launch import hub

        if not yes and not json and sys.stdin.isatty():
            typer.confirm(f"delete {model}, for every tool that shares its cache?", abort=True, err=True)
        result = hub.remove(model, revision=revision)
        console.result(result, lambda out: _removed(out, result))


@dataclass(frozen=True)
class ModelDetails:
    """`models show`. `flops_per_token` by text length in tokens; `parameters` without an output head.

    `eos_token_id` is the token that is appended and pooled. For a model that is not here the catalog speaks.
    """

    model: str
    repo: str | None
    source: str | None
    commit: str | None
    path: Path | None
    shape: ModelShape
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: dict[str, float]
    eos_token_id: int | None
    context: int
    dims: tuple[int, int]
    scores: dict[str, tuple[float, float]]
    scores_source: str | None
    licence: str | None
    warnings: tuple[str, ...]


def _facts(name: str) -> ModelDetails:
    from qwen3emb_launch import hub
    from qwen3emb_launch.catalog import find_model
    from qwen3emb_launch.errors import UnfitError

    known = find_model(name)
    here = hub.local(name)
    if here is not None:
        return _details(
            here.shape,
            known,
            model=here.name,
            source=here.source,
            commit=here.revision,
            path=here.path,
            weight_bytes=here.weight_bytes,
            eos_token_id=here.eos_token_id,
            warnings=here.warnings,
        )
    if known is not None:
        return _details(
            known.shape,
            known,
            model=known.key,
            source=None,
            commit=None,
            path=None,
            weight_bytes=known.file_bytes,
            eos_token_id=known.eos_token_id,
            warnings=(),
        )
    if name == "demo":
        raise UnfitError("model_missing", "the demo model was not made yet", "qwen3emb up --profile demo")
    raise UnfitError("model_missing", f"{name} is not on this machine", f"qwen3emb download {name}")


def _details(shape: ModelShape, known: CatalogModel | None, **rest: Any) -> ModelDetails:
    from qwen3emb_launch.catalog import MIN_DIMS, SCORES_SOURCE

    return ModelDetails(
        repo=known.hub_id if known else None,
        shape=shape,
        parameters=shape.parameters,
        kv_bytes_per_token=shape.kv_bytes_per_token(),
        flops_per_token={str(length): shape.flops_per_token(length) for length in _LENGTHS},
        context=known.card_context if known else shape.max_positions,
        dims=(MIN_DIMS, shape.hidden_size),
        scores=dict(known.scores) if known else {},
        scores_source=SCORES_SOURCE if known else None,
        licence=known.licence if known else None,
        **rest,
    )


def _list(out: Console, found: list[ModelRow]) -> None:
    from qwen3emb_launch.console import size

    out.table(
        ("model", "repository", "on disk", "size", "source", "revision"),
        [
            (r.model, r.repo, r.here, size(r.bytes) if r.bytes else None, r.source, (r.commit or r.revision or "")[:12])
            for r in found
        ],
    )


def _show(out: Console, found: ModelDetails) -> None:
    from qwen3emb_launch.console import size

    shape = found.shape
    out.fields(
        [
            ("model", found.model),
            ("repository", found.repo),
            ("on disk", found.path or f"no; qwen3emb download {found.model}"),
            ("source", found.source),
            ("commit", found.commit),
            ("licence", found.licence),
            ("parameters", f"{found.parameters:,}"),
            ("weights", f"{size(found.weight_bytes)} ({found.weight_bytes:,} bytes, {shape.dtype})"),
            ("layers", f"{shape.layers}, width {shape.hidden_size}, inner {shape.mlp_size}"),
            ("attention", f"{shape.heads} heads, {shape.kv_heads} for keys and values, {shape.head_dim} wide"),
            ("vocabulary", f"{shape.vocab_size:,}"),
            ("context", f"{found.context:,} tokens (positions up to {shape.max_positions:,})"),
            ("dimensions", f"{found.dims[0]} to {found.dims[1]}"),
            ("pooled token", found.eos_token_id),
            ("KV cache", f"{found.kv_bytes_per_token:,} bytes a token, 16 bit"),
            *(
                (f"at {length} tokens", f"{flops / 1e9:.2f} GFLOP a token")
                for length, flops in found.flops_per_token.items()
            ),
            *((bench, f"{task} by task, {kind} by type") for bench, (task, kind) in found.scores.items()),
            *([("scores from", found.scores_source)] if found.scores_source else []),
        ]
    )
    for warning in found.warnings:
        out.warn(warning)


def _verified(out: Console, result: VerifyResult) -> None:
    from qwen3emb_launch.console import size

    out.table(("file", "state", "hash"), [(f.path, f.state, f.expected or f.found) for f in result.files])
    unknown = sum(f.state == "unknown" for f in result.files)
    said = (
        "its structure is whole; no hashes are known for it" if unknown == len(result.files) else "every hash is right"
    )
    if result.repaired:
        said = f"{said}, after fetching {', '.join(result.repaired)} again"
    out.text(f"{result.model}: {len(result.files)} files, {size(result.bytes)}, {result.path}: {said}")


def _removed(out: Console, result: RemoveResult) -> None:
    from qwen3emb_launch.console import size

    out.text(f"removed {result.model}: {size(result.bytes_freed)} freed ({', '.join(map(str, result.paths))})")
