"""`python -m qwen3emb_launch` and the `qwen3emb` script."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; the exit status is the command's."""
    _open_closed_streams()
    try:
        from qwen3emb_launch.cli.app import run
    except KeyboardInterrupt:
        raise SystemExit(130) from None

    raise SystemExit(run())


def _open_closed_streams() -> None:
    """Give a standard stream that the shell closed (`>&-`) to /dev/null: else the next file opened takes its number."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)  # `up` becomes its supervisor, which would find it closed again
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115 - stays open


if __name__ == "__main__":
    main()
