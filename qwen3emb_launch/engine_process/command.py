"""What to start: the engine's command as the guard needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROTATE_BYTES = 32 << 20
ROTATE_KEEP = 2  # older pieces kept beside the current one: 96 MiB a start at most


@dataclass(frozen=True)
class EngineCommand:
    """One engine start. `argv[0]` is a path; `env` is the whole environment; `secrets` never reach the log; `fds` are
    descriptors of this process that the engine gets under the same numbers; `sign` is what it says when it is lost,
    where it takes its time to end then; `scratch` is a folder that goes with it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    cwd: Path = Path("/")
    secrets: tuple[str, ...] = ()
    rotate_bytes: int = ROTATE_BYTES
    rotate_keep: int = ROTATE_KEEP
    fds: tuple[int, ...] = ()
    sign: str = ""
    scratch: Path | None = None

    def order(self) -> dict[str, Any]:
        """The guard's first line of input."""
        return {
            "argv": list(self.argv),
            "env": dict(self.env),
            "cwd": str(self.cwd),
            "log": str(self.log),
            "secrets": list(self.secrets),
            "rotate_bytes": self.rotate_bytes,
            "rotate_keep": self.rotate_keep,
            "fds": list(self.fds),
            "sign": self.sign,
            "scratch": str(self.scratch or ""),
        }
