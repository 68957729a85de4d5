"""The gateway's effects: its command with the engines of the moment, its probes over its admin socket.

The socket that users connect to is the supervisor's, and handed down: while the gateway restarts, or hangs until it is
replaced, connections wait in it, and the next gateway answers them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen3emb_launch.engine_process import EngineCommand
from qwen3emb_launch.engine_process.log_tail import last_lines
from qwen3emb_launch.engine_process.ports import check_free, let_go
from qwen3emb_launch.errors import Exit, LaunchError, UnfitError
from qwen3emb_launch.facts import Deadlines, RestartPolicy
from qwen3emb_launch.listening import fits, listen
from qwen3emb_launch.probe import Answer, Verdict
from qwen3emb_launch.state import Claim, write_private
from qwen3emb_launch.up.detached import error_from
from qwen3emb_launch.up.events import Event, Kill, Probe, Spawn, Terminate
from qwen3emb_launch.up.process_runner import ProcessRunner
from qwen3emb_launch.up.runner import Door
from qwen3emb_launch.up.sockets import short_path

SOCKET = "gateway.sock"
CONFIG = "gateway.json"
# It starts within a second and answers within milliseconds: a gateway that is silent for 8 s, on a machine that would
# let it answer, serves nobody.
PROBE = 1.5
PROBE_EVERY = 1.0
START = 60.0
RESTART = RestartPolicy(first=0.05, factor=2.0, longest=5.0, limit=10, window=120.0)
DRAIN_ROOM = 2.0  # seconds that it may take beyond its own drain


class AdminCall(Protocol):
    """One call to a gateway's admin socket, answered with JSON. Raises LaunchError."""

    def __call__(
        self, path: str, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = 60.0
    ) -> Any: ...


@dataclass(frozen=True)
class GatewaySpec:
    """The gateway of an instance: the command that takes `--config FILE`, its settings without engines, and the call
    to its admin socket. `base_url` is where users call.

    `kept` are sockets that an earlier supervisor listened on; `keep` gives new ones to who hands them to a later one.
    `keys_variable` names the environment variable that adds API keys: where users need one (`secured`), so does the
    smoke test.
    """

    argv: tuple[str, ...]
    settings: Mapping[str, Any]
    base_url: str
    admin: AdminCall
    keys_variable: str
    secured: bool
    kept: tuple[socket.socket, ...] = ()
    keep: Callable[[Sequence[socket.socket]], None] | None = None

    @property
    def workers(self) -> int:
        """Processes that share the port; each has an admin socket."""
        return int(self.settings.get("workers", 1))

    @property
    def sockets(self) -> tuple[str, ...]:
        """The admin sockets' names, the first worker's first."""
        return tuple(SOCKET if n == 0 else f"{SOCKET}.{n}" for n in range(self.workers))

    def deadlines(self, engine: Deadlines) -> Deadlines:
        """The gateway's own time-outs; a drain lasts as long as an engine's."""
        return Deadlines(
            start=START, probe=PROBE, probe_every=PROBE_EVERY, probe_failures=3, drain=engine.drain + DRAIN_ROOM
        )


