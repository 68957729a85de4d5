"""Reading an engine's log: what is new since the last look, and the last lines for an error."""

from __future__ import annotations

from pathlib import Path

READ_LIMIT = 1 << 20  # a flooding engine must not cost the supervisor more than this a look


class LogTail:
    """New lines of a growing, rotated file. Of a flood only the last MiB is seen."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._inode = 0
        self._offset = 0
        self._rest = b""
        if from_end:
            self.skip()

    def skip(self) -> None:
        """Forget everything written so far."""
        try:
            seen = self.path.stat()
        except OSError:
            return
        self._inode, self._offset, self._rest = seen.st_ino, seen.st_size, b""

    def poll(self) -> list[str]:
        """The whole lines written since the last call."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                inode = self.path.stat().st_ino
                if inode != self._inode or size < self._offset:
                    self._inode, self._offset, self._rest = inode, 0, b""
                self._offset = max(self._offset, size - READ_LIMIT)
                file.seek(self._offset)
                data = file.read(READ_LIMIT)
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [text(line) for line in lines]


def last_lines(path: Path, count: int, *, limit: int = READ_LIMIT) -> list[str]:
    """The last `count` lines, the previous rotated piece included where the current one is too short."""
    lines: list[str] = []
    for piece in (path.with_name(path.name + ".1"), path):
        try:
            with piece.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - limit))
                lines += [text(line) for line in file.read().splitlines()]
        except OSError:
            continue
    return lines[-count:] if count > 0 else []


def text(line: bytes) -> str:
    """A log line as text: of progress bars (drawn over one another by carriage returns) only the last state."""
    return line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
