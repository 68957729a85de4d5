"""`qwen3emb download`: a model onto this machine, whole and checked."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.hub import DownloadResult


class SourceName(StrEnum):
    """Where models come from."""

    AUTO = "auto"
    HUGGINGFACE = "huggingface"
    MODELSCOPE = "modelscope"


RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="A branch, tag or commit of the hub.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb download 0.6b · qwen3emb download 4b --dry-run · "
        "HF_ENDPOINT=https://hf-mirror.com qwen3emb download 4b"
    )(download)


def download(
    model: Annotated[str, typer.Argument(help="0.6b, 4b, 8b, or a hub id (owner/name).")] = "4b",
    revision: RevisionOption = None,
    source: Annotated[
        SourceName,
        typer.Option("--source", help="auto: Hugging Face, then ModelScope where that does not answer within 3 s."),
    ] = SourceName.AUTO,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched; fetch nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Download a model: only what serving needs, resumed where it stopped, every hash checked.

    What is complete on disk is taken as it is, without asking the network. HF_ENDPOINT, HF_HOME, HF_TOKEN and the
    proxy variables are honoured, and for ModelScope MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN.
    """
    with shell("download", json) as console:
        from qwen3emb_launch import hub

        with console.progress("download") as progress:
            result = hub.download(model, revision=revision, source=source.value, dry_run=dry_run, progress=progress)
        console.result(result, lambda out: _show(out, result))


def _show(out: Console, result: DownloadResult) -> None:
    from qwen3emb_launch.console import size

    if result.dry_run:
        out.table(("file", "bytes"), [(f.path, f.size) for f in result.files])
    pairs = [
        ("model", result.repo),
        ("source", f"{result.source}, revision {result.revision}"),
        ("commit", result.commit),
        ("folder", result.path),
        ("size", f"{size(result.bytes_total)} in {len(result.files)} files"),
    ]
    if result.already_here:
        pairs.append(("fetched", "nothing, it was all here"))
    elif result.dry_run:
        pairs.append(("to fetch", f"{size(result.bytes_fetched)}; {size(result.free_bytes)} free"))
    else:
        kept = f", {size(result.bytes_resumed)} were here" if result.bytes_resumed else ""
        pairs.append(("fetched", f"{size(result.bytes_fetched)} in {result.seconds:.1f} s{kept}; all hashes right"))
    out.fields(pairs)
