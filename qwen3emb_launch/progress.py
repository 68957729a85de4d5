"""What adapters report long work to. They never know whether anybody sees it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Work in stages, each with an amount done in its own unit (bytes, where not said otherwise)."""

    def step(self, text: str) -> None:
        """A new stage began."""

    def update(self, done: int, total: int | None = None) -> None:
        """The stage's amount done so far; `total` None while it is unknown."""


class SilentProgress:
    """Progress that nobody watches: `--json`, tests."""

    def step(self, text: str) -> None:
        """Nothing to show."""

    def update(self, done: int, total: int | None = None) -> None:
        """Nothing to show."""
