"""What `up` shows: a live line while an engine starts on a terminal, plain lines elsewhere, the endpoint when ready."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from qwen3emb_launch.console import Console
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.results import plain
from qwen3emb_launch.state import InstanceRecord
from qwen3emb_launch.up.serving import Serving, serving, snippet

if TYPE_CHECKING:
    from rich.progress import Progress


class UpView:
    """The terminal as a listener of the supervisor. `with view:` keeps its live line in order."""

    def __init__(self, console: Console, *, behind: bool = False) -> None:
        self._console = console
        self.behind = behind  # nobody reads stdout: whoever waits for ready prints the endpoint
        self._begin = time.monotonic()
        self._live: Progress | None = None
        self._answered = False  # the result was printed: with --json nothing more goes to stdout

    def __enter__(self) -> UpView:
        self._show("starting the engine")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hide()

    def moved(self, transition: Transition, record: InstanceRecord) -> None:
        """A change of state: one line, and the endpoint at the first ready."""
        if transition.after is State.STARTING:
            self._show("starting the engine again")
        elif transition.after is State.READY and not self._answered and not self.behind:
            self._hide()
            self._answered = True
            answer = serving(record)
            try:
                self._console.result(answer, lambda console: show_serving(console, answer))
            except LaunchError as error:  # a full disk behind stdout ends no service that works
                self._console.warn(error.message)
            self._console.say("Ctrl-C stops it.")
            return
        elif transition.after in (State.READY, State.FAILED, State.STOPPED):
            self._hide()
        self._say(f"{record.name}: {transition.after}: {transition.reason}")

    def said(self, text: str) -> None:
        """A line of talk."""
        self._say(text)

    def stage(self, text: str) -> None:
        """What the start is busy with."""
        if self._live:
            self._show(text)
        else:
            self._say(text)

    def failed(self, error: LaunchError) -> None:
        """The end, when it is not a good one: the engine's own last words, then what happened."""
        self._hide()
        show_last_lines(self._console, error)
        show_checks(self._console, error)
        console = Console("up") if self._answered else self._console
        console.failure(error, error.result)

    def _say(self, text: str) -> None:
        self._console.say(f"[{time.monotonic() - self._begin:6.1f} s] {text}")

    def _show(self, text: str) -> None:
        if not self._console.live:
            self._say(text)
        elif self._live:
            self._live.update(self._live.task_ids[0], description=text)
        else:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            words = TextColumn("{task.description}", markup=False)
            self._live = Progress(
                SpinnerColumn(), words, TimeElapsedColumn(), console=self._console.err, transient=True
            )
            self._live.add_task(text, total=None)
            self._live.start()

    def _hide(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def show_serving(console: Console, answer: Serving) -> None:
    """The endpoint and how to call it, for people."""
    took = f", ready in {answer.seconds:.1f} s" if answer.seconds else ""
    count = len(answer.engine_pids)
    behind = f", {count} engine{'s' * (count != 1)} behind the gateway" if answer.gateway else ""
    console.text(f"{answer.name} serves {answer.model} ({answer.max_dims} dims{behind}{took})")
    console.text(f"  {answer.base_url}\n")
    console.text(snippet(answer.base_url, answer.model, answer.max_dims, needs_key=answer.needs_key))
    console.text("")


def show_last_lines(console: Console, error: LaunchError) -> None:
    """The engine's own last words, before the error itself."""
    lines = error.details.get("last_lines") or []
    if lines:
        console.say(f"--- last lines of {error.details.get('log')}")
        for line in lines:
            console.say(f"  {line}")


def show_checks(console: Console, error: LaunchError) -> None:
    """The table of a verification, where that is what failed. With `--json` the envelope carries it."""
    report = plain(error.result)
    checks = report.get("checks") if isinstance(report, dict) else None
    if checks and not console.json:
        rows = [(c["title"], c["verdict"].upper(), c["expected"] or None, c["seen"] or None) for c in checks]
        console.table(("check", "verdict", "expected", "seen"), rows)
