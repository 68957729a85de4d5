"""systemd itself, through `systemctl` and its companions."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3emb_launch.errors import CheckFailedError, UnfitError
from qwen3emb_launch.unit_text import Scope

DEADLINE = 30.0  # seconds, for everything but a stop
SHOWN = (
    "Id,ActiveState,SubState,Result,StatusText,MainPID,NRestarts,MemoryCurrent,UnitFileState,"
    "ActiveEnterTimestamp,FragmentPath,DropInPaths,NeedDaemonReload"
)


@dataclass(frozen=True)
class Manager:
    """The service manager of one scope. Raises UnfitError `no_systemd`, `no_user_manager`, `needs_root`,
    CheckFailedError `systemctl_failed`."""

    scope: Scope

    def check(self) -> None:
        """Whether it is there and obeys this user."""
        if not shutil.which("systemctl"):
            raise UnfitError(
                "no_systemd",
                "there is no systemctl: this machine is not run by systemd",
                "qwen3emb up --detach, or write the files for another machine: qwen3emb systemd install --root DIR",
            )
        if self.scope == "system" and os.geteuid() != 0:
            raise UnfitError(
                "needs_root",
                "units of the system are root's to write",
                "sudo qwen3emb systemd install --system …, or a unit of your own: --user",
            )
        done = self._run(["systemctl", *self._scope, "show", "--property=Version"])
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip()
            if self.scope == "user":
                hint = f"log in as that user, or: sudo loginctl enable-linger {os.environ.get('USER', '$USER')}"
                raise UnfitError("no_user_manager", f"your own service manager does not answer: {said}", hint)
            raise UnfitError("no_systemd", f"systemd does not answer: {said}", "is it process 1 of this machine?")

    def do(self, *words: str, patience: float = DEADLINE) -> str:
        """`systemctl WORDS`; its output."""
        return self._must(["systemctl", *self._scope, "--no-pager", *words], patience)

    def tool(self, *words: str) -> str:
        """One of systemd's other programs: systemd-sysusers, systemd-tmpfiles."""
        return self._must(words, DEADLINE)

    def show(self, unit: str) -> dict[str, str]:
        """A unit's properties; an unknown unit has them too, empty."""
        text = self.do("show", f"--property={SHOWN}", "--", unit)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def loaded(self, pattern: str) -> list[str]:
        """Units in memory whose name matches: the instances of a template."""
        lines = self.do("list-units", "--all", "--plain", "--no-legend", "--type=service", "--", pattern).splitlines()
        return [line.split()[0] for line in lines if line.split()]

    @property
    def _scope(self) -> list[str]:
        return ["--user"] if self.scope == "user" else []

    def _must(self, words: Sequence[str], patience: float) -> str:
        done = self._run(words, patience)
        if done.returncode != 0:
            said = done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}"
            raise CheckFailedError("systemctl_failed", f"{' '.join(words)}: {said}", "journalctl -xe says more")
        return done.stdout

    def _run(self, words: Sequence[str], patience: float = DEADLINE) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=patience, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise CheckFailedError(
                "systemctl_failed", f"{' '.join(words)} did not end within {patience:g} s", "systemctl list-jobs"
            ) from error
        except OSError as error:
            raise UnfitError("no_systemd", f"{words[0]} cannot be run: {error}", "is systemd installed?") from error
