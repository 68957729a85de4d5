"""The options of SGLang releases, recorded from their own argument parsers.

They stand in for an engine that is not installed: to explain a profile on a laptop, and to test every profile against
every release without installing 40 GB. An installed engine is always asked itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

from qwen3emb_launch.facts import EngineFacts, EngineFlag, Flavour, version_key

HERE = Path(__file__).resolve().parent
CPU = "0.5.15.post1"  # the recorded release that starts on a CPU


def versions() -> list[str]:
    """The recorded releases, oldest first."""
    return sorted((path.stem for path in HERE.glob("*.json")), key=version_key)


@cache
def flags(version: str) -> Mapping[str, EngineFlag]:
    """Every option of a recorded release."""
    data = json.loads((HERE / f"{version}.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: EngineFlag(name, seen["value"], tuple(seen.get("choices", ()))) for name, seen in data.items()}
    )


def engine(version: str, flavour: Flavour) -> EngineFacts:
    """A recorded release as an engine environment that is not installed."""
    environment = {"SGLANG_USE_CPU_ENGINE": "1"} if flavour == "cpu" else {}
    return EngineFacts(
        name=f"sglang {version} (not installed)",
        flavour=flavour,
        version=version,
        python=Path("python"),
        adopted=False,
        flags=flags(version),
        environment=environment,
    )
