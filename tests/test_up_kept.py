"""Sockets that the service manager kept and that no longer fit: their own service must not find its address taken."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import free_port
from supervised import fake_plan, gateway_plan

from qwen3emb_launch import listening, profile_files, state
from qwen3emb_launch.cli.launching import Chosen, LaunchOptions, check_front
from qwen3emb_launch.cli.supervise import gateway_spec
from qwen3emb_launch.engine_process.ports import check_free
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.facts import Deadlines
from qwen3emb_launch.notify import ServiceManager, service_manager
from qwen3emb_launch.up.gateway_runner import GatewayRunner

HANDED = 700  # descriptors from here on, in the place of 3, which is somebody else's in a test


class Systemd:
    """Keeps a copy of the socket of 127.0.0.1:port until it is told to drop it, and a moment longer, as systemd does.

    `variables` are those of a service that is started with that socket.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = str(folder / "notify")
        self.dropped = threading.Event()
        (self.given,) = listening.listen("127.0.0.1", self.port)
        self._copy = self.given.dup()
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(self.address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while message := self._inbox.recv(65536):
            if b"FDSTOREREMOVE=1" in message and b"FDNAME=address" in message:
                self.dropped.set()
                threading.Event().wait(0.1)
                self._copy.close()

    @property
    def variables(self) -> dict[str, str]:
        os.dup2(self.given.fileno(), HANDED)
        return {"NOTIFY_SOCKET": self.address, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}

    @property
    def manager(self) -> ServiceManager:
        manager = service_manager(Deadlines(), {"NOTIFY_SOCKET": self.address})
        assert manager is not None
        return manager

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.address)
        self._thread.join()
        for one in (self._inbox, self._copy, self.given):
            one.close()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(tmp_path)
    yield made
    made.close()


@pytest.fixture
def service(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """This process, as if systemd had started it."""
    monkeypatch.setattr(listening, "FIRST_FD", HANDED)
    for name, value in systemd.variables.items():
        monkeypatch.setenv(name, value)
    systemd.given.close()
    yield systemd
    for copy in listening.take_kept(os.environ):
        copy.close()


def front(systemd: Systemd, host: str, *settings: str) -> None:
    """What `up` checks before it plans."""
    check_front(
        LaunchOptions(host=host, port=systemd.port, settings=settings), Chosen(profile_files.load("demo"), None, "demo")
    )


@pytest.mark.parametrize(
    ("host", "setting"),
    [
        ("0.0.0.0", "gateway.insecure=true"),
        ("127.0.0.1", "gateway.enabled=false"),
        ("127.0.0.1", "gateway.workers=2"),
    ],
)
def test_another_address_is_not_blocked_by_the_kept_one(service: Systemd, host: str, setting: str) -> None:
    """Another host, no gateway, another number of workers: this start goes on, and the manager drops its copy, so the
    next one does not meet it either."""
    front(service, host, setting)
    assert service.dropped.is_set()
    assert "LISTEN_FDS" not in os.environ
    assert os.environ["NOTIFY_SOCKET"] == service.address  # the supervisor has yet to say that it is ready
    check_free(host, service.port)


def test_what_fits_stays_kept(service: Systemd) -> None:
    """The same address again: who connects meanwhile goes on waiting in it."""
    front(service, "127.0.0.1")
    assert not service.dropped.is_set()
    (kept,) = listening.take_kept(os.environ)
    with kept:
        assert listening.fits([kept], "127.0.0.1", service.port)


@pytest.mark.usefixtures("service")
def test_a_port_of_somebody_else_is_still_refused() -> None:
    """Letting go of what was kept frees only that: another holder is named, after a bounded wait."""
    other = free_port()
    with ExitStack() as stack:
        for one in listening.listen("127.0.0.1", other):
            stack.enter_context(one)
        options = LaunchOptions(host="127.0.0.1", port=other)
        with pytest.raises(UnfitError, match=f"in use by pid {os.getpid()}"):
            check_front(options, Chosen(profile_files.load("demo"), None, "demo"))


def test_a_gateway_with_more_workers_listens_anew(systemd: Systemd) -> None:
    """Two workers in the place of one: the first start already gets its sockets, though the manager closes its copy
    only a moment after it was told."""
    plan = gateway_plan()
    settings = {**plan.gateway, "port": systemd.port, "workers": 2}
    plan = replace(plan, port=systemd.port, gateway=settings)
    spec = gateway_spec(plan, [systemd.given], systemd.manager)
    assert spec is not None
    claim = state.claim(plan.name)
    runner = GatewayRunner(spec, claim, lambda _: None, set, dict)
    command = runner.command(claim.logs / "a.log")
    assert len(command.fds) == 2
    assert systemd.dropped.is_set()
    runner.close()
    claim.release()


def test_without_a_gateway_the_address_is_the_engines(systemd: Systemd) -> None:
    """What was kept for a gateway is closed, here and by the manager, before the engine is to listen there."""
    plan = replace(fake_plan(), port=systemd.port, engine_port=systemd.port)
    assert gateway_spec(plan, [systemd.given], systemd.manager) is None
    assert systemd.dropped.is_set()
    check_free("127.0.0.1", systemd.port)
