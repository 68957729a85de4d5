"""Asking a running supervisor for something: the client's side of its control socket.

`control.sock` lies in the instance's folder (0700), is 0600, and talks JSON lines of at most 1 MiB. A connection
carries one request:

    -> {"do": "replace", "plan": {...} | null, "how": "auto" | "beside" | "in_place", "verify": true, "confirm": false}
    <- {"event": "progress", "text": "engine: a new one starts beside it on port 24817"}        any number of these
    <- {"event": "alive"}                                                                       at least every 5 s
    <- {"event": "candidate", "unit": ..., "url": ..., "key": ..., "old_url": ..., "old_key": ...}  only with `confirm`
    -> {"go": true}  or  {"go": false, "error": {code, message, hint, exit}}                    the answer to it
    <- {"event": "done", "ok": true, "result": {...}}  or  {"event": "done", "ok": false, "error": {...}}

`replace` is what `qwen3emb restart` and `qwen3emb upgrade` are made of. For each engine of the instance in turn:

1. Beside (memory allows a second engine): the new one is started on a private port of its own, gets the smoke test and
   the caller's `confirm`, joins the gateway once its probe vector agrees with the old one's; the old one is drained,
   leaves the gateway and is stopped. Requests never wait.
   In place (memory does not): the old one is drained and stopped first, then the new one goes the same way. Requests
   wait in the gateway meanwhile where no other engine serves, `gateway.hold` seconds at most.
2. A new engine that does not start, fails its check, is refused by `confirm` or by the gateway is killed. Beside, the
   old one has never stopped serving; in place, the old plan is started again. Engines that were replaced before are
   taken back as well, when they were given another plan. The error is what went wrong (exit 4 for an engine that
   failed, with its log's last lines), and nothing else has changed.

The operation belongs to the supervisor: a client that goes away does not stop it (a pending `confirm` counts as no).
Stopping the instance ends it. One replacement at a time: a second one is refused (`busy`).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3emb_launch.errors import EngineFailedError, LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.state import Instance
from qwen3emb_launch.up.detached import error_from
from qwen3emb_launch.up.sockets import short_path
from qwen3emb_launch.up.verdict import kept

SOCKET = "control.sock"
LINE_LIMIT = 1 << 20
CONNECT_TIMEOUT = 5.0
SILENCE = 30.0  # seconds without a line after which the supervisor is taken for hung: it says `alive` every 5

How = Literal["auto", "beside", "in_place"]


@dataclass(frozen=True)
class Candidate:
    """A new engine that passed its smoke test and has no traffic yet. URLs end in /v1; keys are the engines' API keys.

    `old_url` is the engine that it is to replace, still serving; None when it was stopped for lack of memory.
    """

    unit: str
    url: str
    key: str | None = field(repr=False, default=None)
    old_url: str | None = None
    old_key: str | None = field(repr=False, default=None)


@dataclass(frozen=True)
class Replaced:
    """One engine that was replaced: `how` is `beside` or `in_place`, `why` says what decided it, in words."""

    unit: str
    how: str
    why: str
    seconds: float
    old_pid: int | None
    new_pid: int | None


def replace(
    instance: Instance,
    *,
    plan: LaunchPlan | None = None,
    how: How = "auto",
    verify: bool = True,
    confirm: Callable[[Candidate], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Replaced, ...]:
    """Replace every engine of a running instance, one after the other, without losing a request; see the module.

    `plan` is what the new engines run (another engine environment's plan: same name, address, model name and width);
    None starts the present plan again. `confirm` is called with each candidate before it gets traffic, and raises a
    LaunchError to refuse it: everything is then as before, and that error is raised here. `say` gets a line a step.

    Raises UnfitError `not_running`, `no_control`, `busy`, `no_gateway`, `no_room` (`how="beside"` and no memory);
    InvalidInputError `other_service` (the plan serves something else); EngineFailedError for an engine that failed.
    """
    from qwen3emb_launch.planning.serialise import plan_to_dict

    order = {
        "do": "replace",
        "plan": plan_to_dict(plan) if plan else None,
        "how": how,
        "verify": verify,
        "confirm": confirm is not None,
    }
    refusal: LaunchError | None = None
    with _Connection(instance) as connection:
        connection.send(order)
        while True:
            message = connection.receive()
            kind = message.get("event")
            if kind == "progress":
                say(str(message.get("text", "")))
            elif kind == "alive":
                continue
            elif kind == "candidate":
                refusal = _ask(confirm, message)
                connection.send({"go": True} if refusal is None else {"go": False, "error": kept(refusal)})
            elif message.get("ok"):
                return tuple(Replaced(**row) for row in message["result"]["replaced"])
            else:
                raise refusal or error_from(message["error"])


def _ask(confirm: Callable[[Candidate], None] | None, message: Mapping[str, Any]) -> LaunchError | None:
    if confirm is None:
        return None
    try:
        confirm(Candidate(**{k: v for k, v in message.items() if k != "event"}))
    except LaunchError as error:
        return error
    return None


class _Connection:
    """One conversation with an instance's supervisor, line by line."""

    def __init__(self, instance: Instance) -> None:
        self._name = instance.name
        record = instance.record
        if not instance.running or record is None or record.supervisor is None:
            raise UnfitError(
                "not_running", f"instance {instance.name!r} is not running", f"qwen3emb status {instance.name}"
            )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(CONNECT_TIMEOUT)
        try:
            with short_path(instance.folder, SOCKET) as path:
                self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise UnfitError(
                "no_control",
                f"the supervisor of {instance.name!r} (pid {record.supervisor.pid}) cannot be asked: "
                f"{error.strerror or error}",
                f"it may be an older one: qwen3emb down {instance.name}, then qwen3emb up",
            ) from error
        self._socket.settimeout(SILENCE)  # of what it does the supervisor keeps the deadlines
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """One line. A broken connection shows when the answer is read."""
        try:
            self._socket.sendall(json.dumps(message, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise self._lost(error) from error

    def receive(self) -> dict[str, Any]:
        """One line. Raises EngineFailedError `supervisor_died` at the end of the connection."""
        try:
            line = self._lines.readline(LINE_LIMIT)
            message = json.loads(line)
        except (OSError, ValueError) as error:
            raise self._lost(error) from error
        return dict(message)

    def _lost(self, error: Exception) -> EngineFailedError:
        return EngineFailedError(
            "supervisor_died",
            f"the supervisor of {self._name!r} ended the connection ({type(error).__name__})",
            f"qwen3emb status {self._name}; qwen3emb logs {self._name}",
        )
