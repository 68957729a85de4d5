"""Which versions and parts are on, and whether a function is the one a part was written for."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

# A part has nothing to do on this machine: no reason for a warning.
NOT_NEEDED = "not needed here"

OLDEST, NEWEST = (0, 5, 14), (0, 5, 23)


def switched_on(part: str | None, default: bool = True) -> bool:
    """QWEN3EMB_PLUGIN_<PART> as 0 or 1; without a part, the whole plugin."""
    value = os.environ.get("QWEN3EMB_PLUGIN" if part is None else f"QWEN3EMB_PLUGIN_{part.upper()}", "")
    return default if value == "" else value not in ("0", "false", "off", "no")


def sglang_version() -> str:
    """The release installed here."""
    return version("sglang")


def misfit_of_version(found: str | None = None) -> str | None:
    """Why this SGLang release is outside the range whose sources were read, or None."""
    found = found or sglang_version()
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", found)
    key = tuple(int(part) for part in match.groups()) if match else (0,)
    if OLDEST <= key <= NEWEST or switched_on("any_version", default=False):
        return None
    return f"SGLang {found} is outside 0.5.14 ... 0.5.23"


def misfit(function: Callable[..., Any], parameters: str | None, *marks: str) -> str | None:
    """Why `function` is not the expected one: other parameters (space-separated names), or a mark not in its source."""
    name = getattr(function, "__qualname__", repr(function))
    found = " ".join(inspect.signature(function).parameters)
    if parameters is not None and found != parameters:
        return f"{name}({found}) instead of ({parameters})"
    if marks:
        source = inspect.getsource(function)
        for mark in marks:
            if mark not in source:
                return f"{name} does not contain `{mark}`"
    return None
