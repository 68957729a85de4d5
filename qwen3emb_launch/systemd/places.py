"""Where unit files and their companions lie, and the folders that a system service keeps for itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.unit_text import Scope

USER = "qwen3emb"
HOME = "/var/lib/qwen3emb"
CACHE = "/var/cache/qwen3emb"
CONFIG = "/etc/qwen3emb"
TEMPLATE = "qwen3emb@.service"

# A system service's own folders: nothing of any person's, nothing of root's.
SYSTEM_FOLDERS: Mapping[str, str] = {
    "QWEN3EMB_DATA_DIR": f"{HOME}/data",
    "QWEN3EMB_STATE_DIR": f"{HOME}/state",
    "QWEN3EMB_CACHE_DIR": CACHE,
    "QWEN3EMB_CONFIG_DIR": CONFIG,
    "HF_HOME": f"{HOME}/huggingface",
    "XDG_CACHE_HOME": CACHE,
}


@dataclass(frozen=True)
class Places:
    """The folders of one scope. `root` goes before them: an image being built, a test."""

    scope: Scope
    root: Path = Path("/")

    def below(self, path: str) -> Path:
        """An absolute path below the root."""
        return self.root / path.lstrip("/")

    @property
    def units(self) -> Path:
        """Unit files of the administrator, or of this user."""
        if self.scope == "system":
            return self.below("/etc/systemd/system")
        config = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
        return self.below(f"{config}/systemd/user")

    @property
    def companions(self) -> dict[str, Path]:
        """Files beside the units, shared by all of them; none for a user."""
        if self.scope == "user":
            return {}
        return {
            "sysusers": self.below("/etc/sysusers.d/qwen3emb.conf"),
            "tmpfiles": self.below("/etc/tmpfiles.d/qwen3emb.conf"),
            "modules": self.below("/etc/modules-load.d/qwen3emb.conf"),
        }

    def unit(self, name: str) -> Path:
        """A unit's file."""
        return self.units / name

    def drop_ins(self, name: str) -> Path:
        """The folder of changes that no upgrade touches."""
        return self.units / f"{name}.d"


def unit_name(instance: str) -> str:
    """The unit of a named instance."""
    return f"qwen3emb-{instance}.service"
