"""Listening sockets that outlive the processes that serve them.

A socket that listens goes on collecting connections while nobody accepts: whoever holds it can let a server die, hang
or be replaced, and clients wait a moment where they would be refused. So the socket is made by what lives longest, and
handed down by its number.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack

BACKLOG = 2048  # connections that wait; the kernel's net.core.somaxconn may say less
FIRST_FD = 3  # of those that a service manager hands over, sd_listen_fds(3)
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


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


def fits(sockets: Sequence[socket.socket], host: str, port: int, processes: int = 1) -> bool:
    """Whether these are what `listen` would make: they listen there, as many for each process."""
    if not sockets or len(sockets) % processes:
        return False
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listens = all(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for one in sockets)
        return listens and {one.getsockname()[:2] for one in sockets} <= {address[:2] for *_, address in found}
    except OSError:
        return False


def part(sockets: Sequence[socket.socket], number: int, processes: int) -> list[socket.socket]:
    """The set of one process, out of what `listen` made for all."""
    each = len(sockets) // processes
    return list(sockets[number * each : (number + 1) * each])


def kept(environ: Mapping[str, str]) -> list[socket.socket]:
    """Copies of the sockets that the service manager kept for this process."""
    found = []
    for fd in _handed_over(environ):
        try:
            found.append(socket.socket(fileno=os.dup(fd)))
        except OSError:
            continue  # no socket, so none of ours
    return found


def take_kept(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """As `kept`, and nothing of it is left open or in the environment for the processes that this one starts."""
    found = kept(environ)
    for fd in _handed_over(environ):
        os.close(fd)
    for name in VARIABLES:
        environ.pop(name, None)
    return found


def _handed_over(environ: Mapping[str, str]) -> range:
    count = environ.get("LISTEN_FDS", "")
    meant = environ.get("LISTEN_PID") == str(os.getpid()) and count.isdigit()
    return range(FIRST_FD, FIRST_FD + int(count)) if meant else range(0)
