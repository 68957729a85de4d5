"""sd_notify: what is said when, over a real datagram socket, and by the real supervisor around a misbehaving engine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from supervised import EAGER, QUICK, Supervised, fake_plan, until

from qwen3emb_launch import notify
from qwen3emb_launch.cli.supervise import SMOKE
from qwen3emb_launch.facts import Deadlines
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.notify import NotifySocket, ServiceManager, service_manager, watchdog_seconds
from qwen3emb_launch.state import InstanceRecord
from qwen3emb_launch.up import machine
from qwen3emb_launch.up.supervisor import Supervisor

RECORD = InstanceRecord(
    "n", State.READY, "", None, (), "p", "m", "served", "http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1", 64, 512, 0.0
)


class Manager:
    """The receiving end: every message as a dictionary."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.messages: list[dict[str, str]] = []
        self.stored: list[int] = []

    def read(self) -> list[dict[str, str]]:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 65536, 4)
            except BlockingIOError:
                return self.messages
            self.stored += fds
            self.messages.append(dict(line.split("=", 1) for line in data.decode().splitlines()))

    def close(self) -> None:
        self._socket.close()

    def keys(self) -> list[str]:
        return [key for message in self.read() for key in message]


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path: Path):
    address = str(tmp_path / "notify") if request.param == "path" else f"@qwen3emb-test-{os.getpid()}"
    found = Manager(address)
    yield found
    found.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def listener(manager: Manager, **options) -> tuple[ServiceManager, Clock]:
    clock = Clock()
    options = {"watchdog": 30.0, **options}
    return ServiceManager(NotifySocket(manager.address), clock=clock, pid=7, **options), clock


def move(to: ServiceManager, before: State, after: State, reason: str = "why") -> None:
    to.moved(Transition("n", before, after, reason, 0.0), RECORD)


def test_ready_is_said_once_and_names_the_endpoint(manager: Manager) -> None:
    """READY=1 and MAINPID go with the first ready only; a later one is a STATUS and a sign of life."""
    to, _ = listener(manager)
    move(to, State.STARTING, State.READY)
    move(to, State.READY, State.DEGRADED, "HTTP 500")
    move(to, State.DEGRADED, State.READY)
    first, degraded, again = manager.read()
    assert first == {
        "STATUS": "ready: http://127.0.0.1:1/v1 serves served", "READY": "1", "MAINPID": "7", "WATCHDOG": "1",
    }  # fmt: skip
    assert degraded == {"STATUS": "degraded: HTTP 500"}
    assert "READY" not in again
    assert again["WATCHDOG"] == "1"


def test_only_a_probe_keeps_the_watchdog_quiet_while_serving(manager: Manager) -> None:
    """A loop that turns is no proof: nothing is sent without a probe that speaks for the engine."""
    to, clock = listener(manager)
    move(to, State.STARTING, State.READY)
    before = len(manager.read())
    for _ in range(20):
        clock.now += 10
        to.pulse(False)
    assert len(manager.read()) == before
    to.pulse(True)
    assert manager.read()[-1] == {"WATCHDOG": "1"}
    move(to, State.READY, State.DEGRADED)
    before = len(manager.read())
    to.pulse(False)
    assert len(manager.read()) == before


def test_a_restart_within_the_instance_keeps_the_service_alive(manager: Manager) -> None:
    """While the supervisor restarts its engine, its turning loop is the sign of life, at a measured pace."""
    to, clock = listener(manager)
    move(to, State.STARTING, State.READY)
    move(to, State.READY, State.RESTARTING, "killed")
    clock.now += notify.REPEAT
    to.pulse(False)
    to.pulse(False)
    assert [m for m in manager.read() if m == {"WATCHDOG": "1"}] == [{"WATCHDOG": "1"}]


def test_a_long_start_and_a_long_stop_are_extended(manager: Manager) -> None:
    """EXTEND_TIMEOUT_USEC goes out again and again before ready and while stopping; never a WATCHDOG before ready."""
    to, clock = listener(manager)
    to.pulse(False)
    to.pulse(False)
    clock.now += notify.REPEAT
    to.pulse(False)
    to.stage("loading weights, 40%")
    assert manager.read() == [
        {"EXTEND_TIMEOUT_USEC": "60000000"},
        {"EXTEND_TIMEOUT_USEC": "60000000"},
        {"STATUS": "starting: loading weights, 40%", "EXTEND_TIMEOUT_USEC": "60000000"},
    ]
    move(to, State.STARTING, State.STOPPING, "SIGTERM")
    assert manager.read()[-1] == {
        "STATUS": "stopping: SIGTERM", "STOPPING": "1", "EXTEND_TIMEOUT_USEC": "60000000",
    }  # fmt: skip


def test_a_watchdog_shorter_than_the_supervisor_needs_is_lengthened(manager: Manager) -> None:
    """The unit's period is raised to what noticing a hung engine takes; a longer one stands, none stays none."""
    for period, expected in ((30.0, "123000000"), (200.0, None), (None, None)):
        to, _ = listener(manager, watchdog=period, least=watchdog_seconds(Deadlines()))
        move(to, State.STARTING, State.READY)
        message = manager.read()[-1]
        assert message.get("WATCHDOG_USEC") == expected
        assert ("WATCHDOG" in message) == (period is not None)


def test_line_ends_in_a_reason_do_not_forge_fields(manager: Manager) -> None:
    """A reason is one line, whatever an engine wrote into it."""
    to, _ = listener(manager)
    move(to, State.READY, State.RESTARTING, "died\nREADY=1\rSTOPPING=1")
    (message,) = manager.read()
    assert set(message) == {"STATUS"}


