"""Running a supervisor as a process of its own: in the place of this one, or in the background."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qwen3emb_launch.engine_process.log_tail import LogTail, last_lines
from qwen3emb_launch.errors import (
    CheckFailedError,
    EngineFailedError,
    Exit,
    InvalidInputError,
    LaunchError,
    NetworkError,
    UnfitError,
)
from qwen3emb_launch.lifecycle import TERMINAL, State
from qwen3emb_launch.state import Claim, InstanceRecord, load

LOOK_EVERY = 0.1
ENDING = 10.0  # seconds from a supervisor's last word to its end
MODULE = "qwen3emb_launch.cli.supervise"
KINDS: dict[int, type[LaunchError]] = {
    Exit.FAILED: CheckFailedError,
    Exit.INVALID: InvalidInputError,
    Exit.UNFIT: UnfitError,
    Exit.NETWORK: NetworkError,
}


def command(claim: Claim, options: Sequence[str]) -> list[str]:
    """The supervisor's argv. The claim's lock travels as an open file, so nobody can take the name in between.

    `-P`: a file in the current folder must not be taken for a module.
    """
    return [sys.executable, "-P", "-m", MODULE, claim.name, "--lock-fd", str(claim.lock_fd), *options]


def become(claim: Claim, options: Sequence[str]) -> NoReturn:
    """Replace this process, and all that planning loaded into it, by the supervisor. Keeps pid and terminal."""
    os.set_inheritable(claim.lock_fd, True)
    sys.stdout.flush()
    sys.stderr.flush()
    argv = command(claim, options)
    os.execv(argv[0], argv)  # noqa: S606 - no shell is meant


@dataclass
class Detached:
    """A supervisor in the background, being waited for."""

    claim: Claim
    process: subprocess.Popen[bytes]

    @property
    def log_path(self) -> str:
        """Where it talks to."""
        return str(self.claim.logs / "supervisor.log")

    def wait_ready(self, say: Callable[[str], None]) -> InstanceRecord:
        """Its record once it serves; its talk goes to `say` line by line.

        The supervisor keeps the deadlines; this waits for as long as it lives. Raises what it failed with, or
        EngineFailedError `supervisor_died`.
        """
        tail = LogTail(self.claim.logs / "supervisor.log")
        pause = threading.Event()
        while True:
            ended = self.process.poll() is not None
            for line in tail.poll():
                say(line)
            record = self._record()
            if record and record.state in (State.READY, State.DEGRADED):
                return record
            if record and record.state in TERMINAL and record.error:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(ENDING)  # then its name is free for the next try
                raise error_from(record.error)
            if ended:
                raise self._died()
            pause.wait(LOOK_EVERY)

    def stop(self) -> None:
        """End it: nothing of the engine stays. Returns when it is gone."""
        for patience in (10, 20):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)  # the second one means at once
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return
        self.process.kill()  # the guard kills the engine when it goes
        self.process.wait()

    def _record(self) -> InstanceRecord | None:
        found = load(self.claim.name)
        record = found.record if found else None
        ours = record and record.supervisor and record.supervisor.pid == self.process.pid
        return record if ours else None

    def _died(self) -> LaunchError:
        said = last_lines(self.claim.logs / "supervisor.log", 5)
        return KINDS.get(self.process.returncode, EngineFailedError)(
            "supervisor_died",
            f"the supervisor ended with status {self.process.returncode}: {said[-1] if said else 'it said nothing'}",
            f"see {self.log_path}",
            {"log": self.log_path, "last_lines": said},
        )


def detach(claim: Claim, options: Sequence[str]) -> Detached:
    """Start the supervisor in a session of its own; its talk goes to logs/supervisor.log of the instance."""
    path = claim.logs / "supervisor.log"
    with contextlib.suppress(FileNotFoundError):
        path.replace(path.with_name(path.name + ".1"))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            command(claim, options),
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            pass_fds=(claim.lock_fd,),
            cwd="/",
        )
    finally:
        os.close(fd)
    claim.release()  # the supervisor has it now
    return Detached(claim, process)


def error_from(data: Mapping[str, Any]) -> LaunchError:
    """A supervisor's error, as its record keeps it, as the error it was."""
    kind = KINDS.get(int(data.get("exit", Exit.ENGINE)), EngineFailedError)
    error = kind(data["code"], data["message"], data.get("hint", ""), data.get("details"))
    error.result = data.get("result")
    return error
