"""The engine's keys: made anew for each start, handed over in a private file, never in a command line.

SGLang's routes for weight updates, cache flushes and memory release are open to everyone who reaches its port unless an
admin key is set. `--config FILE` merges a YAML file into its flags; JSON is YAML.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECRET_FLAGS = ("--api-key", "--admin-api-key")


@dataclass(frozen=True)
class Keys:
    """`api` is asked of every request (None: open), `admin` of the admin routes."""

    admin: str
    api: str | None = None

    def config(self) -> str:
        """The text of the file that `--config` names."""
        values = {"admin-api-key": self.admin} | ({"api-key": self.api} if self.api else {})
        return json.dumps(values) + "\n"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not appear in a log."""
        return tuple(k for k in (self.admin, self.api) if k)


def read_keys(file: Path) -> Keys | None:
    """The keys of the last start, from the file it was given; None where there is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return Keys(str(values["admin-api-key"]), values.get("api-key"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def take_keys(argv: Sequence[str], *, private: bool = False) -> tuple[tuple[str, ...], Keys]:
    """The argv without the keys a profile put there, and the keys: those, or fresh ones.

    The admin routes always get one. `private` engines, which only a gateway calls, ask one of every request: SGLang's
    open `/server_info` would tell everybody the admin key.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        flag, equals, value = item.partition("=")
        if flag in SECRET_FLAGS:
            found[flag] = value if equals else next(items, "")
        else:
            rest.append(item)
    # Hex: a value that begins with '-' would be taken for a flag.
    admin = found.get("--admin-api-key") or secrets.token_hex(24)
    api = found.get("--api-key") or (secrets.token_hex(24) if private else None)
    return tuple(rest), Keys(admin, api)
