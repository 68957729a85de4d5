"""The README's picture: what a terminal shows of `up`, `verify` and `down`, run for real, as an SVG.

    pip install pyte
    python docs/terminal.py docs/terminal.svg          # with `qwen3emb` on the PATH and the cpu engine installed

Commands run in a terminal of their own; the lines that the screen ends with are drawn.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 120, 60
COMMANDS = ("qwen3emb up --profile demo --detach", "qwen3emb verify", "qwen3emb down")


def main() -> None:
    out = Path(sys.argv[1])
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for command in COMMANDS:
        console.print(Text(f"$ {command}", style="bold"))
        for line in screen(command):
            console.print(line, overflow="crop", no_wrap=True)
        console.print()
    # Without the font's address: a picture asks nobody for anything.
    out.write_text(
        console.export_svg(
            title="qwen3emb", code_format=re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        )
    )


def screen(command: str) -> list[Text]:
    """The lines that a terminal shows when the command has ended."""
    shown = pyte.HistoryScreen(COLUMNS, LINES, history=1000)
    stream = pyte.ByteStream(shown)
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    process = subprocess.Popen(shlex.split(command), stdin=follower, stdout=follower, stderr=follower, env=environ)
    os.close(follower)
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # what Linux answers when the last writer is gone
            break
        if not data:
            break
        stream.feed(data)
    if process.wait():
        raise SystemExit(f"{command}: exit {process.returncode}")
    rows = [*shown.history.top, *(shown.buffer[y] for y in range(LINES))]
    lines = [_text(row) for row in rows]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return lines


def _text(row: dict[int, pyte.screens.Char]) -> Text:
    text = Text()
    for look, cells in groupby((row[x] for x in range(COLUMNS)), lambda c: (c.fg, c.bold, c.italics)):
        color, bold, italic = look
        text.append("".join(cell.data for cell in cells), Style(color=_color(color), bold=bold, italic=italic))
    text.rstrip()
    return text


def _color(name: str) -> Color | None:
    if name == "default":
        return None
    named = {"brown": "yellow", "brightbrown": "bright_yellow"}.get(name, name.replace("bright", "bright_"))
    return Color.parse(f"#{name}" if len(name) == 6 and all(c in "0123456789abcdef" for c in name) else named)


if __name__ == "__main__":
    main()
