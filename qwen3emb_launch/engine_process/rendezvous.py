"""Where torch has the processes of an engine meet: for one of a single worker in memory, and at no port.

SGLang draws a free port, lets go of it, and seconds later torch listens there, on every address: another process may
have it by then, and other machines reach it. SGLang 0.5.14 to 0.5.23 take another place from
SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE; gloo, which listens where the host's name leads, takes an interface.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

PLACE = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
INTERFACE = "GLOO_SOCKET_IFNAME"
# Several workers may be on several machines, and have not been seen to meet here.
_SEVERAL = (
    "--tp-size", "--tensor-parallel-size", "--tp", "--pp-size", "--pipeline-parallel-size", "--dp-size",
    "--data-parallel-size", "--nnodes", "--dist-init-addr", "--nccl-init-addr",
)  # fmt: skip


class Rendezvous:
    """One place at a time; a file without a name, that is gone with this process."""

    def __init__(self) -> None:
        self._file: int | None = None

    def fresh(self, argv: Sequence[str]) -> dict[str, str]:
        """What the environment of the next start says; nothing for an engine of several workers.

        torch asks for a file that no start before has written to.
        """
        self.close()
        if not _alone(argv):
            return {}
        found = {INTERFACE: "lo"}
        with contextlib.suppress(OSError):  # no descriptors left, or no /proc: it meets at a port
            self._file = os.memfd_create("qwen3emb-rendezvous")
            path = f"/proc/{os.getpid()}/fd/{self._file}"
            os.close(os.open(path, os.O_RDWR))
            if _reached(Path(path).parent):
                found[PLACE] = f"file://{path}"
        return found

    def close(self) -> None:
        """Let go of the place."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _reached(folder: Path) -> bool:
    """Whether an engine of this user may open this process's descriptors.

    The kernel keeps them from it where they are root's (PR_SET_DUMPABLE), and where this process has capabilities that
    its children do not get, as those of a Python that may listen at ports below 1024 (setcap).
    """
    if os.geteuid() == 0:
        return True
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    held, handed = (int(fields.get(name, "0"), 16) for name in ("CapPrm", "CapAmb"))
    return folder.stat().st_uid == os.geteuid() and held & ~handed == 0


def _alone(argv: Sequence[str]) -> bool:
    for at, word in enumerate(argv):
        flag, joined, value = word.partition("=")
        if flag in _SEVERAL and (value if joined else "".join(argv[at + 1 : at + 2])) != "1":
            return False
    return True
