"""The profile that a run ends with: the one it started from, the winner's settings, and the figures as evidence."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.files import write_atomic
from qwen3emb_launch.planning.ledger import read_setting, setting_keys
from qwen3emb_launch.tune.trials import Measurement, Moves, label

if TYPE_CHECKING:
    from qwen3emb_launch.facts import EngineFlag
    from qwen3emb_launch.profile import Profile

SIGNATURE = "# Written by `qwen3emb tune`"
SWITCHED_OFF = ("false", "no", "0", "off", "null", "")


@dataclass(frozen=True)
class Measured:
    """What the evidence says: the load, its figures, on what, and the words that measure it again."""

    figures: Measurement
    load: str
    command: str
    hardware: str
    versions: Mapping[str, str]
    day: date
    over_baseline: float | None = None


def check_target(path: Path, *, resume: bool = False) -> None:
    """Refuse a file that cannot hold a new profile. On --resume, one that `tune` wrote may be written again.

    Raises InvalidInputError `bad_profile_name`, `profile_exists`.
    """
    import re

    from qwen3emb_launch.profile import NAME

    if path.suffix not in (".yaml", ".yml") or not re.fullmatch(NAME, path.stem):
        raise InvalidInputError(
            "bad_profile_name",
            f"{path.name!r} cannot name a profile: small letters, digits, dots, dashes and underscores, then .yaml",
            "--out my-h100.yaml",
        )
    if path.exists() and not (resume and path.read_bytes().startswith(SIGNATURE.encode())):
        raise InvalidInputError("profile_exists", f"{path} is there already", f"another --out, or: rm {path}")


def profile_text(
    base: Profile,
    name: str,
    settings: Mapping[str, str],
    changed: Moves,
    measured: Measured,
    flags: Mapping[str, EngineFlag],
    model: str | None = None,
) -> str:
    """The new profile as YAML. `settings` are all overrides (fixed and won), `changed` those that won.

    Raises InvalidInputError (`bad_profile`, `bad_setting`) where they make no valid profile.
    """
    import yaml

    from qwen3emb_launch.profile_text import parse_profile

    data = base.to_dict() | {"name": name, "description": _description(base, changed)}
    data.pop("variants", None)
    if model is not None:
        data["model"] = model
    for key, text in settings.items():
        _set(data, key, text, flags)
    data["evidence"] = evidence(measured)
    text = f"{SIGNATURE}: {measured.load}; {measured.day}.\n"
    text += yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    parse_profile(text, name)
    return text


def save(path: Path, text: str) -> None:
    """Write the profile whole or not at all. Raises UnfitError."""
    try:
        write_atomic(path, text, mode=0o644)
    except OSError as error:
        raise disk_error(error, path) from error


def evidence(measured: Measured) -> list[dict[str, Any]]:
    """The figures in a profile's form."""
    figures = measured.figures
    rows: list[tuple[str, float | None, str]] = [
        (measured.load, figures.texts_per_s, "texts/s"),
        (f"{measured.load}: p95", figures.p95, "ms"),
        (f"{measured.load}: memory", None if figures.memory_bytes is None else figures.memory_bytes / 1e9, "GB"),
        (f"{measured.load}: score over the profile tuned", measured.over_baseline, "times"),
    ]
    return [
        {
            "what": what,
            "value": float(f"{value:.4g}"),
            "unit": unit,
            "hardware": measured.hardware,
            "versions": dict(measured.versions),  # its own copy: YAML would write an alias, which profiles do not have
            "date": measured.day.isoformat(),
            "command": measured.command,
        }
        for what, value, unit in rows
        if value is not None
    ]


def again(profile: str, load: Mapping[str, Any], level: float, open_loop: bool, seconds: float) -> str:
    """The command that measures the profile's figures again."""
    words = ["qwen3emb", "bench", "--profile", profile, "--rate" if open_loop else "--concurrency", f"{level:g}"]
    words += ["--batch", str(load["batch"])]
    words += ["--corpus", str(load["corpus"])] if load.get("corpus") else ["--tokens", str(load["tokens"])]
    words += ["--dims", str(load["dims"])] if load.get("dims") else []
    return shlex.join([*words, "--duration", f"{seconds:g}s", "--rounds", "5"])


def _description(base: Profile, changed: Moves) -> str:
    return (
        f"{base.description}; tuned: {label(changed)}" if changed else f"{base.description}; measured, nothing changed"
    )


def _set(data: dict[str, Any], key: str, text: str, flags: Mapping[str, EngineFlag]) -> None:
    """One override where a profile has its place: settings, a part, the environment, an option of the engine."""
    from qwen3emb_launch.profile import Profile

    if key.startswith("env."):
        data["env"] = {**data.get("env", {}), key.removeprefix("env."): text}
        return
    known = key if "." in key else key.replace("-", "_")
    if known in setting_keys():
        part, _, name = known.rpartition(".")
        place = part or ("" if known in Profile.model_fields else "settings")
        value = read_setting(known, text, f"{key}={text}")
        inner = dict(data.get(place, {})) if place else data
        if value is None:
            inner.pop(name, None)
        else:
            inner[name] = list(value) if isinstance(value, tuple) else value
        if place:
            data[place] = inner
        return
    flag = f"--{key.replace('_', '-')}"
    words = [w for w in data.get("extra_args", []) if w.partition("=")[0] != flag]
    if flags[flag].takes_value:
        words += [f"{flag}={text}"] if text else []
    elif text.lower() not in SWITCHED_OFF:
        words.append(flag)
    data["extra_args"] = words
