"""`qwen3emb gateway`: one OpenAI-compatible address in front of any embedding engines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.gateway.config import GatewayConfig

SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: qwen3emb gateway --upstream http://127.0.0.1:30000/v1 --model-path ./Qwen3-Embedding-4B  |   "
        "qwen3emb gateway --upstream http://gpu1:30000/v1 --upstream http://gpu2:30000/v1 --host 0.0.0.0 "
        "--api-keys keys.txt   |   qwen3emb gateway --config gateway.json"
    )(gateway)


def gateway(
    upstream: Annotated[
        list[str] | None, typer.Option(help="An engine's address ending in /v1; may be repeated.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A JSON file with all settings; options here win over it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: 8000.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Name clients use; may be repeated. Default: the engine's.")
    ] = None,
    model_path: Annotated[
        str | None, typer.Option(help="The model's folder: its tokenizer counts and cuts inputs.")
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(help="Default: the engine's own word, else the model's.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Table of tasks (YAML), read again when it changes.")] = None,
    api_keys: Annotated[str | None, typer.Option(help="File: [NAME] KEY \\[rpm=N] \\[tpm=N] \\[admin] a line.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve others without API keys.", show_default=False)
    ] = None,
    cors: Annotated[list[str] | None, typer.Option(help="Origin that browsers may call from; may be repeated.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name clients call it by, on loopback without keys; may be repeated.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key, PEM.")] = None,
    cache_bytes: Annotated[str | None, typer.Option(help="Memory for vectors: 256m, 2g, 0. Default: 128m.")] = None,
    disk_cache: Annotated[str | None, typer.Option(help="File for vectors that survive a restart.")] = None,
    disk_bytes: Annotated[str | None, typer.Option(help="Its size. Default: 4g.")] = None,
    overflow: Annotated[
        str | None, typer.Option(help="Inputs over the context: refuse or truncate. Default: refuse.")
    ] = None,
    foreign_ids: Annotated[
        str | None, typer.Option(help="Other tokenizers' ids: refuse, decode or accept. Default: refuse.")
    ] = None,
    hold: Annotated[float | None, typer.Option(help="Seconds a request waits for an engine. Default: 30.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds a request may take. Default: 120.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: 1.")] = None,
    admin_socket: Annotated[str | None, typer.Option(help="Unix socket for changes while it runs.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Loopback port for /metrics and /ui, no key needed.")] = None,
    access_log: Annotated[str | None, typer.Option(help="File for one JSON line a request; - is stderr.")] = None,
    otel: Annotated[
        bool | None,
        typer.Option("--otel", help="Send OpenTelemetry spans, to where OTEL_… variables say.", show_default=False),
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="What to compare with: NAME=PRICE_PER_MILLION_TOKENS[CURRENCY].")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Serve one OpenAI-compatible address before one or more engines: cached, batched, guarded, retried."""
    with shell("gateway", json) as console:
        given = {
            "upstreams": upstream, "host": host, "port": port, "models": model, "model_path": model_path,
            "context_length": context_length, "tasks_file": tasks, "keys_file": api_keys, "insecure": insecure,
            "cors_origins": cors,
            "allow_hosts": allow_host, "tls_cert": tls_cert, "tls_key": tls_key, "cache_bytes": _bytes(cache_bytes),
            "disk_cache": disk_cache, "disk_bytes": _bytes(disk_bytes), "overflow": overflow,
            "foreign_ids": foreign_ids, "hold": hold, "timeout": timeout, "workers": workers,
            "admin_socket": admin_socket, "admin_port": admin_port, "access_log": access_log,
            "otel": otel, **_price(price),
        }  # fmt: skip
        settings = _settings(config, {k: v for k, v in given.items() if v is not None})
        _serve(settings, console)


def _settings(file: Path | None, given: Mapping[str, Any]) -> GatewayConfig:
    from qwen3emb_launch.errors import InvalidInputError
    from qwen3emb_launch.gateway.config import from_dict, read

    settings = from_dict({**(read(file) if file else {}), **given})
    if not settings.upstreams and not settings.admin_socket:
        raise InvalidInputError(
            "no_upstream", "no engine to serve from", "qwen3emb gateway --upstream http://127.0.0.1:30000/v1"
        )
    return settings


def _serve(settings: GatewayConfig, console: Console) -> None:
    from qwen3emb_launch.gateway.run import run

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")

    def listening(where: Mapping[str, Any]) -> None:
        if settings.insecure and not settings.loopback:
            console.warn(f"{settings.host} can be reached by others, and --insecure asks for no API key")
        scheme = "https" if settings.tls_cert else "http"
        host = f"[{where['host']}]" if ":" in where["host"] else where["host"]
        base = f"{scheme}://{host}:{where['port']}/v1"
        console.result(
            {**where, "base_url": base},
            lambda c: c.text(f"{base}  ->  {', '.join(u.url for u in settings.upstreams) or 'no engine yet'}"),
        )

    run(settings, listening)


def _bytes(text: str | None) -> int | None:
    """`256m` as bytes, powers of 1024."""
    from qwen3emb_launch.errors import InvalidInputError

    if text is None:
        return None
    word = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = word[-1:] if word[-1:] in SIZES else ""
    number = word.removesuffix(unit) if unit else word
    try:
        return int(float(number) * SIZES[unit])
    except (ValueError, OverflowError):
        raise InvalidInputError("bad_size", f"{text!r} is no size", "like 256m, 2g or 0") from None


def _price(text: str | None) -> dict[str, Any]:
    """`OpenAI 3-small=0.02USD` as its parts."""
    import re

    from qwen3emb_launch.errors import InvalidInputError

    if text is None:
        return {}
    match = re.fullmatch(r"(.+)=(\d+(?:\.\d+)?)\s*([A-Za-z]{3})?", text.strip())
    if not match:
        raise InvalidInputError("bad_price", f"{text!r} is no price", '--price "OpenAI 3-small=0.02USD"')
    return {"price_name": match[1], "price_per_million": float(match[2]), "currency": (match[3] or "USD").upper()}
