"""The engine's python with torch and transformers imported once: the scripts that tests give it begin in a fork.

    ENGINE_PYTHON warm_python.py SOCKET            serves until its stdin ends; prints a line when it can be asked
    LAUNCHER_PYTHON warm_python.py SOCKET SCRIPT …   the script, as `ENGINE_PYTHON SCRIPT …` runs it

Each script is a process of its own, with the caller's stdin, stdout, stderr and environment; it ends with its caller.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

STREAMS = (0, 1, 2)


def ask(place: str, argv: list[str]) -> int:
    """Have the script run, and return its exit status."""
    order = json.dumps({"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        socket.send_fds(connection, [len(order).to_bytes(4, "big")], STREAMS)
        connection.sendall(order)
        return int(connection.recv(4) or b"1")


def serve(place: str) -> None:
    """Fork for whoever connects."""
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from transformers import AutoModel, AutoTokenizer  # noqa: F401

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
    """In the fork: become the script."""
    status = 1
    try:
        head, streams, _, _ = socket.recv_fds(connection, 4, len(STREAMS))
        with connection.makefile("rb") as rest:
            order = json.loads(rest.read(int.from_bytes(head, "big")))
        for number, given in zip(STREAMS, streams, strict=True):
            os.dup2(given, number)
            os.close(given)
        threading.Thread(target=lambda: (connection.recv(1), os._exit(1)), daemon=True).start()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        connection.send(str(status).encode())
        os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    serve(sys.argv[1])
