"""One engine under its guard, as the supervisor handles it: start, ask to end, kill, and events from a thread."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from qwen3emb_launch.engine_process import guard
from qwen3emb_launch.engine_process.command import EngineCommand
from qwen3emb_launch.engine_process.events import (
    Doomed,
    Exited,
    Gone,
    GuardLost,
    ProcessEvent,
    Spawned,
    SpawnFailed,
    Stuck,
)
from qwen3emb_launch.errors import UnfitError

GUARD = Path(guard.__file__)


class EngineProcess:
    """Starts the guard at construction. `tell` is called from a thread of this object, `Gone` or `GuardLost` last.

    Raises UnfitError `guard_failed` when not even the guard can be started (no memory, no processes left).
    """

    def __init__(self, command: EngineCommand, tell: Callable[[ProcessEvent], None]) -> None:
        self._tell = tell
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
                cwd="/",
                env={},
                pass_fds=command.fds,
            )
        except OSError as error:
            raise UnfitError(
                "guard_failed", f"the engine's guard process could not be started: {error}", "qwen3emb doctor"
            ) from error
        self._send(command.order())
        threading.Thread(target=self._listen, name="guard", daemon=True).start()

    @property
    def guard_pid(self) -> int:
        """The guard's pid."""
        return self._guard.pid

    def look(self) -> None:
        """It serves: what it has in shared memory is seen now, and goes with it even if it dies by itself."""
        self._send({"do": "look"})

    def terminate(self) -> None:
        """SIGTERM to the engine's main process alone: SGLang answers what it has, then ends."""
        self._send({"do": "term"})

    def kill(self) -> None:
        """SIGKILL to everything descended from the engine."""
        self._send({"do": "kill"})

    def _send(self, order: dict[str, object]) -> None:
        pipe = self._guard.stdin
        assert pipe is not None  # noqa: S101 - Popen was given PIPE
        self._guard.send_signal(signal.SIGCONT)  # a guard that somebody stopped would never read it
        # Its death is reported by the listener, which may have closed the pipe while that report still waits.
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe.write(json.dumps(order).encode() + b"\n")
            pipe.flush()

    def _listen(self) -> None:
        pipe = self._guard.stdout
        assert pipe is not None  # noqa: S101 - Popen was given PIPE
        error = ""
        gone = False
        for line in pipe:
            event = json.loads(line)
            kind = event["event"]
            if kind == "spawned":
                self._tell(Spawned(event["pid"]))
            elif kind == "spawn_failed":
                self._tell(SpawnFailed(event["error"]))
            elif kind == "doomed":
                self._tell(Doomed())
            elif kind == "exited":
                self._tell(Exited(event["status"]))
            elif kind == "stuck":
                self._tell(Stuck(tuple(event["pids"])))
            elif kind == "guard_error":
                error = event["error"]
            elif kind == "gone":
                gone = True
        status = self._guard.wait()
        pipe.close()
        with contextlib.suppress(OSError):
            if self._guard.stdin:
                self._guard.stdin.close()
        self._tell(Gone() if gone else GuardLost(error or f"guard ended with status {status}"))


def sweep(keep: set[int]) -> list[int]:
    """Kill every descendant of this process that is not one of `keep` (or below one); return the pids found.

    For the remains of an engine whose guard was killed: this process is a subreaper, so they have become its children.
    Call again until it returns nothing.
    """
    me = os.getpid()
    parents = guard.parents()
    found = []
    for pid in guard.descendants(me):
        line, at = set(), pid
        while at in parents and at != me:
            line.add(at)
            at = parents[at]
        if line & keep:
            continue
        found.append(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return found
