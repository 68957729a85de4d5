"""The engine's python with its packages imported once: the scripts that tests give it begin in a fork.

    ENGINE_PYTHON warm_python.py SOCKET MODULES     imports them (a,b), then serves until its stdin ends; prints a line
                                                    when it can be asked
    LAUNCHER_PYTHON warm_python.py ask SOCKET SCRIPT …   the script, as `ENGINE_PYTHON SCRIPT …` runs it

Each script is a process of its own, with the caller's stdin, stdout, stderr and environment; it ends with its caller.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

STREAMS = (0, 1, 2)
PR_SET_PDEATHSIG = 1


@contextmanager
def warm(python: Path, folder: Path, modules: Sequence[str], environ: Mapping[str, str]) -> Iterator[Path]:
    """A program that runs scripts as `python` does, in forks of one that imported `modules` under `environ`."""
    program, place = folder / "python", folder / "socket"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} ask {place} "$@"\n')
    program.chmod(0o755)
    command = [str(python), __file__, str(place), ",".join(modules)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**os.environ, **environ}, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield program
        process.stdin.close()


def ask(place: str, argv: list[str]) -> int:
    """Have the script run, and return its exit status."""
    order = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        socket.send_fds(connection, [len(order).to_bytes(4, "big")], STREAMS)
        connection.sendall(order)
        return int(connection.recv(4) or b"1")


def serve(place: str, modules: list[str]) -> None:
    """Fork for whoever connects."""
    gc.disable()  # modules are no garbage
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        os.write(1, b"ready\n")
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _run(connection)
            connection.close()


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


def _run(connection: socket.socket) -> None:
    """In the fork: have the script run in another, which it ends as it likes, and tell the caller its exit status."""
    head, streams, _, _ = socket.recv_fds(connection, 4, len(STREAMS))
    with connection.makefile("rb") as rest:
        order = json.loads(rest.read(int.from_bytes(head, "big")))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(order, streams)
    for given in streams:
        os.close(given)
    threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()
    connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def _become(order: dict[str, Any], streams: list[int]) -> NoReturn:
    """In the fork's fork: be the script, for as long as the fork is there."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for number, given in zip(STREAMS, streams, strict=True):
            os.dup2(given, number)
            os.close(given)
        os.environ.clear()
        os.environ.update(order["env"])
        os.chdir(order["cwd"])
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = order["argv"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - whatever ends a script is told on its stderr
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
    serve(sys.argv[1], sys.argv[2].split(","))
