"""An instance that lives for one run of another command: `bench --profile`, a trial of `tune`.

It is `qwen3emb up` as a child, in a session of its own, so that Ctrl-C reaches this command alone, which then ends the
child. Should this command be killed, the kernel sends the child SIGTERM, and its engine goes with it.

Its folder goes as well, unless something failed: then its logs stay, for `qwen3emb logs NAME`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen3emb_launch.engine_process.guard import following
from qwen3emb_launch.errors import (
    EngineFailedError,
    Exit,
    InterruptedByUser,
    InvalidInputError,
    LaunchError,
    NetworkError,
    UnfitError,
)
from qwen3emb_launch.state import passing

END_WITHIN = 60.0  # seconds; the supervisor's own deadlines are shorter
COMMAND = (sys.executable, "-m", "qwen3emb_launch", "up")
AT_ONCE = 0.2  # seconds between two signals: equal ones that are pending become one
KINDS: Mapping[int, type[LaunchError]] = {
    Exit.INVALID: InvalidInputError,
    Exit.UNFIT: UnfitError,
    Exit.NETWORK: NetworkError,
}


@dataclass
class Temporary:
    """What runs: its `answer` is that of `up`. `failed`: its logs are worth keeping, though no error says so."""

    answer: Mapping[str, Any]
    failed: bool = False


@contextmanager
def serving(
    name: str,
    words: Sequence[str],
    within: float,
    *,
    environ: Mapping[str, str] | None = None,
    drain: bool = True,
    say: Callable[[str], None],
) -> Iterator[Temporary]:
    """`qwen3emb up --name NAME WORDS` once it serves; it is ended with the block. Without `drain`, at once.

    Where logs are kept, that is said, and an error that left the block has the engine's in its details. Raises the
    error that `up` reports, EngineFailedError `out_of_time` when it does not serve within so many seconds.
    """
    run = passing.begin(name)
    made: Temporary | None = None
    error: LaunchError | None = None
    try:
        with _child(["--name", name, *words], within, environ or {}, drain) as answer:
            made = Temporary(answer)
            yield made
    except LaunchError as raised:
        error = raised
        raise
    finally:
        log = run.end(failed=bool(made and made.failed) or _tells_of_the_engine(error))
        if log:
            say(f"{name}: its logs are kept: qwen3emb logs {name}")
        if log and error:
            error.details.setdefault("log", str(log))


def _tells_of_the_engine(error: LaunchError | None) -> bool:
    """Ctrl-C does not, nor what the user asked for wrongly, nor right answers that came too slowly."""
    others = isinstance(error, InterruptedByUser | InvalidInputError)
    return error is not None and not others and error.code != "slo_missed"


@contextmanager
def _child(words: Sequence[str], within: float, environ: Mapping[str, str], drain: bool) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [*COMMAND, *words, "--json"],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **environ},
        preexec_fn=following(signal.SIGTERM),
    )
    try:
        yield _answer(process, words, within)
    finally:
        _end(process, drain)


def _answer(process: subprocess.Popen[bytes], words: Sequence[str], within: float) -> dict[str, Any]:
    """The result in the envelope that `up` prints."""
    command = f"qwen3emb up {' '.join(words)}"
    line = _line(process, within)
    if line is None:
        raise EngineFailedError(
            "out_of_time", f"`{command}` did not serve within {within:.0f} s", "try it by itself: " + command
        )
    try:
        envelope = json.loads(line)
    except ValueError:
        envelope = {}
    if envelope.get("ok"):
        return dict(envelope.get("result") or {})
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_WITHIN)
    error = envelope.get("error") or {}
    found = KINDS.get(process.returncode or 0, EngineFailedError)(
        error.get("code", "start_failed"),
        f"`{command}`: {error.get('message', f'exit status {process.returncode}')}",
        error.get("hint") or f"try it by itself: {command}",
        error.get("details"),
    )
    found.result = envelope.get("result")
    raise found


def _line(process: subprocess.Popen[bytes], within: float) -> bytes | None:
    """The child's first line, what there is of it when the child ends, None when the time is over."""
    assert process.stdout is not None  # noqa: S101 - PIPE
    end = time.monotonic() + within
    fd, seen = process.stdout.fileno(), b""
    while b"\n" not in seen:
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            return None
        some = os.read(fd, 1 << 16)
        if not some:
            return seen
        seen += some
    return seen.partition(b"\n")[0]


def _end(process: subprocess.Popen[bytes], drain: bool) -> None:
    """Ended when this returns, whatever happens meanwhile; a second SIGTERM, or Ctrl-C here, means at once."""
    interrupted, again = False, not drain
    end = time.monotonic() + END_WITHIN
    process.terminate()
    while process.poll() is None:
        try:
            process.wait(AT_ONCE)
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                process.kill()  # its guard sees the pipe close and kills the engine
            elif again:
                process.terminate()
            again = False
        except KeyboardInterrupt:
            interrupted = again = True
    if process.stdout:
        process.stdout.close()
    if interrupted:
        raise KeyboardInterrupt