class GatewayRunner(ProcessRunner):
    """The effects of the gateway's unit. `upstreams` gives the engines that may have traffic, with their keys."""

    def __init__(
        self,
        spec: GatewaySpec,
        claim: Claim,
        tell: Callable[[Event], None],
        keep: Callable[[], set[int]],
        upstreams: Callable[[], Mapping[str, str | None]],
    ) -> None:
        super().__init__("gateway", claim, tell, keep)
        self.spec = spec
        self._upstreams = upstreams
        self.refused: dict[str, str] = {}  # engines that it gives no traffic, as it said last: URL -> reason
        self._sockets: list[socket.socket] = []
        self._own_key = secrets.token_hex(24) if spec.secured else None

    @property
    def url(self) -> str:
        """Where users call."""
        return self.spec.base_url

    @property
    def door(self) -> Door:
        """Where users call, with a key for the smoke test."""
        return Door(self.spec.base_url, self._own_key)

    @property
    def config(self) -> Path:
        """The 0600 file that it reads."""
        return self._claim.folder / CONFIG

    def act(self, action: Spawn | Probe | Terminate | Kill) -> None:
        """A gateway that is to drain takes nothing new, so nobody else may keep its address open."""
        if isinstance(action, Terminate):
            self._close_sockets()
        super().act(action)

    def _close_sockets(self) -> None:
        for one in self._sockets:
            one.close()
        self._sockets = []

    def _listen(self) -> list[socket.socket]:
        """The address that users call, taken at the first start. Raises as `check_free`, UnfitError `cannot_listen`."""
        host, port = str(self.spec.settings["host"]), int(self.spec.settings["port"])
        kept, keep = list(self.spec.kept), self.spec.keep or (lambda _: None)
        if fits(kept, host, port, self.spec.workers):
            return kept
        if kept:  # of another address, or for other workers
            let_go(kept, lambda: keep(()), host, port)
        else:
            check_free(host, port)
        try:
            made = listen(host, port, self.spec.workers)
        except OSError as error:
            raise UnfitError(
                "cannot_listen", f"cannot listen on {host}:{port}: {error.strerror or error}", "qwen3emb up --port N"
            ) from error
        keep(made)
        return made

    def close(self) -> None:
        """No key and no socket stays."""
        self._close_sockets()
        self.config.unlink(missing_ok=True)
        for name in self.spec.sockets:
            (self._claim.folder / name).unlink(missing_ok=True)

    def command(self, log: Path) -> EngineCommand:
        """Its settings with the engines of this moment. The admin socket's path is relative: it may be too long."""
        self._sockets = self._sockets or self._listen()
        upstreams = self._upstreams()
        settings = {
            **self.spec.settings,
            "upstreams": [{"url": url, "api_key": key} for url, key in upstreams.items()],
            "admin_socket": SOCKET,
            "listen_fds": [one.fileno() for one in self._sockets],
        }
        try:
            write_private(self.config, json.dumps(settings))
        except UnfitError:
            if not self.config.exists():
                raise
            # A full disk: the last start's settings serve once more, and the link mends which engines it has.
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        keys = [self._own_key, *upstreams.values()]
        if self._own_key:
            given = env.get(self.spec.keys_variable, "")
            env[self.spec.keys_variable] = ",".join(filter(None, (given, self._own_key)))
        return EngineCommand(
            argv=(*self.spec.argv, "--config", str(self.config)),
            env=env,
            log=log,
            cwd=self._claim.folder,
            secrets=tuple(filter(None, keys)),
            fds=tuple(one.fileno() for one in self._sockets),
        )

    def ask(self, timeout: float) -> Callable[[], Answer]:
        """Whether every worker's loop turns, all within `timeout`; and which engines are refused."""
        return lambda: self._answers(timeout)

    def _answers(self, timeout: float) -> Answer:
        begin = time.monotonic()
        silent = f"no answer within {timeout:g} s"
        refused: dict[str, str] = {}
        try:
            for name in self.spec.sockets:
                left = begin + timeout - time.monotonic()
                if left <= 0:
                    return Answer(Verdict.SLOW, timeout - left, silent)
                with short_path(self._claim.folder, name) as path:
                    rows = self.spec.admin(path, "GET", "/state", None, left)["upstreams"]
                refused |= {row["url"]: row["reason"] for row in rows if row["state"] == "refused"}
        except (LaunchError, OSError) as error:
            took = time.monotonic() - begin
            if took >= timeout:
                return Answer(Verdict.SLOW, took, silent)
            return Answer(Verdict.UNREACHABLE, took, str(error))
        self.refused = refused
        return Answer(Verdict.OK, time.monotonic() - begin)

    def own_words(self) -> LaunchError | None:
        """Why it ended, where it said so itself: the error in its envelope."""
        for line in reversed(last_lines(self.log, 50) if self.log else []):
            if line.startswith('{"schema"'):
                try:
                    envelope = json.loads(line)
                except ValueError:
                    continue
                ended = self.status if self.status is not None else Exit.ENGINE
                return None if envelope.get("ok") else error_from(envelope["error"] | {"exit": ended})
        return None
