"""The smoke test as a child process: the supervisor stays small, and a client library cannot hurt it.

The protocol lets the child load its libraries while the engine still loads its weights: it is started with the engine,
waits for one JSON line on stdin (CheckOrder), and prints one, `{"faults": [...], "warnings": [...], "report": ...}`.
No faults means that the endpoint may be called ready; warnings are told then. A child that reads the end of stdin
instead ends.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qwen3emb_launch.results import plain


@dataclass(frozen=True)
class CheckOrder:
    """What the child is told. `base_url` ends in /v1; `key` is the engine's API key, if any; `plan` is a file."""

    base_url: str
    model: str
    max_dims: int
    context_length: int
    key: str | None = None
    plan: str | None = None


@dataclass(frozen=True)
class CheckResult:
    """What came of it."""

    faults: tuple[str, ...]
    report: Any = None
    warnings: tuple[str, ...] = ()


class CheckProcess:
    """One smoke test: the child starts at construction, works at `begin`, and answers once through `tell`."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._child = subprocess.Popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )

    @property
    def pid(self) -> int:
        """The child's pid."""
        return self._child.pid

    def begin(self, order: CheckOrder, timeout: float, tell: Callable[[CheckResult], None]) -> None:
        """Let it work; `tell` is called from a thread within about `timeout` seconds."""
        line = json.dumps(plain(asdict(order))).encode() + b"\n"
        threading.Thread(target=self._work, args=(line, timeout, tell), name="check", daemon=True).start()

    def cancel(self) -> None:
        """End it; a running check answers with a fault."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe and not pipe.closed:
                pipe.close()

    def _work(self, line: bytes, timeout: float, tell: Callable[[CheckResult], None]) -> None:
        try:
            out, err = self._child.communicate(line, timeout)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.communicate()
            tell(CheckResult((f"the smoke test did not end within {timeout:g} s",)))
            return
        except (OSError, ValueError) as error:
            tell(CheckResult((f"the smoke test could not be run: {error}",)))
            return
        try:
            answer = json.loads(out.splitlines()[-1])
            tell(CheckResult(tuple(answer["faults"]), answer.get("report"), tuple(answer.get("warnings", ()))))
        except (ValueError, KeyError, IndexError, TypeError):
            words = err.decode(errors="replace").strip().splitlines()
            last = words[-1] if words else "it said nothing"
            tell(CheckResult((f"the smoke test broke (status {self._child.returncode}): {last}",)))
