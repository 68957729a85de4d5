"""Listening sockets that are handed down: which addresses, how many, and that they outlive who serves them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port

from qwen3emb_launch import listening


def closing(sockets: list[socket.socket]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for one in sockets:
        stack.enter_context(one)
    return stack


def test_one_set_is_not_shared() -> None:
    """For one process the port is its own: nobody else can listen there beside it."""
    port = free_port()
    made = listening.listen("127.0.0.1", port)
    with closing(made):
        assert [one.getsockname() for one in made] == [("127.0.0.1", port)]
        with pytest.raises(OSError, match="in use"):
            listening.listen("127.0.0.1", port)
        with pytest.raises(OSError, match="in use"):
            listening.listen("127.0.0.1", port, 2)


def test_a_set_for_each_process() -> None:
    """Several processes get a set each, on one port; a connection comes to one of them."""
    port = free_port()
    made = listening.listen("127.0.0.1", port, 3)
    with closing(made):
        sets = [listening.part(made, number, 3) for number in range(3)]
        assert [len(group) for group in sets] == [1, 1, 1]
        assert len({one.fileno() for group in sets for one in group}) == 3
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_every_address_of_a_name() -> None:
    """A name with an IPv4 and an IPv6 address is listened on at both, as far as this machine has them."""
    port = free_port()
    made = listening.listen("localhost", port, 2)
    with closing(made):
        families = [one.family for one in made]
        assert socket.AF_INET in families
        assert families[: len(families) // 2] == families[len(families) // 2 :]
        assert {one.getsockname()[1] for one in made} == {port}


def test_an_address_of_another_machine() -> None:
    """It is an error, and leaves no socket open."""
    with pytest.raises(OSError, match="assign"):
        listening.listen("203.0.113.7", free_port())


def test_connections_wait_for_whoever_accepts() -> None:
    """A client connects and sends while nobody accepts, and is answered by who comes later."""
    port = free_port()
    made = listening.listen("127.0.0.1", port)
    with closing(made), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"hello")
        later, _ = made[0].accept()
        with later:
            assert later.recv(5) == b"hello"


def test_what_fits_is_served_again() -> None:
    """Sockets of an earlier run serve if they listen where they should, a set for each process; else they do not."""
    port = free_port()
    made = listening.listen("127.0.0.1", port, 2)
    with closing(made):
        assert listening.fits(made, "127.0.0.1", port, 2)
        assert listening.fits(made[:1], "127.0.0.1", port)
        for host, other, processes in (("127.0.0.1", port + 1, 2), ("127.0.0.2", port, 2), ("127.0.0.1", port, 3)):
            assert not listening.fits(made, host, other, processes)
        assert not listening.fits([], "127.0.0.1", port)
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            assert not listening.fits([deaf], "127.0.0.1", deaf.getsockname()[1])


def bound(family: int, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    made.bind((address, port))
    made.listen(1)
    return made


def test_what_listen_would_not_make_does_not_fit() -> None:
    """As many sockets as processes are not a set for each; a port that is to be shared must allow that; and a name is
    served at all its addresses, not at one of them."""
    port = free_port()
    both = [bound(socket.AF_INET, "0.0.0.0", port), bound(socket.AF_INET6, "::", port)]
    with closing(both):
        assert listening.fits(both, "", port)
        assert not listening.fits(both, "", port, 2)
        assert not listening.fits(both, "0.0.0.0", port)
        assert not listening.fits(both[:1], "", port)
    alone = bound(socket.AF_INET, "127.0.0.1", port)
    twice = [alone, alone.dup()]
    with closing(twice):
        assert not listening.fits(twice, "127.0.0.1", port, 2)
    made = listening.listen("localhost", port, 2)
    with closing(made):
        assert listening.fits(made, "localhost", port, 2)
        assert listening.fits(made[::-1], "localhost", port, 2)  # a service manager may turn them round
        if len(made) == 4:
            assert not listening.fits([one for one in made if one.family == socket.AF_INET], "localhost", port, 2)
            assert not listening.fits(made[:3], "localhost", port, 2)
            assert not listening.fits(sorted(made, key=lambda one: one.family), "localhost", port, 2)


def test_an_address_that_this_machine_has_not_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an address of a family that is not here is served at the other one, and that fits."""
    port = free_port()
    found = [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("2001:db8::7", port, 0, 0))]
    resolved = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved)
    made = listening.listen("name", port)
    with closing(made):
        assert len(made) == 1
        assert listening.fits(made, "name", port)


HANDED = """
import os, sys
sys.path.insert(0, {root!r})
from qwen3emb_launch import listening
environ = dict(LISTEN_PID=str(os.getpid() + {other}), LISTEN_FDS="2", LISTEN_FDNAMES="a:a")
copies = listening.kept(environ)
found = listening.take_kept(environ)
print(len(copies), len(found), environ, [one.getsockname()[1] for one in found], os.path.exists("/proc/self/fd/3"))
"""


@pytest.mark.parametrize("other", [0, 1])
def test_sockets_of_the_service_manager(other: int) -> None:
    """Descriptors from 3 on are taken when they are meant for this process: sockets, and nothing else; the variables
    are gone afterwards, and so are the descriptors."""
    port = free_port()
    made = listening.listen("127.0.0.1", port)
    root = str(Path(__file__).resolve().parents[1])
    with closing(made), Path(os.devnull).open() as file:
        script = f'exec 3<&{made[0].fileno()} 4<&{file.fileno()}; exec {sys.executable} -c "$CODE"'
        code = HANDED.format(root=root, other=other)
        done = subprocess.run(
            ["bash", "-c", script], env={**os.environ, "CODE": code}, pass_fds=[made[0].fileno(), file.fileno()],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    expected = "0 0 {} [] True\n" if other else f"1 1 {{}} [{port}] False\n"
    assert done.stdout == expected
