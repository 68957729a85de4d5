"""A service manager in small: starts one command, hears its notifications, keeps its watchdog, starts it again.

It does what systemd does for the generated units (Type=notify, WatchdogSec, Restart=on-failure, kept descriptors), with
shorter pauses, and unlike systemd it removes nothing that a killed service leaves behind: leftovers are what is looked
for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

LOOK_EVERY = 0.05
ABORT_PATIENCE = 1.0
RESTART_PAUSE = 0.2
# Becomes the service under the same pid, with the kept descriptors from 3 on, as sd_listen_fds(3) has it.
HANDOVER = """
import fcntl, os, sys
kept = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",") if fd]
os.closerange(3, 100)
for number, fd in enumerate(kept):
    os.dup2(fd, 3 + number)
    os.close(fd)
if kept:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(kept))}
os.execv(sys.argv[2], sys.argv[2:])
"""


class Service:
    """`with Service(...) as service:` runs it; leaving ends it and waits. `log` gets what it says on stderr."""

    def __init__(
        self, argv: Sequence[str], environ: Mapping[str, str], log: Path, *, watchdog: float | None = None
    ) -> None:
        self.argv, self.log = list(argv), log
        self.watchdog = watchdog
        self.barked: list[float] = []  # when the watchdog had enough
        self._environ = dict(environ)
        self._ready = False
        self._stored: list[int] = []
        self._alive_at = 0.0
        self._stopping = threading.Event()
        self._address = f"qwen3emb-chaos-{os.getpid()}-{id(self):x}"
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(f"\0{self._address}")
        self._inbox.settimeout(LOOK_EVERY)
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._inbox.close()
        for fd in self._stored:
            os.close(fd)

    @property
    def pid(self) -> int:
        """The supervisor's pid."""
        assert self.process is not None
        return self.process.pid

    def _start(self) -> None:
        environ = {**self._environ, "NOTIFY_SOCKET": f"@{self._address}"}
        if self.watchdog:
            environ["WATCHDOG_USEC"] = str(int(self.watchdog * 1e6))
        self._ready = False
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", HANDOVER, ",".join(map(str, self._stored)), *self.argv], env=environ,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, pass_fds=self._stored,
            )  # fmt: skip

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._hear()
            assert self.process is not None
            if self._ready and self.watchdog and time.monotonic() - self._alive_at > self.watchdog:
                self.barked.append(time.monotonic())
                self.process.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(ABORT_PATIENCE)
                self.process.kill()
                self.process.wait()
            if self.process.poll() is not None:
                if self.process.returncode in (0, 2):
                    return
                self._stopping.wait(RESTART_PAUSE)
                if not self._stopping.is_set():
                    self._start()

    def _hear(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(self._inbox, 1 << 16, 1)
        except TimeoutError:
            return
        fields = dict(line.partition("=")[::2] for line in data.decode(errors="replace").splitlines())
        if "FDSTOREREMOVE" in fields:  # there is one name only
            for fd in self._stored:
                os.close(fd)
            self._stored = []
        self._stored += fds
        if self.process and fields.get("READY") == "1":
            self._ready = True
            self._alive_at = time.monotonic()
        if fields.get("WATCHDOG") == "1":
            self._alive_at = time.monotonic()
        if fields.get("WATCHDOG_USEC", "").isdigit() and self.watchdog:
            self.watchdog = int(fields["WATCHDOG_USEC"]) / 1e6
