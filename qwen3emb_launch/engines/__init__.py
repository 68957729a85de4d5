"""Engine environments: where SGLang lives, apart from the launcher. Built by pip from a lock, or adopted.

`find()` is what a launch asks; `install()` makes sure there is one. Nothing here imports SGLang: its environment's
python is started instead, and what it said is kept.
"""

from __future__ import annotations

from qwen3emb_launch.engines.installer import Installed, install
from qwen3emb_launch.engines.registry import (
    CheckReport,
    EnvironmentStatus,
    check,
    default_flavour,
    environments,
    find,
    remove,
    status,
)

__all__ = [
    "CheckReport",
    "EnvironmentStatus",
    "Installed",
    "check",
    "default_flavour",
    "environments",
    "find",
    "install",
    "remove",
    "status",
]
