"""Where things live. Folders follow the platform's rules; each can be moved by one environment variable.

| what | default (Linux) | variable |
|---|---|---|
| data: engine environments, demo models, models from ModelScope | ~/.local/share/qwen3emb | QWEN3EMB_DATA_DIR |
| state: instances (plan, pid, lock, logs) | ~/.local/state/qwen3emb | QWEN3EMB_STATE_DIR |
| cache: parsed engine help, kernel caches, pip's partial downloads | ~/.cache/qwen3emb | QWEN3EMB_CACHE_DIR |
| config: the user's own profiles, tasks, prices | ~/.config/qwen3emb | QWEN3EMB_CONFIG_DIR |

Models from Hugging Face live in its own cache (HF_HOME), shared with every other tool on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

APP = "qwen3emb"


@dataclass(frozen=True)
class Paths:
    """The four folders, resolved once. Nothing is created here."""

    data: Path
    state: Path
    cache: Path
    config: Path

    @property
    def engines(self) -> Path:
        """One folder an engine environment."""
        return self.data / "engines"

    @property
    def demo_models(self) -> Path:
        """Checkpoints made locally with random weights."""
        return self.data / "demo-models"

    @property
    def models(self) -> Path:
        """Models from ModelScope, and a record of every download, wherever its files are."""
        return self.data / "models"

    @property
    def instances(self) -> Path:
        """One folder an instance: plan, record, events, lock, logs."""
        return self.state / "instances"

    @property
    def profiles(self) -> Path:
        """The user's own profiles; they win over the shipped ones of the same name."""
        return self.config / "profiles"


def paths(environ: Mapping[str, str] | None = None) -> Paths:
    """The folders for this user, environment variables first."""
    env = os.environ if environ is None else environ

    def folder(kind: str) -> Path:
        chosen = env.get(f"QWEN3EMB_{kind.upper()}_DIR")
        if chosen:
            return Path(chosen).expanduser().absolute()
        import platformdirs

        return Path(getattr(platformdirs, f"user_{kind}_path")(APP, appauthor=False))

    return Paths(data=folder("data"), state=folder("state"), cache=folder("cache"), config=folder("config"))


def shipped_profiles() -> Path:
    """The profiles folder of this installation: inside the wheel, or the repository's when installed editable."""
    package = Path(__file__).resolve().parent
    inside = package / "_profiles"
    return inside if inside.is_dir() else package.parent / "profiles"
