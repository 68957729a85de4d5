"""Asking an environment's python what it is: once, then kept in the record."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qwen3emb_launch.engines import child
from qwen3emb_launch.engines.record import Inspection
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.facts import EngineFlag, Flavour

SCRIPT = Path(__file__).resolve().parents[1] / "engine_scripts" / "inspect_engine.py"
DEADLINE = 300.0  # seconds; 10 s warm on 2 cores, minutes from a cold disk
NEEDED = ("--model-path", "--is-embedding", "--host", "--port")  # an engine without these cannot be launched by us


def inspect(python: Path, flavour: Flavour | None, plugin_path: Path | None = None) -> Inspection:
    """Start python there and read its report.

    Raises UnfitError: `engine_python` (it does not run), `engine_timeout`, `not_an_engine` (no sglang there),
    `engine_broken` (something fails to import, with the import's own error).
    """
    env = child.clean_environment() | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if plugin_path:
        env["PYTHONPATH"] = str(plugin_path)
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qwen3emb-inspect-") as scratch:
        report = Path(scratch) / "report.json"
        status = child.run([python, SCRIPT, report, flavour or "auto"], env, said.append, DEADLINE)
        try:
            raw = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            tail = "\n".join(f"    {line}" for line in said[-8:])
            raise UnfitError(
                "engine_python",
                f"{python} exited with {status} before it could report. It said:\n{tail}",
                "is it a Python 3.10 or later that runs on this machine?",
            ) from None
    return understand(raw, python)


def understand(raw: Mapping[str, object], python: Path) -> Inspection:
    """The script's report as data; UnfitError (`not_an_engine`, `engine_broken`) when it tells of no usable engine."""
    packages = raw.get("packages")
    if not isinstance(packages, dict) or "sglang" not in packages:
        raise UnfitError(
            "not_an_engine",
            f"{python} has no sglang installed",
            "qwen3emb engine install builds an environment with it",
        )
    if raw["error"]:
        raise UnfitError(
            "engine_broken",
            f"sglang {packages['sglang']} of {python} does not import: {raw['error']}",
            "qwen3emb engine check shows more; qwen3emb engine install repairs what it built",
        )
    options: Mapping[str, Mapping[str, object]] = raw["flags"]  # type: ignore[assignment]
    flags = {
        name: EngineFlag(name, bool(f["takes_value"]), tuple(f["choices"]))  # type: ignore[arg-type]
        for name, f in options.items()
    }
    missing = [name for name in NEEDED if name not in flags]
    if missing:
        raise UnfitError(
            "engine_broken", f"sglang {packages['sglang']} of {python} lacks {', '.join(missing)}", "another release?"
        )
    return Inspection(
        flavour=raw["flavour"],  # type: ignore[arg-type]
        version=packages["sglang"],
        python_version=str(raw["python_version"]),
        dist_info=str(raw["dist_info"]),
        stamp=int(raw["stamp"]),  # type: ignore[call-overload]
        packages=packages,
        flags=flags,
        device=raw["device"],  # type: ignore[arg-type]
        plugins=raw["plugins"],  # type: ignore[arg-type]
    )


def fresh(inspection: Inspection) -> bool | None:
    """Whether the inspected sglang is still the one installed; None when there is none there any more."""
    try:
        return Path(inspection.dist_info).stat().st_mtime_ns == inspection.stamp
    except OSError:
        return None
