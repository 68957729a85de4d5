"""What a guarded engine process reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Spawned:
    """The engine's main process runs. It has not said anything yet."""

    pid: int


@dataclass(frozen=True)
class SpawnFailed:
    """The engine's executable could not be started."""

    error: str


@dataclass(frozen=True)
class Doomed:
    """The engine said that it is lost. It has not ended yet, and may take a minute to."""


@dataclass(frozen=True)
class Exited:
    """The main process ended: exit code, or minus the signal's number. Its remains are being killed."""

    status: int


@dataclass(frozen=True)
class Stuck:
    """SIGKILL was sent and these processes are still there (in the kernel, usually in a GPU driver)."""

    pids: tuple[int, ...]


@dataclass(frozen=True)
class Gone:
    """Nothing of the engine is left."""


@dataclass(frozen=True)
class GuardLost:
    """The guard itself ended without saying so: somebody killed it, and the kernel killed the engine with it."""

    error: str


ProcessEvent = Spawned | SpawnFailed | Doomed | Exited | Stuck | Gone | GuardLost
