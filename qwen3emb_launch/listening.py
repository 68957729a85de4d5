"""Listening sockets that outlive the processes that serve them.

A socket that listens goes on collecting connections while nobody accepts: whoever holds it can let a server die, hang
or be replaced, and clients wait a moment where they would be refused. So the socket is made by what lives longest, and
handed down by its number.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

BACKLOG = 2048  # connections that wait; the kernel's net.core.somaxconn may say less
FIRST_FD = 3  # of those that a service manager hands over, sd_listen_fds(3)
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def listen(host: str, port: int, processes: int = 1) -> list[socket.socket]:
    """Sockets that listen on every address of `host`, a set for each of so many processes, one set after the other.

    Several sets share the port (SO_REUSEPORT): the kernel deals connections out among them. Raises OSError.
    """
    addresses = _addresses(host, port)
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


def _addresses(host: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
    """Family and address of each, once. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


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
    """Whether these are what `listen` would make: each process's part listens on every address, and on nothing else.

    An address may be missing from all of them where `listen` would leave it out: this machine has not that family.
    """
    if not sockets or len(sockets) % processes:
        return False
    try:
        sets = [
            Counter((int(one.family), *one.getsockname()[:2]) for one in part(sockets, number, processes))
            for number in range(processes)
        ]
        addresses = _addresses(host, port)
        had = Counter(
            (family, *address[:2])
            for family, address in addresses
            if (family, *address[:2]) in sets[0] or _here(family, address)
        )
        return all(one == had for one in sets) and all(_serves(one, processes > 1) for one in sockets)
    except OSError:
        return False


def _here(family: int, address: tuple[Any, ...]) -> bool:
    """Whether this machine has the address, whoever holds the port. Raises OSError as `listen` would."""
    with ExitStack() as stack:
        return _bound(family, (address[0], 0, *address[2:]), False, stack) is not None


def _serves(one: socket.socket, shared: bool) -> bool:
    """Whether it listens, and lets others beside it where they are to share the port."""
    listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(listens) and (not shared or bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)))


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
