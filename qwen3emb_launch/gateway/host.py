"""What the gateway needs of the machine it listens on: cores, its certificate, and a descriptor a connection."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.config import GatewayConfig

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may keep busy: of those it may run on, as many as its control group's quota pays for.

    A container sees its own quota at the top; outside of one there is none there.
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroups / "cpu.max").read_text(encoding="ascii").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # cgroup v1, or no quota: "max"
        return cores


def tls_context(config: GatewayConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises InvalidInputError (`bad_tls`)."""
    if not config.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as exc:
        raise InvalidInputError(
            "bad_tls", f"cannot use {config.tls_cert} and {config.tls_key}: {exc}", "PEM files?"
        ) from exc
    return context


def raise_fd_limit(wanted: int) -> None:
    """As many connections as configured need as many descriptors."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
