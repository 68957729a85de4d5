"""One JSON line a request: who, what, how long; never a text, a vector or a key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import Any

import orjson

from qwen3emb_launch.errors import UnfitError

FLUSH_EVERY = 0.25
FLUSH_BYTES = 64 << 10
MAX_KEPT = 4 << 20  # bytes kept when the file cannot be written (disk full); what is beyond is counted, not kept


class AccessLog:
    """Buffered lines to a file (0600) or to stderr (`-`). A log that cannot be written never fails a request.

    Raises UnfitError (`cannot_log`) when it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = sys.stderr.fileno() if path == "-" else self._open()
        self._lines: list[bytes] = []
        self._bytes = 0
        self.dropped = 0
        self._timer: asyncio.TimerHandle | None = None

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            message = f"cannot write the access log {self._path}: {exc.strerror}"
            raise UnfitError("cannot_log", message, "another --access-log, or - for stderr") from exc

    def reopen(self) -> None:
        """After rotation by somebody else."""
        if self._path != "-":
            self.flush()
            new = self._open()
            os.close(self._file)
            self._file = new

    def write(self, row: dict[str, Any]) -> None:
        """Add a line; it is on its way to the file within a quarter of a second."""
        line = orjson.dumps({"at": round(time.time(), 3), **row}, option=orjson.OPT_APPEND_NEWLINE)
        if self._bytes + len(line) > MAX_KEPT:
            self.dropped += 1
            return
        self._lines.append(line)
        self._bytes += len(line)
        if self._bytes >= FLUSH_BYTES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_EVERY, self.flush)

    def flush(self) -> None:
        """Write what is there; on failure it is kept for the next time, up to a bound."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines:
            return
        data = b"".join(self._lines)
        try:
            written = os.write(self._file, data)
        except OSError:
            return
        rest = data[written:]
        self._lines = [rest] if rest else []
        self._bytes = len(rest)

    def close(self) -> None:
        """Write the rest and close."""
        self.flush()
        if self._path != "-":
            with contextlib.suppress(OSError):
                os.close(self._file)
