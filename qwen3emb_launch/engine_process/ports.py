"""Is an address free to listen on, and if not, who holds it."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, UnfitError

HIGHEST_ENGINE_PORT = 55535  # SGLang claims port + 10000 as well
RELEASED = 2.0  # seconds in which systemd closes a socket that it was told to drop; it does so in a thread of its own
LOOK_EVERY = 0.02
OTHERS = "a process of another user, or a connection that ended within the last minute"
PRIVATE_PORTS = range(12000, 20000)  # engines behind a gateway; with 10000 more they stay below 30000, our own default

_Resolved = tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]


def check_range(port: int) -> None:
    """Raise InvalidInputError `bad_port` unless it is a TCP port's number."""
    if not 1 <= port <= 65535:
        raise InvalidInputError("bad_port", f"port {port} is not in 1..65535", "qwen3emb up --port 30000")


def check_host(host: str) -> None:
    """Raise InvalidInputError `bad_host` unless this machine has the address: some port there can be listened on."""
    family, kind, protocol, _, address = _resolved(host, 0)
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.bind(address)
        except OSError as error:
            raise _foreign(host, error) from error


def check_free(host: str, port: int) -> None:
    """Raise unless this user can listen on host:port now.

    InvalidInputError `bad_port`, `bad_host`; UnfitError `port_in_use` (names the holder), `port_privileged`.
    """
    check_range(port)
    family, kind, protocol, _, address = _resolved(host, port)
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: TIME_WAIT is no holder
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError as error:
            raise UnfitError(
                "port_privileged",
                f"port {port} needs rights this user does not have (ports below 1024)",
                f"qwen3emb up --port {free_port(host, 30000)}",
            ) from error
        except OSError as error:
            raise _taken(host, port, error) from error


def let_go(sockets: Sequence[socket.socket], drop: Callable[[], None], host: str, port: int) -> None:
    """Free an address that sockets from before hold: close them, have the service manager close its copies (`drop`),
    and wait for that, since it does so a moment after it is told. Raises as `check_free`.
    """
    for one in sockets:
        one.close()
    drop()
    end = time.monotonic() + RELEASED
    while not _binds(host, port, listen=True) and time.monotonic() < end:
        time.sleep(LOOK_EVERY)
    check_free(host, port)


def _resolved(host: str, port: int) -> _Resolved:
    try:
        return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise _foreign(host, error) from error


def _foreign(host: str, error: OSError | UnicodeError) -> InvalidInputError:
    why = getattr(error, "strerror", None) or error
    return InvalidInputError(
        "bad_host", f"host {host!r} is not an address of this machine: {why}", "qwen3emb up --host 127.0.0.1"
    )


def _taken(host: str, port: int, error: OSError) -> UnfitError | InvalidInputError:
    if error.errno != errno.EADDRINUSE:
        return InvalidInputError(
            "bad_host", f"cannot listen on {host}:{port}: {error.strerror}", "qwen3emb up --host 127.0.0.1"
        )
    pid, name = holder(port)
    instance = instance_of(pid) if pid else None
    who = f"the instance {instance}, pid {pid}" if instance else f"pid {pid} ({name})" if pid else OTHERS
    stop = f"qwen3emb down {instance}" if instance else "stop it"
    return UnfitError(
        "port_in_use",
        f"port {port} is in use by {who}",
        f"{stop}, or: qwen3emb up --port {free_port(host, port + 1 if port < HIGHEST_ENGINE_PORT else 30000)}",
        {"port": port, "pid": pid, "process": name, "instance": instance},
    )


def holder(port: int) -> tuple[int | None, str | None]:
    """Pid and name of the process that listens on a TCP port; None where this user may not know."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return None, None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            if connection.pid is None:
                continue
            try:
                return connection.pid, psutil.Process(connection.pid).name()
            except psutil.Error:
                return connection.pid, None
    return None, None


def instance_of(pid: int) -> str | None:
    """The instance that a process belongs to: its supervisor is the process or one above it. None for all others."""
    import psutil

    from qwen3emb_launch import state

    running = [(i.name, i.record.supervisor) for i in state.instances() if i.running and i.record]
    ours = {supervisor.pid: name for name, supervisor in running if supervisor}
    with contextlib.suppress(psutil.Error):
        for one in (pid, *(above.pid for above in psutil.Process(pid).parents())):
            if one in ours:
                return ours[one]
    return None


def free_port(host: str, first: int) -> int:
    """The first port at or above `first` that an engine can listen on, its port + 10000 free as well.

    Raises UnfitError `no_free_port` when there is none up to 55535.
    """
    for port in range(max(first, 1024), HIGHEST_ENGINE_PORT + 1):
        if _binds(host, port) and _binds(host, port + 10000):
            return port
    raise UnfitError("no_free_port", f"no free port from {first} to {HIGHEST_ENGINE_PORT}", "qwen3emb status")


def private_port(host: str) -> int:
    """A port for an engine that only this machine's gateway calls, free now, its port + 10000 free as well.

    Below the range from which Linux takes the ports of outgoing connections (32768 and up), and drawn, not counted:
    two launchers at the same time hardly meet. Raises UnfitError `no_free_port`.
    """
    import random

    for port in random.sample(range(PRIVATE_PORTS.start, PRIVATE_PORTS.stop), 200):
        if _binds(host, port) and _binds(host, port + 10000):
            return port
    raise UnfitError(
        "no_free_port",
        f"200 ports drawn from {PRIVATE_PORTS.start} to {PRIVATE_PORTS.stop - 1} are all taken",
        "ss -ltn shows who listens",
    )


def _binds(host: str, port: int, *, listen: bool = False) -> bool:
    try:
        family, kind, protocol, _, address = _resolved(host, port)
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            if listen:
                probe.listen(1)
    except (OSError, OverflowError, InvalidInputError):
        return False
    return True
