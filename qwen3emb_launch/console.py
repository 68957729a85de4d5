"""The only printer. stdout is data (a result, for people or as one JSON envelope), stderr is talk.

A command returns its result and says how people should see it; nothing else in the package writes to a terminal.
Colour and live displays follow the terminal: none in a pipe, none with NO_COLOR or TERM=dumb.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from qwen3emb_launch import results
from qwen3emb_launch.errors import CheckFailedError, LaunchError
from qwen3emb_launch.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

Human = Callable[["Console"], None]

# How a cell that is one of these words looks. Colour repeats what the word says, and says nothing by itself.
STYLES = {
    **dict.fromkeys(("PASS", "ok", "ready"), "green"),
    **dict.fromkeys(("FAIL", "fail", "failed"), "bold red"),
    **dict.fromkeys(("WARN", "warn", "degraded", "starting", "restarting", "stopping"), "yellow"),
    **dict.fromkeys(("SKIP", "-"), "dim"),
}


def escape_what_the_locale_lacks() -> None:
    """A letter that stdout's encoding has none for is escaped, not a crash; stderr does so by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Console:
    """Prints for one command. `json` is the user's `--json`."""

    def __init__(self, command: str, json: bool = False) -> None:
        self.command = command
        self.json = json
        self._out: RichConsole | None = None
        self._err: RichConsole | None = None

    @property
    def out(self) -> RichConsole:
        """stdout, for data."""
        if self._out is None:
            self._out = _rich(stderr=False)
        return self._out

    @property
    def err(self) -> RichConsole:
        """stderr, for talk."""
        if self._err is None:
            self._err = _rich(stderr=True)
        return self._err

    @property
    def live(self) -> bool:
        """Whether a live display on stderr makes sense."""
        return not self.json and sys.stderr.isatty() and self.err.is_terminal and not self.err.is_dumb_terminal

    def result(self, value: Any, human: Human) -> None:
        """The command's result: one envelope with `--json`, else whatever `human` prints."""
        if self.json:
            self.raw(results.success(self.command, value))
        else:
            human(self)

    def failure(self, error: LaunchError, result: Any = None) -> None:
        """The command's failure: an envelope on stdout with `--json`, else what happened and what to do next."""
        if self.json:
            self.raw(results.failure(self.command, error, result))
            return
        self._talk(f"error: {error.message}", style="bold red")
        if error.hint:
            self._talk(f"  -> {error.hint}")

    def raw(self, line: str) -> None:
        """One line of data, untouched: JSON lines, log lines, an argv to paste."""
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            _abandon(sys.stdout)
        except OSError as error:
            _abandon(sys.stdout)
            self.json = False  # stdout is lost: the failure is told on stderr
            raise CheckFailedError(
                "stdout_unwritable", f"stdout cannot be written: {error.strerror}", "free space where it goes"
            ) from error

    def say(self, text: str) -> None:
        """A line of talk. Silent with `--json`."""
        if not self.json:
            self._talk(text)

    def warn(self, text: str) -> None:
        """A warning; shown with `--json` too, since it goes to stderr."""
        self._talk(f"warning: {text}", style="yellow")

    def _talk(self, text: str, style: str | None = None) -> None:
        """A line on stderr; where nobody reads it any more, the work goes on without.

        Plainly, unless it has a style and a terminal shows it, or a live display must make room for it: to load the
        printer of styles takes 20 ms, of the 100 that a short command has.
        """
        if self._err is None and not (style and sys.stderr.isatty()):
            try:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
            except OSError:
                _abandon(sys.stderr)
        else:
            self.err.print(text, style=style, markup=False)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
        """A table on stdout. Wide cells wrap, nothing is cut off; in a pipe the rows are tab-separated."""
        if not sys.stdout.isatty() or not self.out.is_terminal:
            self.raw("\t".join(columns))
            for row in rows:
                self.raw("\t".join(_cell(c) for c in row))
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in map(_cell, row)))
        self.out.print(table)

    def fields(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Aligned `name  value` lines on stdout."""
        rows = [(k, _cell(v)) for k, v in pairs]
        width = max((len(k) for k, _ in rows), default=0)
        for key, value in rows:
            self.raw(f"{key.ljust(width)}  {value}")

    def text(self, text: str) -> None:
        """Plain text on stdout, never wrapped or marked up."""
        self.raw(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Progress of something that takes over a second: a live line on a terminal, plain lines elsewhere."""
        if self.json:
            yield SilentProgress()
        elif self.live:
            with _live_progress(self.err, title) as shown:
                yield shown
        else:
            yield _PlainProgress(self, title)


class _PlainProgress:
    """A line a stage, and one at each tenth of a known total."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._text = title
        self._tenth = -1

    def step(self, text: str) -> None:
        self._text, self._tenth = text, -1
        self._console.say(f"{self._title}: {text}" if text != self._title else text)

    def update(self, done: int, total: int | None = None) -> None:
        if not total:
            return
        tenth = 10 * done // total
        if tenth > self._tenth:
            self._tenth = tenth
            self._console.say(f"{self._title}: {self._text}: {10 * tenth}% of {size(total)}")


@contextmanager
def _live_progress(err: RichConsole, title: str) -> Iterator[Progress]:
    """One line: what is done and for how long; with a bar, bytes and speed while the whole is known."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class OfKnown(ProgressColumn):
        def __init__(self, column: ProgressColumn) -> None:
            super().__init__()
            self.column = column

        def render(self, task: Any) -> Any:
            return Text("") if task.total is None else self.column.render(task)

    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *map(OfKnown, (BarColumn(bar_width=24), DownloadColumn(binary_units=True), TransferSpeedColumn())),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
    bars.add_task(title, total=None)
    (task,) = bars.tasks

    class Live:
        def step(self, text: str) -> None:
            task.total = None  # to `update`, None is no change
            task.finished_time = None  # the clock of a step whose bar was full would stand still, its spinner gone
            bars.update(task.id, description=f"{title}: {text}" if text != title else text, completed=0)

        def update(self, done: int, total: int | None = None) -> None:
            bars.update(task.id, completed=done, total=total)

    with bars:
        yield Live()


def size(count: int) -> str:
    """Bytes for people, in powers of 1024: `7.49 GiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _rich(*, stderr: bool) -> RichConsole:
    from rich.console import Console as RichConsole

    return RichConsole(stderr=stderr, highlight=False, soft_wrap=not (sys.stderr if stderr else sys.stdout).isatty())


def _abandon(stream: TextIO) -> None:
    """`qwen3emb … | head` closed the pipe: go on quietly, and let the interpreter's last flush succeed."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
