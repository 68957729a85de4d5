"""Every error this package raises on purpose, drawn as a tree.

    LaunchError                exit  code
     +- CheckFailedError         1   the check or operation failed
     +- InvalidInputError        2   a profile, flag, model name or file the user gave
     +- UnfitError               3   GPU, memory, disk, port or engine environment not fit
     +- EngineFailedError        4   the engine did not start, or died
     +- NetworkError             5   network or model hub
     +- InterruptedByUser      130   Ctrl-C

Adapters translate foreign exceptions at their seam and raise only these. `code` is a stable, machine-readable
word (`port_in_use`); `message` says what happened with the values seen; `hint` is the next thing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit statuses of the command line."""

    OK = 0
    FAILED = 1
    INVALID = 2
    UNFIT = 3
    ENGINE = 4
    NETWORK = 5
    INTERRUPTED = 130


class LaunchError(Exception):
    """Base of all deliberate errors.

    `details` is extra data for `--json` (never secrets); people see `message` and `hint`. `result` is what a failed
    command has to show all the same (a check's table); the shell puts it into the envelope.
    """

    exit: Exit = Exit.FAILED

    def __init__(self, code: str, message: str, hint: str = "", details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.details = dict(details or {})
        self.result: Any = None

    def to_dict(self) -> dict[str, Any]:
        """The `error` member of the JSON envelope."""
        out: dict[str, Any] = {"code": self.code, "message": self.message, "hint": self.hint}
        if self.details:
            out["details"] = self.details
        return out


class CheckFailedError(LaunchError):
    """The check or operation ran and its answer is no."""

    exit = Exit.FAILED


class InvalidInputError(LaunchError):
    """What the user gave cannot be used: usage, profile, flag, model name, file."""

    exit = Exit.INVALID


class UnfitError(LaunchError):
    """The surroundings are not fit: GPU, memory, disk, port, permissions, engine environment."""

    exit = Exit.UNFIT


class EngineFailedError(LaunchError):
    """The engine did not start, died, or answers wrongly."""

    exit = Exit.ENGINE


class NetworkError(LaunchError):
    """The network, the model hub or a remote endpoint did not answer as it should."""

    exit = Exit.NETWORK


class InterruptedByUser(LaunchError):  # noqa: N818 - an interruption is no error of anybody's
    """Ctrl-C, or SIGTERM to a command in the foreground."""

    exit = Exit.INTERRUPTED

    def __init__(self, message: str = "interrupted", hint: str = "the same command goes on from what is there") -> None:
        super().__init__("interrupted", message, hint)


def nearest(word: str, known: list[str] | tuple[str, ...] | set[str], cutoff: float = 0.6) -> str | None:
    """The known word closest to a mistyped one, or None when nothing is close."""
    from difflib import get_close_matches

    match = get_close_matches(word, sorted(known), n=1, cutoff=cutoff)
    return match[0] if match else None
