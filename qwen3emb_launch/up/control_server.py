"""The supervisor's side of the control socket: bounded messages, deadlines, only for the instance's own user."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Any

from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.planning.serialise import plan_from_dict
from qwen3emb_launch.results import plain
from qwen3emb_launch.up.control import LINE_LIMIT, SOCKET, Candidate
from qwen3emb_launch.up.detached import error_from
from qwen3emb_launch.up.rollout import Order, Rollout
from qwen3emb_launch.up.sockets import short_path
from qwen3emb_launch.up.supervisor import Supervisor
from qwen3emb_launch.up.verdict import kept

REQUEST_TIMEOUT = 5.0  # from a connection to its request
CONFIRM_TIMEOUT = 900.0  # for the caller's own comparison of a candidate
ALIVE_EVERY = 5.0
SEND_TIMEOUT = 5.0  # for a caller that stopped reading
MOST_CONNECTIONS = 8
HOWS = ("auto", "beside", "in_place")


class ControlServer:
    """Answers `control.sock` in threads of its own, while it is entered."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._busy = threading.Lock()
        self._slots = threading.Semaphore(MOST_CONNECTIONS)
        self._socket: socket.socket | None = None

    def __enter__(self) -> ControlServer:
        """Listen. That it cannot be had (a full disk) is said, and ends nothing: the instance serves without."""
        folder = self._supervisor.claim.folder
        (folder / SOCKET).unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with short_path(folder, SOCKET) as path:
                listening.bind(path)
            (folder / SOCKET).chmod(0o600)  # the folder is 0700 already
            listening.listen(MOST_CONNECTIONS)
        except OSError as error:
            listening.close()
            self._supervisor.note(f"no control socket ({error.strerror or error}): qwen3emb restart will not work")
            return self
        self._socket = listening
        threading.Thread(target=self._accept, args=(listening,), name="control", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
            self._socket.close()
            (self._supervisor.claim.folder / SOCKET).unlink(missing_ok=True)

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            if not _same_user(connection) or not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="control request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        talk = _Talk(connection)
        try:
            request = talk.receive(REQUEST_TIMEOUT)
            talk.done({"replaced": plain(self._answer(request, talk))})
        except LaunchError as error:
            talk.failed(error)
        except Exception as error:  # noqa: BLE001 - a defect must reach the one who asked, and not end the supervisor
            talk.failed(CheckFailedError("internal_error", f"{type(error).__name__}: {error}", "report it"))
        finally:
            talk.close()
            self._slots.release()

    def _answer(self, request: Mapping[str, Any], talk: _Talk) -> Any:
        if request.get("do") != "replace":
            raise InvalidInputError("bad_request", f"nothing is called {request.get('do')!r} here", "replace")
        if request.get("how", "auto") not in HOWS:
            raise InvalidInputError("bad_request", f"how must be one of {', '.join(HOWS)}", "auto")
        plan = request.get("plan")
        order = Order(
            plan=plan_from_dict(plan) if plan is not None else None,
            how=request.get("how", "auto"),
            verify=request.get("verify", True) is True,
        )
        if not self._busy.acquire(blocking=False):
            raise UnfitError("busy", "another replacement is under way", "wait for its end: qwen3emb status")
        try:
            talk.keep_alive()

            def both(text: str) -> None:
                self._supervisor.note(text)
                talk.send({"event": "progress", "text": text})

            return Rollout(self._supervisor, order, both, talk.confirm if request.get("confirm") else None).run()
        finally:
            self._busy.release()


class _Talk:
    """One connection. Whoever went away is talked to in vain: that stops nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._writing = threading.Lock()
        self._over = threading.Event()

    def send(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(message, ensure_ascii=False).encode() + b"\n"
        with self._writing, contextlib.suppress(OSError):
            self._connection.sendall(line)

    def receive(self, timeout: float) -> dict[str, Any]:
        """One line. Raises InvalidInputError `bad_request`."""
        self._connection.settimeout(timeout)
        try:
            line = self._lines.readline(LINE_LIMIT)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            message = None
        finally:
            self._connection.settimeout(SEND_TIMEOUT)
        if not isinstance(message, dict):
            raise InvalidInputError(
                "bad_request",
                f"no JSON object on one line of at most {LINE_LIMIT} bytes within {timeout:g} s",
                "qwen3emb restart",
            )
        return message

    def confirm(self, candidate: Candidate) -> None:
        """Ask the caller. Raises the refusal; a caller that went away refuses."""
        self.send({"event": "candidate", **plain(candidate)})
        answer = self.receive(CONFIRM_TIMEOUT)
        if answer.get("go") is not True:
            refusal = answer.get("error")
            if isinstance(refusal, dict) and "code" in refusal and "message" in refusal:
                raise error_from(refusal)
            raise CheckFailedError("refused", f"{candidate.unit} was refused", "qwen3emb verify")

    def keep_alive(self) -> None:
        """A line every few seconds from now on: the caller can tell a long step from a hang."""

        def beat() -> None:
            while not self._over.wait(ALIVE_EVERY):
                self.send({"event": "alive"})

        threading.Thread(target=beat, name="control alive", daemon=True).start()

    def done(self, result: Mapping[str, Any]) -> None:
        self.send({"event": "done", "ok": True, "result": result})

    def failed(self, error: LaunchError) -> None:
        self.send({"event": "done", "ok": False, "error": plain(kept(error))})

    def close(self) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._lines.close()
            self._connection.close()


def _same_user(connection: socket.socket) -> bool:
    """Whether the other side is this user, or root."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return False
    return struct.unpack("3i", raw)[1] in (0, os.geteuid())
