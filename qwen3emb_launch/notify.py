"""Talking to the service manager: systemd's notification protocol, sd_notify(3), by the standard library alone.

A message is one datagram of `KEY=value` lines to the socket that NOTIFY_SOCKET names. `ServiceManager` is a listener of
the supervisor and decides what to say when:

    starting      STATUS, and EXTEND_TIMEOUT_USEC again and again: the supervisor keeps the start's deadline itself
    ready         READY=1 once, after the smoke test; MAINPID; WATCHDOG_USEC where the unit's is too short
    serving       WATCHDOG=1 for each probe that speaks for the engine (an embedding came back, it was seen to work, or
                  its machine starved it: an excuse, of which there are so many in a row), and for nothing else
    restarting    WATCHDOG=1 while the supervisor's loop turns: it is at work, within deadlines of its own
    stopping      STOPPING=1, and EXTEND_TIMEOUT_USEC until the engine is gone

It can also be given the sockets that users connect to (FDSTORE=1): it hands them to the next supervisor, if this one
ends in whatever way, and connections wait in them meanwhile.

A manager that does not listen costs nothing: sending never waits and never raises; what could not be sent is sent
with the next message.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from qwen3emb_launch.facts import Deadlines
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.state import InstanceRecord

EXTEND_BY = 60.0  # seconds that one message adds, from its arrival
REPEAT = 5.0  # seconds between two messages of one kind
WATCHDOG_MARGIN = 15.0  # seconds beyond what the supervisor needs to notice a hang itself
STORED = "address"  # the name of kept sockets
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def watchdog_seconds(deadlines: Deadlines) -> float:
    """The shortest watchdog that leaves a hung engine to the supervisor, which restarts just the engine.

    It notices one at the next probe and after `probe_failures` of them, each of `probe` seconds and a pause of one.
    Probes that are excused come before those and feed the watchdog, so they add nothing.
    """
    return deadlines.probe_every + deadlines.probe_failures * (deadlines.probe + 1) + deadlines.reap + WATCHDOG_MARGIN


class NotifySocket:
    """The sending end. `address` is a path, or a name in the abstract namespace after `@`."""

    def __init__(self, address: str) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._unsent: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def store(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Give copies away, in the place of earlier ones of that name. A manager without a store, or with a full one,
        drops them, which is no error: it is as if this had not been asked.
        """
        with contextlib.suppress(OSError):
            self._socket.sendto(f"FDSTOREREMOVE=1\nFDNAME={name}".encode(), self._address)
            for one in sockets:
                text = f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}".encode()
                copy = (socket.SOL_SOCKET, socket.SCM_RIGHTS, one.fileno().to_bytes(4, sys.byteorder))
                self._socket.sendmsg([text], [copy], 0, self._address)  # socket.send_fds leaves the address out

    def send(self, **fields: str) -> bool:
        """Send the fields, older unsent ones with them. False when the manager does not take it now.

        Line ends in a value (systemd takes a carriage return for one) would begin fields of their own.
        """
        self._unsent |= {key: " ".join(value.split()) for key, value in fields.items()}
        text = "\n".join(f"{key}={value}" for key, value in self._unsent.items())
        try:
            self._socket.sendto(text.encode(errors="replace"), self._address)
        except OSError:
            return False
        self._unsent = {}
        return True


class ServiceManager:
    """The listener that keeps systemd informed. Everything is called from the supervisor's one thread."""

    def __init__(
        self,
        out: NotifySocket,
        *,
        watchdog: float | None,
        least: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        pid: int | None = None,
    ) -> None:
        """`watchdog` is the manager's period in seconds, None without one; `least` the shortest sensible one."""
        self._out = out
        self._watchdog = watchdog
        self._least = least
        self._clock = clock
        self._pid = os.getpid() if pid is None else pid
        self._state = State.STARTING
        self._ready = False
        self._sent_at: float | None = None

    def store(self, sockets: Sequence[socket.socket]) -> None:
        """These are to outlive this process."""
        self._out.store(STORED, sockets)

    def moved(self, transition: Transition, record: InstanceRecord) -> None:
        """A change of state: STATUS always; READY=1 at the first ready, STOPPING=1 at the end."""
        self._state = transition.after
        fields = {"STATUS": f"{transition.after}: {transition.reason}"}
        if transition.after is State.READY:
            fields["STATUS"] = f"ready: {record.base_url} serves {record.served_model_name}"
            if not self._ready:
                self._ready = True
                fields |= {"READY": "1", "MAINPID": str(self._pid)}
                if self._watchdog is not None and self._watchdog < self._least:
                    fields["WATCHDOG_USEC"] = str(int(self._least * 1e6))
            fields |= self._alive()
        elif transition.after is State.STOPPING:
            fields |= {"STOPPING": "1", **_extension()}
        self._send(fields)

    def said(self, text: str) -> None:
        """A line of talk; the journal has it from stderr already."""

    def stage(self, text: str) -> None:
        """What the start is busy with."""
        self._send({"STATUS": f"{self._state}: {text}"} | (self._alive() if self._ready else _extension()))

    def pulse(self, lives: bool) -> None:
        """The supervisor's loop went round; `lives`: a probe spoke for the engine since the last time."""
        if self._state in (State.READY, State.DEGRADED):
            if lives:
                self._send(self._alive())
            return
        now = self._clock()
        if self._sent_at is not None and now - self._sent_at < REPEAT:
            return
        if self._state is State.STOPPING or not self._ready:
            self._send(_extension())
        else:
            self._send(self._alive())

    def _alive(self) -> dict[str, str]:
        return {"WATCHDOG": "1"} if self._watchdog is not None else {}

    def _send(self, fields: dict[str, str]) -> None:
        if fields:
            self._sent_at = self._clock()
            self._out.send(**fields)


def _extension() -> dict[str, str]:
    return {"EXTEND_TIMEOUT_USEC": str(int(EXTEND_BY * 1e6))}


def drop_stored(environ: Mapping[str, str]) -> None:
    """Have the service manager of this process, if there is one, close the sockets that it keeps for it."""
    address = environ.get(VARIABLES[0], "")
    if _reachable(address):
        NotifySocket(address).store(STORED, ())


def _reachable(address: str) -> bool:
    """Whether it is an address of this machine: vsock is for machines, not services."""
    return address.startswith(("/", "@")) and len(address) > 1


def service_manager(deadlines: Deadlines, environ: MutableMapping[str, str] | None = None) -> ServiceManager | None:
    """The service manager that started this process, or None.

    Takes the variables out of the environment: they are for this process, not for the engine that inherits it.
    """
    env = os.environ if environ is None else environ
    address, usec, pid = (env.pop(name, "") for name in VARIABLES)
    if not _reachable(address):
        return None
    meant = usec.isdigit() and int(usec) > 0 and pid in ("", str(os.getpid()))
    return ServiceManager(
        NotifySocket(address), watchdog=int(usec) / 1e6 if meant else None, least=watchdog_seconds(deadlines)
    )
