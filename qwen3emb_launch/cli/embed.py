"""`qwen3emb embed`: texts in, JSON lines out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.embed import Embedder


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog='Examples: qwen3emb embed "What is the capital of China?" --task query --dims 256   |   '
        "qwen3emb embed < texts.txt > vectors.jsonl"
    )(embed)


def embed(
    texts: Annotated[
        list[str] | None, typer.Argument(help="The texts. Default: one a line from stdin.", show_default=False)
    ] = None,
    dims: Annotated[int | None, typer.Option(help="Numbers a vector, from 32. Default: all.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="query, document, another task's name, or an instruction in English. Default: document."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="The instance. Default: the only one that runs.", autocompletion=completion.instances),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Another OpenAI-compatible address, ending in /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name there. Default: the one it serves.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=2048, help="Texts of one request.")] = 32,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key. Default: the variable OPENAI_API_KEY.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Embed texts: a JSON line each, {"index", "text", "embedding"}, in their order."""
    with shell("embed", json) as console:
        from qwen3emb_launch.embed import check_task
        from qwen3emb_launch.results import plain

        check_task(task)
        embedder = _embedder(name, base_url, model, dims, api_key_file)
        if not texts and sys.stdin.isatty():
            console.say("reading lines; Ctrl-D ends")
        source = map(_argument, texts) if texts else _lines()
        vectors = embedder.embed(source, dims=dims, task=task, batch=batch)
        if json:
            embeddings = list(vectors)
            console.result({"model": embedder.model, "embeddings": embeddings}, lambda _: None)
            return
        from json import dumps

        for one in vectors:
            console.raw(dumps(plain(one), ensure_ascii=False))


def _embedder(
    name: str | None, base_url: str | None, model: str | None, dims: int | None, key_file: Path | None
) -> Embedder:
    from qwen3emb_launch import state
    from qwen3emb_launch.addresses import is_loopback
    from qwen3emb_launch.embed import Embedder, check_dims
    from qwen3emb_launch.embed import base_url as checked
    from qwen3emb_launch.errors import InvalidInputError

    key = _key(key_file)
    if base_url is not None:
        if name is not None:
            raise InvalidInputError("usage", "--name and --base-url exclude each other", "qwen3emb embed --help")
        check_dims(dims, None)
        url = checked(base_url)
        return Embedder(url, model=model, key=key, loopback=is_loopback(url))
    _, record = state.running(name)
    check_dims(dims, record.max_dims)
    return Embedder(record.base_url, model=model or record.served_model_name, key=key, loopback=True)


def _key(path: Path | None) -> str | None:
    from qwen3emb_launch.cli.verify import check_key
    from qwen3emb_launch.errors import InvalidInputError

    if path is None:
        return check_key(os.environ.get("OPENAI_API_KEY", ""), "OPENAI_API_KEY")
    try:
        return check_key(path.read_text(encoding="utf-8").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError("bad_key_file", f"{path}: {error}", "give a text file with one key") from error


def _argument(text: str) -> str:
    """A text of the command line as UTF-8, whatever the locale took it for. Raises InvalidInputError `not_utf8`."""
    from qwen3emb_launch.errors import InvalidInputError

    if not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError("not_utf8", f"text {text!r} is not UTF-8 text", "iconv -t utf-8") from error


def _lines() -> Iterator[str]:
    """stdin's lines without their ends. Raises InvalidInputError `not_utf8` naming the line."""
    from qwen3emb_launch.errors import InvalidInputError

    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidInputError(
                "not_utf8",
                f"line {number} of stdin is not UTF-8 text (byte {error.start})",
                "iconv -t utf-8",
            ) from error
