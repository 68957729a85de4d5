"""Everything the gateway can be told, as one frozen value with a JSON form (`qwen3emb gateway --config FILE`)."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from qwen3emb_launch.addresses import is_loopback_host
from qwen3emb_launch.errors import InvalidInputError, UnfitError, nearest
from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.tokens import Foreign, Overflow

KEYS_VARIABLE = "QWEN3EMB_GATEWAY_API_KEYS"
UPSTREAM_KEY_VARIABLE = "QWEN3EMB_UPSTREAM_API_KEY"


@dataclass(frozen=True)
class UpstreamConfig:
    """One engine: its base URL ending in /v1, and the key it wants (or the environment variable's)."""

    url: str
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class GatewayConfig:
    """How one gateway runs. Bytes are bytes, times are seconds, tokens include EOS; empty or None means not set.

    `models` are the names clients may use (aliases are built on them); `upstream_model` is the engine's own name for
    it, asked from the engine when empty. `fingerprint` says what made the vectors: a cache on disk that was written
    under another one is dropped. `context_length` as the engine has it: the longest input is one token less.
    `listen_fds` are descriptors that it was started with, sockets that listen on `host` and `port` already, as many for
    each worker: whoever holds them too can start it again without a refused connection.
    """

    upstreams: tuple[UpstreamConfig, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    models: tuple[str, ...] = ()
    upstream_model: str = ""
    model_path: str = ""
    context_length: int | None = None
    min_dims: int = 32
    fingerprint: str = ""
    tasks_file: str = ""
    keys_file: str = ""
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    tls_verify_upstream: bool = True
    cache_bytes: int = 128 << 20
    disk_cache: str = ""
    disk_bytes: int = 4 << 30
    overflow: Overflow = "refuse"
    foreign_ids: Foreign = "refuse"
    hold: float = 30.0
    timeout: float = 120.0
    stall: float = 30.0
    worker_stall: float = 10.0
    drain: float = 30.0
    batch_items: int = 128
    batch_tokens: int = 16_384
    batch_wait: float = 0.05
    long_tokens: int = 512
    calls: int = 4
    queue: int = 8_192
    max_items: int = 2_048
    max_body: int = 32 << 20
    connections: int = 4_096
    listen_fds: tuple[int, ...] = ()
    admin_socket: str = ""
    admin_port: int | None = None
    access_log: str = ""
    otel: bool = False
    price_name: str = ""
    price_per_million: float | None = None
    currency: str = "USD"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; holds upstream keys, so it belongs into a 0600 file."""
        return dataclasses.asdict(self)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback_host(self.host)


def from_dict(data: Mapping[str, Any]) -> GatewayConfig:
    """Raises InvalidInputError (`bad_gateway_config`) for unknown keys and wrong types, naming them."""
    known = {f.name for f in dataclasses.fields(GatewayConfig)}
    hints = get_type_hints(GatewayConfig)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            guess = nearest(str(key), known)
            raise _bad(f"unknown setting {key!r}" + (f", did you mean {guess!r}?" if guess else ""))
        if key == "upstreams":
            values[key] = tuple(_upstream(u) for u in _list(key, value))
        elif key == "listen_fds":
            values[key] = tuple(_typed(key, v, int) for v in _list(key, value))
        elif key in ("models", "cors_origins", "allow_hosts"):
            values[key] = tuple(_typed(key, v, str) for v in _list(key, value))
        else:
            values[key] = _typed(key, value, hints[key])
    config = GatewayConfig(**values)
    check(config)
    return config


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise _bad(f"{key} must be a list")
    return list(value)


def _upstream(value: Any) -> UpstreamConfig:
    if isinstance(value, str):
        return UpstreamConfig(value)
    if not isinstance(value, dict) or not isinstance(value.get("url"), str) or value.keys() - {"url", "api_key"}:
        raise _bad("an upstream is a URL, or a mapping with url and api_key")
    return UpstreamConfig(value["url"], value.get("api_key"))


def _typed(key: str, value: Any, hint: Any) -> Any:
    options = get_args(hint)
    if options and all(isinstance(o, str) for o in options):
        if value not in options:
            raise _bad(f"{key} is {value!r}, must be one of {', '.join(options)}")
        return value
    kinds = tuple(options) if options else (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        raise _bad(f"{key} is {value!r}, must be {' or '.join(k.__name__ for k in kinds if k is not type(None))}")
    return value


POSITIVE = ("hold", "timeout", "stall", "worker_stall", "drain", "batch_wait")
AT_LEAST_ONE = (
    "workers", "min_dims", "batch_items", "batch_tokens", "long_tokens", "calls", "queue", "max_items", "max_body",
    "connections",
)  # fmt: skip


def check(config: GatewayConfig) -> None:
    """Raise InvalidInputError or UnfitError for values that cannot be right together."""
    for upstream in config.upstreams:
        Address.parse(upstream.url)
    if not 0 <= config.port <= 65535:
        raise _bad(f"port {config.port} is not between 0 and 65535")
    for key in POSITIVE:
        if getattr(config, key) < 0:
            raise _bad(f"{key} must not be negative")
    for key in AT_LEAST_ONE:
        if getattr(config, key) < 1:
            raise _bad(f"{key} must be at least 1")
    if config.cache_bytes < 0 or config.disk_bytes < 0:
        raise _bad("cache sizes must not be negative")
    if bool(config.tls_cert) != bool(config.tls_key):
        raise _bad("TLS needs both tls_cert and tls_key")
    if config.queue < config.max_items:
        raise _bad(f"queue ({config.queue}) must have room for one request of max_items ({config.max_items})")
    for model in config.models:
        if ":" in model or not model.strip():
            raise _bad(f"model name {model!r}: a colon separates the task from it, so it cannot hold one")
    if len(config.listen_fds) % config.workers:
        raise _bad(f"{len(config.listen_fds)} sockets cannot be dealt out evenly to {config.workers} workers")
    if config.workers > 1 and config.port == 0:
        raise _bad("several workers share a port by its number: give one")
    has_keys = bool(config.keys_file or os.environ.get(KEYS_VARIABLE))
    if not config.loopback and not has_keys and not config.insecure:
        raise UnfitError(
            "no_api_keys",
            f"{config.host} can be reached by others and there are no API keys",
            f"--api-keys FILE (or {KEYS_VARIABLE}), --host 127.0.0.1, or --insecure if that is meant",
        )


def read(path: Path) -> dict[str, Any]:
    """A config file's settings, not checked yet. Raises InvalidInputError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise _bad(f"cannot read {path}: {exc}") from exc
    except json.JSONDecodeError as exc:
        raise _bad(f"{path}, line {exc.lineno}, column {exc.colno}: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits, or brackets without end
        raise _bad(f"{path}: {exc}") from exc
    if not isinstance(data, dict):
        raise _bad(f"{path} must hold a JSON object")
    return data


def _bad(what: str) -> InvalidInputError:
    return InvalidInputError("bad_gateway_config", what, "qwen3emb gateway --help")
