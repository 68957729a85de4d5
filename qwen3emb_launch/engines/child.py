"""Running pip and python of an environment: line by line, to an end that is always reached.

The child gets SIGTERM from the kernel when this process dies, whatever way, and holds the environment's lock itself.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from qwen3emb_launch.engine_process.guard import following
from qwen3emb_launch.errors import UnfitError

_IDLE = 2.0  # seconds without a line
_STOP = 10.0  # seconds from SIGTERM to SIGKILL

# Settings that would send packages elsewhere than into the environment, or load others than its own.
_STRAY = ("PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON")


def clean_environment() -> dict[str, str]:
    """This process's environment, pip's settings included, without what would reach past the environment."""
    return {k: v for k, v in os.environ.items() if k not in _STRAY} | {"PYTHONNOUSERSITE": "1"}


def run(
    argv: Sequence[str | Path],
    env: dict[str, str],
    on_line: Callable[[str], None],
    deadline: float,
    hold: tuple[int, ...] = (),
    idle: Callable[[], None] | None = None,
) -> int:
    """Run a command, its stdout and stderr line by line to `on_line`; the exit status.

    `deadline` is seconds from now; `idle` is called every few seconds in which nothing was said. Raises UnfitError:
    `engine_timeout` when the deadline passes, `engine_python` when the command cannot be started. On Ctrl-C the child
    is stopped before KeyboardInterrupt goes on.
    """
    try:
        process = subprocess.Popen(
            [str(word) for word in argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=hold,
            start_new_session=True,  # Ctrl-C reaches it through us, once
            preexec_fn=following(signal.SIGTERM),
        )
    except OSError as exc:
        raise UnfitError(
            "engine_python", f"cannot run {argv[0]}: {exc.strerror or exc}", "qwen3emb engine list shows what there is"
        ) from exc
    try:
        _read(process, on_line, time.monotonic() + deadline, idle or (lambda: None))
        return process.wait()
    except TimeoutError:
        raise UnfitError(
            "engine_timeout",
            f"`{' '.join(str(word) for word in argv[:4])} …` did not end within {deadline:.0f} s",
            "run the same command again: what is there is kept",
        ) from None
    finally:
        _stop(process)


def _read(
    process: subprocess.Popen[bytes], on_line: Callable[[str], None], until: float, idle: Callable[[], None]
) -> None:
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    stream = process.stdout
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if not selector.select(min(_IDLE, left)):
                idle()
                continue
            chunk = os.read(stream.fileno(), 65536)
            # pip ends a progress line with \r on some terminals
            *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
            for line in lines:
                on_line(line.decode("utf-8", "replace"))
            if not chunk:
                if rest:
                    on_line(rest.decode("utf-8", "replace"))
                return


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()
