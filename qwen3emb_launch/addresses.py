"""Web addresses as people give them: taken apart, or found to be none, or to name a host that nobody knows."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

from qwen3emb_launch.errors import NetworkError

PROXY_VARIABLES = "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY name it; NO_PROXY lists hosts that are reached without"


def web_address(text: str) -> SplitResult | None:
    """The parts of an http(s) address; None for what is none, such as `http://[::1`, `http://host:port`, `http://a..b`.

    The host's name is tried as the system's resolver would write it, which raises for parts that are empty or too long,
    and one of other letters as the HTTP clients would, which know fewer of them.
    """
    try:
        parts = urlsplit(text.strip())
        _ = parts.port  # raises as well
        host = parts.hostname or ""
        host.encode("idna")
        if not host.isascii():
            import idna

            idna.encode(host)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\s\x00-\x1f\x7f]", text.strip()):
        return None
    return parts


def is_loopback(url: str) -> bool:
    """Whether the URL names this machine, which proxies must never be asked for."""
    return is_loopback_host(urlsplit(url).hostname or "")


def is_loopback_host(host: str) -> bool:
    """Whether a host, an IPv6 address with or without brackets, can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def unknown_host(error: BaseException, url: str, *, proxies: bool = True) -> NetworkError | None:
    """The error for a host name that does not resolve, where that is what `error` comes from; else None.

    `proxies`: the environment's were asked, so the name is the proxy's where one is for this address.
    """
    cause: BaseException | None = error
    seen: set[int] = set()  # a chain can lead back: `raise error from error`
    while cause is not None and not isinstance(cause, socket.gaierror):
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
        cause = None if id(cause) in seen else cause
    parts = web_address(url)
    if cause is None or parts is None:
        return None
    proxy = _proxy(parts) if proxies else None
    host = proxy or parts.hostname
    said = f"the {'proxy' if proxy else 'host'} name {host} does not resolve: {cause.strerror}"
    if proxy:
        return NetworkError("unknown_host", said, PROXY_VARIABLES)
    if cause.errno == socket.EAI_AGAIN:
        return NetworkError("unknown_host", said, "no name server answers: /etc/resolv.conf; an IP address needs none")
    hint = f"is it spelled right? `getent hosts {host}` asks as this machine does; its IP address would do as well"
    return NetworkError("unknown_host", said, hint)


def _proxy(parts: SplitResult) -> str | None:
    """The host name of the environment's proxy for an address; None where it is asked directly."""
    from urllib.request import getproxies, proxy_bypass

    found = getproxies()
    proxy = found.get(parts.scheme) or found.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    try:
        return urlsplit(proxy if "://" in proxy else f"http://{proxy}").hostname
    except ValueError:
        return None
