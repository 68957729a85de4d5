"""Profiles on disk: the shipped ones, and the user's own, which win over shipped ones of the same name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError, nearest
from qwen3emb_launch.paths import paths, shipped_profiles
from qwen3emb_launch.profile_text import parse_profile

if TYPE_CHECKING:
    from qwen3emb_launch.profile import Profile

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ProfileFile:
    """One profile found. `shadows` is the shipped file it hides; `profile` is None where `error` says why not."""

    name: str
    path: Path
    origin: Literal["shipped", "user"]
    shadows: Path | None
    profile: Profile | None
    error: InvalidInputError | None = None


def load(name: str) -> Profile:
    """A profile by name (`h100`), with a variant (`rtx4090:lean`), or by path (`./mine.yaml`, `./mine.yaml:lean`).

    Raises InvalidInputError: `unknown_profile`, `unknown_variant`, `profile_unreadable`, and what parse_profile raises.
    """
    base, variant = split_variant(name)
    path = find(base)
    profile = parse_profile(read(path), str(path))
    if path.stem != profile.name and not _is_path(base):
        raise InvalidInputError(
            "bad_profile", f"{path}: it calls itself {profile.name}", f"rename the file, or say `name: {path.stem}`"
        )
    if variant is None:
        return profile
    if variant not in profile.variants:
        known = ", ".join(profile.variants) or "none"
        guess = nearest(variant, list(profile.variants), cutoff=0.4)
        raise InvalidInputError(
            "unknown_variant",
            f"profile {profile.name} has no variant {variant!r}; it has: {known}",
            f"did you mean {base}:{guess}?" if guess else f"qwen3emb profiles show {base}",
        )
    return profile.variant(variant)


def split_variant(name: str) -> tuple[str, str | None]:
    """`rtx4090:lean` as (rtx4090, lean)."""
    base, colon, variant = name.rpartition(":")
    return (base, variant) if colon and base and "/" not in variant else (name, None)


def find(name: str) -> Path:
    """The file of a profile, by name or path."""
    if _is_path(name):
        return Path(name).expanduser()
    for folder in (paths().profiles, shipped_profiles()):
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if re.fullmatch(r"[\w.-]+", name) and path.is_file():
                return path
    known = [entry.stem for entry in _files()]
    guess = nearest(name.lower(), known, cutoff=0.5)
    raise InvalidInputError(
        "unknown_profile",
        f"no profile {name!r}; there are {', '.join(sorted(set(known)))}",
        f"did you mean {guess}?" if guess else "qwen3emb profiles list shows them; a file is given by its path",
        {"nearest": guess},
    )


def _is_path(name: str) -> bool:
    return "/" in name or name.endswith(SUFFIXES)


def read(path: Path) -> str:
    """A profile's text. Raises InvalidInputError `profile_unreadable`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        reason = f"not UTF-8 text (byte {exc.start})"
    except OSError as exc:
        reason = exc.strerror or str(exc)
    raise InvalidInputError(
        "profile_unreadable", f"{path}: {reason}", "qwen3emb profiles list shows the profiles there are"
    )


def _files() -> list[Path]:
    """Every profile file, the user's first."""
    found: list[Path] = []
    for folder in (paths().profiles, shipped_profiles()):
        if folder.is_dir():
            found += sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    return found


def available() -> list[ProfileFile]:
    """Every profile by name, the user's own in place of shipped ones. A broken one is listed with its error."""
    shipped_folder = shipped_profiles()
    entries: dict[str, ProfileFile] = {}
    for path in _files():
        name = path.stem
        origin: Literal["shipped", "user"] = "shipped" if path.parent == shipped_folder else "user"
        if name in entries:
            mine = entries[name]
            if origin == "shipped":
                entries[name] = ProfileFile(name, mine.path, mine.origin, path, mine.profile, mine.error)
            continue
        try:
            entries[name] = ProfileFile(name, path, origin, None, parse_profile(read(path), str(path)))
        except InvalidInputError as error:
            entries[name] = ProfileFile(name, path, origin, None, None, error)
    return [entries[name] for name in sorted(entries)]


def profiles() -> list[Profile]:
    """Every profile that can be read, for matching against a GPU: the user's own first."""
    entries = sorted(available(), key=lambda entry: entry.origin != "user")
    return [entry.profile for entry in entries if entry.profile is not None]


def create(name: str, *, source: str, model: str | None = None) -> Path:
    """Write a profile of the user's own as a copy of `source`, comments kept, evidence dropped.

    Raises InvalidInputError (`bad_profile_name`, `profile_exists`, and what `load` raises), UnfitError for the disk.
    """
    from qwen3emb_launch.files import write_atomic
    from qwen3emb_launch.profile import NAME

    if not re.fullmatch(NAME, name):
        raise InvalidInputError(
            "bad_profile_name",
            f"{name!r} cannot name a profile: small letters, digits, dots, dashes and underscores",
            "qwen3emb profiles new my-rtx4090 --from rtx4090",
        )
    target = paths().profiles / f"{name}.yaml"
    if target.exists():
        raise InvalidInputError("profile_exists", f"{target} is there already", f"edit it, or: rm {target}")
    base, variant = split_variant(source)
    if variant is None:
        text = _renamed(read(find(base)), name, model)
    else:
        import yaml

        resolved = load(source).to_dict() | {"name": name, "evidence": "none"} | ({"model": model} if model else {})
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    parse_profile(text, str(target))
    try:
        write_atomic(target, text)
    except OSError as error:
        raise disk_error(error, target) from error
    return target


def _renamed(text: str, name: str, model: str | None) -> str:
    text = re.sub(r"(?m)^name:.*$", f"name: {name}", text, count=1)
    text = re.sub(r"(?ms)^evidence:.*?(?=^\S|\Z)", "evidence: none\n", text, count=1)
    if model is not None:
        line = f"model: {model}"
        replaced, count = re.subn(r"(?m)^model:.*$", lambda _: line, text, count=1)
        text = replaced if count else text + line + "\n"
    return text
