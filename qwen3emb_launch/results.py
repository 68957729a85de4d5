"""The one JSON envelope that every finite command prints, on success and on failure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from qwen3emb_launch.errors import LaunchError

SCHEMA = 1


def plain(value: Any) -> Any:
    """Dataclasses, enums, paths, tuples and sets as JSON-ready data. NaN and infinities become None: JSON has none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        to_dict = getattr(value, "to_dict", None)
        return (
            plain(to_dict()) if to_dict else {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def success(command: str, result: Any) -> str:
    """The envelope of a command that did what it should."""
    return _dump({"schema": SCHEMA, "command": command, "ok": True, "result": plain(result)})


def failure(command: str, error: LaunchError, result: Any = None) -> str:
    """The envelope of a command that did not; `result` carries what there is (a failed check's table)."""
    body: dict[str, Any] = {"schema": SCHEMA, "command": command, "ok": False, "error": plain(error.to_dict())}
    if result is not None:
        body["result"] = plain(result)
    return _dump(body)


def _dump(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, allow_nan=False)
