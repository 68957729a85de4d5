"""Listening sockets that are handed down: which addresses, how many, and that they outlive who serves them."""

from __future__ import annotations

import contextlib
import socket

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
