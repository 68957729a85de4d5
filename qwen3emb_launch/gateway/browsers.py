"""Other people's web pages: what a browser on this machine may be made to ask a gateway that wants no key.

Any page can send a POST to 127.0.0.1, and one whose own name suddenly resolves to 127.0.0.1 (DNS rebinding) can read
the answers too. A browser cannot help naming the page's origin in the first case and the page's host in the second.
With API keys neither works: no page knows one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import lru_cache

from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.http_messages import Request

ANY = "*"


def check(request: Request, *, loopback: bool, hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Raises ApiError 403 or 421. `hosts` are the names it may be called by besides loopback ones."""
    host = request.headers.get("host", "")
    if loopback and ANY not in hosts and not _is_local(host) and _name(host) not in hosts:
        raise ApiError(
            421,
            "unknown_host",
            f"this gateway serves this machine without a key and is not known as {host[:100]!r}: --allow-host NAME",
        )
    origin = request.headers.get("origin")
    if origin is None or request.method in ("GET", "HEAD", "OPTIONS") or ANY in origins or origin in origins:
        return
    if origin.partition("://")[2] != host:
        raise ApiError(
            403, "origin_not_allowed", f"web pages of {origin[:100]!r} may not call this gateway: --cors {origin[:100]}"
        )


def _name(host: str) -> str:
    """Without the port, in lower case."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).strip("[]").lower()


@lru_cache(maxsize=64)
def _is_local(host: str) -> bool:
    name = _name(host)
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == ""  # HTTP/1.0 needs none
