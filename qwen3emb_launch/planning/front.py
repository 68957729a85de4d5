"""What stands in front of the engines: the gateway's settings, decided like every other setting. Pure."""

from __future__ import annotations

from typing import Any

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import Deadlines
from qwen3emb_launch.planning.ledger import Ledger
from qwen3emb_launch.planning.request import PlanRequest

FIRST_PRIVATE_PORT = 12000
CACHE_MB = 128  # a worker
CORES_A_WORKER = 4
GPU_WORKERS = 2
CPU_HOLD, GPU_HOLD = 60.0, 120.0
ANSWER_SECONDS = 90.0  # that a request may take beyond the wait for an engine
# Settings of the gateway that are passed on where somebody gave them, by their names in its configuration.
GATEWAY_NAMES = {
    "disk_cache": "disk_cache",
    "tasks": "tasks_file",
    "api_keys": "keys_file",
    "insecure": "insecure",
    "overflow": "overflow",
    "access_log": "access_log",
    "admin_port": "admin_port",
}


def workers_for(cores: int, *, gpu: bool, limited: bool) -> int:
    """Gateway processes that suit a machine: two before a GPU, if each finds four cores (an engine keeps two busy).

    One worker is full before a fast GPU is; two give more than the HTTP process of an engine takes, since a text costs
    that half of what it costs a worker. More would only form smaller calls. One on a CPU engine, which computes on all
    cores itself, and where keys have limits a minute, which each worker counts for itself.
    """
    return max(1, min(GPU_WORKERS, cores // CORES_A_WORKER)) if gpu and not limited else 1


def behind(request: PlanRequest) -> tuple[str, int]:
    """Where an engine listens that only the gateway calls."""
    return request.engine_host or "127.0.0.1", request.engine_port or FIRST_PRIVATE_PORT


def settings(
    ledger: Ledger, request: PlanRequest, host: str, port: int, served: str, deadlines: Deadlines
) -> dict[str, Any] | None:
    """The gateway's settings, by the names of its configuration file; None where users call the engine itself."""
    wanted = ledger.decide(
        "gateway.enabled",
        True,
        "one address that caches, batches, limits, and holds requests while an engine restarts",
        origin="default",
    )
    replicas = ledger.value("replicas")
    if not wanted:
        if replicas > 1:
            raise InvalidInputError(
                "incompatible_settings",
                f"replicas {replicas} need one address before them: the gateway, which is switched off",
                "leave the gateway on, or --set replicas=1",
            )
        return None
    workers = ledger.decide(
        "gateway.workers",
        request.gateway_workers,
        "one process answers some thousand texts a second; two before a GPU where there are cores",
        origin="rule" if request.gateway_workers > 1 else "default",
    )
    cache = ledger.decide(
        "gateway.cache_mb",
        CACHE_MB * workers,
        "12,000 vectors of 2560 numbers" + (" in each worker" if workers > 1 else ""),
        origin="rule" if workers > 1 else "default",
    )
    hold = ledger.decide(
        "gateway.hold",
        GPU_HOLD if request.engine.flavour == "cuda" else CPU_HOLD,
        "about what an engine takes to come back: a request that comes meanwhile is answered late, not refused",
    )
    chosen: dict[str, Any] = {
        "host": host, "port": port, "workers": workers, "cache_bytes": cache << 20, "hold": float(hold),
        "timeout": float(hold) + ANSWER_SECONDS, "drain": deadlines.drain,
        "models": list(dict.fromkeys((served, served.rstrip("/").rsplit("/", 1)[-1]))), "upstream_model": served,
        "model_path": str(request.model.path), "context_length": int(ledger.value("context_length")),
    }  # fmt: skip
    for key, name in GATEWAY_NAMES.items():
        asked = ledger.asked(f"gateway.{key}")
        if asked is not None:
            chosen[name] = ledger.decide(f"gateway.{key}", asked, "")
    return chosen