def test_sockets_are_given_to_be_kept(manager: Manager) -> None:
    """Each socket goes in a message of its own, in the place of those that were given before."""
    to, _ = listener(manager)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        to.store([one, two])
        assert [m.get("FDSTORE", "removed") for m in manager.read()] == ["removed", "1", "1"]
        assert {m["FDNAME"] for m in manager.messages} == {"address"}
        kept = [socket.socket(fileno=fd) for fd in manager.stored]
        assert [s.getsockname() for s in kept] == [one.getsockname(), two.getsockname()]
        for copy in kept:
            copy.close()


def test_nobody_listening_costs_nothing_and_news_is_kept(tmp_path: Path) -> None:
    """Without a manager nothing is raised; READY=1 is sent with the next message once it listens again."""
    address = str(tmp_path / "notify")
    to = ServiceManager(NotifySocket(address), watchdog=10.0)
    move(to, State.STARTING, State.READY)
    back = Manager(address)
    to.pulse(True)
    (message,) = back.read()
    assert message["READY"] == "1"
    to.pulse(True)
    assert back.read()[-1] == {"WATCHDOG": "1"}
    back.close()


def test_the_variables_are_taken_out_of_the_environment() -> None:
    """The engine inherits none of them; without NOTIFY_SOCKET there is no manager."""
    env = {"NOTIFY_SOCKET": "/run/x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    assert service_manager(Deadlines(), env) is not None
    assert env == {"HOME": "/"}
    assert service_manager(Deadlines(), {}) is None
    for bad in ("", "relative", "@", "/", "vsock:2:1"):
        assert service_manager(Deadlines(), {"NOTIFY_SOCKET": bad}) is None


@pytest.mark.parametrize(
    ("variables", "watched"),
    [
        ({"WATCHDOG_USEC": "30000000"}, True),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, False),  # meant for another process
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "soon"}, False),
        ({}, False),
    ],
)
def test_a_watchdog_is_fed_only_where_one_waits(tmp_path: Path, variables: dict[str, str], watched: bool) -> None:
    """WATCHDOG=1 goes out only when systemd asked this process for it."""
    receiving = Manager(str(tmp_path / "notify"))
    to = service_manager(Deadlines(), {"NOTIFY_SOCKET": receiving.address, **variables})
    assert to
    move(to, State.STARTING, State.READY)
    assert ("WATCHDOG" in receiving.read()[-1]) == watched
    receiving.close()


class Notified(Supervised):
    """A supervisor around the fake engine that tells a manager."""

    def __init__(self, behaviour, manager: Manager, check=None, **changes) -> None:
        plan = fake_plan(behaviour, **changes)
        super().__init__(plan, check)
        to = ServiceManager(NotifySocket(manager.address), watchdog=30.0)
        self.supervisor = Supervisor(
            plan, self.claim, check_argv=check, listeners=[self.watcher, to], pulse=to.pulse
        )  # fmt: skip


@pytest.fixture
def receiving(tmp_path: Path):
    found = Manager(str(tmp_path / "notify"))
    yield found
    found.close()


def test_ready_comes_after_the_smoke_test(receiving: Manager) -> None:
    """The service manager hears READY=1 once the vectors are proven, then signs of life, then STOPPING=1."""
    with Notified({}, receiving, SMOKE) as running:
        until(lambda: "READY" in receiving.keys(), "READY=1")  # noqa: SIM118 - a method, not a mapping
        assert running.watcher.notes[0] == "it embeds; smoke test"
        lives = receiving.keys().count("WATCHDOG")
        until(lambda: receiving.keys().count("WATCHDOG") >= lives + 3, "signs of life")
    keys = receiving.keys()
    assert keys.count("READY") == 1
    assert keys.index("READY") < keys.index("STOPPING")


def test_a_failed_smoke_test_is_never_ready(receiving: Manager) -> None:
    """An engine with wrong vectors gives STATUS lines and no READY=1."""
    with Notified({"ignore_dimensions": True}, receiving, SMOKE) as running:
        running.reach(State.FAILED)
    assert "READY" not in receiving.keys()  # noqa: SIM118
    assert receiving.read()[-1]["STATUS"].startswith("failed: ")


def test_a_hung_engine_gives_no_signs_of_life(receiving: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hang to the restart nothing feeds the watchdog, though /health says 200; then the restart does."""
    monkeypatch.setattr(machine, "starved", lambda _: "")  # a test machine may well be
    deadlines = Deadlines(start=20, probe=0.5, probe_every=0.1, probe_failures=3, drain=5, reap=5)
    with Notified({"hang_after": 4}, receiving, deadlines=deadlines, restart=EAGER) as running:
        running.reach(State.RESTARTING)
        running.reach(State.READY, times=2)
    told = receiving.read()
    states = [m.get("STATUS", "").split(":")[0] for m in told]
    degraded, restarting = states.index("degraded"), states.index("restarting")
    assert not [m for m in told[degraded:restarting] if "WATCHDOG" in m]
    assert [m for m in told[restarting:] if "WATCHDOG" in m]
    assert sum("READY" in m for m in told) == 1


def test_the_watchdog_leaves_a_hung_engine_to_the_supervisor() -> None:
    """The period is longer than probes need to fail: the supervisor restarts one engine, systemd would restart all."""
    for deadlines in (Deadlines(), QUICK, Deadlines(probe=300, probe_failures=5)):
        needs = deadlines.probe_every + deadlines.probe_failures * (deadlines.probe + 1)
        assert watchdog_seconds(deadlines) > needs
