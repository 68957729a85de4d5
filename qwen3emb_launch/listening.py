"""Listening sockets that outlive the processes that serve them.

A socket that listens goes on collecting connections while nobody accepts: whoever holds it can let a server die, hang
or be replaced, and clients wait a moment where they would be refused. So the socket is made by what lives longest, and
handed down by its number.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

BACKLOG = 2048  # connections that wait; the kernel's net.core.somaxconn may say less


def listen(host: str, port: int, processes: int = 1) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, a set for each of so many processes, one set after the other.

    Several sets share the port (SO_REUSEPORT): the kernel deals connections out among them. Raises OSError.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    with ExitStack() as unfinished:
        made: list[socket.socket] = []
        for _ in range(processes):
            group = [
                one for family, address in addresses if (one := _bound(family, address, processes > 1, unfinished))
            ]
            if not group:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            made += group
        for one in made:
            one.listen(BACKLOG)
        unfinished.pop_all()
        return made


def _bound(family: int, address: object, shared: bool, unfinished: ExitStack) -> socket.socket | None:
    """None for an address of a family that this machine has not, though the name has one of it."""
    try:
        made = unfinished.enter_context(socket.socket(family, socket.SOCK_STREAM))
    except OSError:
        return None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        made.bind(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and family == socket.AF_INET6:
            return None
        raise
    return made


def part(sockets: Sequence[socket.socket], number: int, processes: int) -> list[socket.socket]:
    """The set of one process, out of what `listen` made for all."""
    each = len(sockets) // processes
    return list(sockets[number * each : (number + 1) * each])
