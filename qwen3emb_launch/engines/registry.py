"""The environments there are: finding the one to launch, listing, checking, removing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3emb_launch import gpu
from qwen3emb_launch.engines import build, inspection, integrity, record, toolkit
from qwen3emb_launch.engines.record import Record
from qwen3emb_launch.errors import InvalidInputError, LaunchError, UnfitError, nearest
from qwen3emb_launch.facts import EngineFacts, Flavour, version_key
from qwen3emb_launch.progress import Progress, SilentProgress


@dataclass(frozen=True)
class EnvironmentStatus:
    """One environment as `engine list` shows it. `partial` was begun and never ended; `reason` says what is broken."""

    name: str
    state: Literal["complete", "partial", "broken"]
    flavour: Flavour | None
    version: str | None
    python: Path | None
    python_version: str | None
    plugin: str | None
    adopted: bool
    size_bytes: int | None
    installed_at: float | None
    reason: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """What `engine check` found. `damage` lists packages whose files are missing or cut off."""

    ok: bool
    status: EnvironmentStatus
    packages: dict[str, str]
    plugins: dict[str, str | None]
    device: dict[str, Any]
    environment: dict[str, str]
    flags: dict[str, Any]
    damage: tuple[str, ...]
    error: str | None
    hint: str  # how to mend it; empty when all is well


def default_flavour() -> Flavour:
    """`cuda` where an NVIDIA GPU is found, else `cpu`."""
    return "cuda" if gpu.inventory() else "cpu"


def find(flavour: Flavour | None = None, name: str | None = None) -> EngineFacts:
    """The environment to launch: the named one, or the newest complete one of the flavour.

    Reads one small file a candidate and starts nothing, unless the environment's sglang was replaced since it was
    looked at: then it is inspected anew (about 10 s). Without a flavour, cuda goes before cpu where there is a GPU.

    Raises UnfitError: `engine_missing`, `engine_incomplete`, `engine_broken`; InvalidInputError: `unknown_engine`,
    `engine_flavour`.
    """
    if name is not None:
        found = _named(name)
        if flavour and found.flavour != flavour:
            raise InvalidInputError(
                "engine_flavour",
                f"environment {name!r} is of flavour {found.flavour}, not {flavour}",
                "qwen3emb engine list",
            )
        return facts(_current(found))
    complete = [r for r in map(record.load, record.names()) if r]
    wanted = [r for r in complete if flavour in (None, r.flavour)]
    usable = [r for r in wanted if not trouble(r)]
    if usable:
        preferred = flavour or (default_flavour() if len({r.flavour for r in usable}) > 1 else usable[0].flavour)
        choice = [r for r in usable if r.flavour == preferred]
        best = max(choice, key=lambda r: (version_key(r.inspection.version), r.installed_at))
        return facts(_current(best))
    if wanted:
        raise _broken(wanted[0], trouble(wanted[0]) or "")
    kind = flavour or default_flavour()
    raise UnfitError("engine_missing", f"no {kind} engine environment is installed", f"qwen3emb engine install {kind}")


def environments() -> list[EnvironmentStatus]:
    """Every environment, complete or not, by name."""
    return [status(name) for name in record.names()]


def status(name: str) -> EnvironmentStatus:
    """One environment's standing, from what is on disk; starts nothing."""
    found = record.load(name)
    if found is None:
        size = build.disk_usage(record.folder(name))
        reason = f"never completed: `{build_again(name)}` goes on"
        return EnvironmentStatus(name, "partial", None, None, None, None, None, False, size, None, reason)
    wrong = trouble(found)
    return EnvironmentStatus(
        name=name,
        state="broken" if wrong else "complete",
        flavour=found.flavour,
        version=found.inspection.version,
        python=found.python,
        python_version=found.inspection.python_version,
        plugin=found.plugin,
        adopted=found.adopted,
        size_bytes=found.size_bytes,
        installed_at=found.installed_at,
        reason=wrong,
    )


def check(name: str | None = None, progress: Progress | None = None) -> CheckReport:
    """Look at every file and start the environment's python; the record then says what was found.

    Without a name, the one `find()` would choose. `ok` False is an answer, not an exception.
    """
    shown = progress or SilentProgress()
    found = _named(name) if name else _default_record()
    with record.locked(found.name, shown, wait=60.0):
        damage: tuple[str, ...] = ()
        if not found.adopted:  # in somebody's image, stripped files are no damage
            shown.step("looking at every file")
            damage = tuple(map(str, integrity.damages(found.inspection.site_packages)))
        shown.step("starting its python")
        error = None
        try:
            seen = inspection.inspect(found.python, found.flavour, found.plugin_path)
            found = found.with_(inspection=seen)
        except LaunchError as exc:
            error = exc.message
        wrong = error or (damage[0] if damage else None)
        found = found.with_(broken=wrong)
        record.save(found)
    told = facts(found)
    return CheckReport(
        ok=wrong is None,
        status=status(found.name),
        packages=dict(told.packages),
        plugins=dict(found.inspection.plugins),
        device=dict(found.inspection.device),
        environment={k: v for k, v in told.environment.items() if k != "PATH"},
        flags=dict(told.flags),
        damage=damage,
        error=error,
        hint="" if wrong is None else _mend(found),
    )


def remove(name: str, progress: Progress | None = None) -> EnvironmentStatus:
    """Remove an environment; of an adopted one only the record. Refused while a process runs from it.

    It is gone at once; deleting its files can take minutes, and what an interruption leaves the next install deletes.
    """
    if name not in record.names():
        raise _unknown(name)
    with record.locked(name, SilentProgress(), wait=0.0):
        before = status(name)
        folder = record.folder(name)
        busy = build.users(folder)
        if busy:
            raise UnfitError(
                "engine_in_use",
                f"environment {name!r} is in use by process {', '.join(map(str, busy))}",
                "stop it first: qwen3emb down",
                {"pids": busy},
            )
        with record.translated(folder):
            going = folder.with_name(f"{record.going(name)}{os.getpid()}")
            folder.rename(going)
            what = "forgetting it; its own files stay" if before.adopted else "deleting its files"
            (progress or SilentProgress()).step(what)
            shutil.rmtree(going)
    return before


def facts(found: Record) -> EngineFacts:
    """The record as everybody else uses it. The environment is worked out now: PATH and CUDA_HOME are today's."""
    seen = found.inspection
    return EngineFacts(
        name=found.name,
        flavour=found.flavour,
        version=seen.version,
        python=found.python,
        adopted=found.adopted,
        flags=seen.flags,
        environment=toolkit.launch_environment(
            found.flavour,
            found.python,
            seen.site_packages,
            record.folder(found.name),
            seen.device.get("cuda_build"),
            found.plugin_path,
        ),
        packages={k: v for k, v in seen.packages.items() if k != "sglang"},
        plugin=found.plugin,
    )


def trouble(found: Record) -> str | None:
    """Why this environment cannot be used, from a few stat calls and the last check; None when it can."""
    if not os.access(found.python, os.X_OK):
        return f"its python is gone: {found.python}"
    if inspection.fresh(found.inspection) is None and not found.adopted:
        return f"its sglang is gone: {found.inspection.dist_info}"
    return found.broken


def build_again(name: str) -> str:
    """The command that completes or repairs the environment of this name."""
    note = record.read_note(name)
    if note is None:
        return "qwen3emb engine install"
    flavour, version = note
    extra = "" if name == flavour else f" --version {version} --name {name}"
    return f"qwen3emb engine install {flavour}{extra}"


def _named(name: str) -> Record:
    if name not in record.names():
        raise _unknown(name)
    found = record.load(name)
    if found is None:
        raise UnfitError("engine_incomplete", f"environment {name!r} was never completed", build_again(name))
    return found


def _default_record() -> Record:
    """The record behind find(), a broken one too: checking is how it gets mended."""
    complete = [r for r in map(record.load, record.names()) if r]
    if not complete:
        find()
    preferred = [r for r in complete if r.flavour == default_flavour()] or complete
    return max(preferred, key=lambda r: (not trouble(r), version_key(r.inspection.version), r.installed_at))


def _current(found: Record) -> Record:
    """The record, with a new inspection if the environment's sglang is another by now."""
    wrong = trouble(found)
    if wrong:
        raise _broken(found, wrong)
    if inspection.fresh(found.inspection):
        return found
    with record.locked(found.name, SilentProgress(), wait=60.0):
        seen = inspection.inspect(found.python, found.flavour, found.plugin_path)
        renewed = found.with_(inspection=seen)
        record.save(renewed)
        return renewed


def _broken(found: Record, why: str) -> UnfitError:
    return UnfitError("engine_broken", f"environment {found.name!r} is broken: {why}", _mend(found))


def _mend(found: Record) -> str:
    if found.adopted:
        return f"mend it, then `qwen3emb engine check {found.name}`; or `qwen3emb engine remove {found.name}`"
    return f"{build_again(found.name)} repairs it"


def _unknown(name: str) -> InvalidInputError:
    known = record.names()
    guess = nearest(name, known)
    hint = f"did you mean {guess!r}? " if guess else ""
    there = ", ".join(known) or "none"
    return InvalidInputError(
        "unknown_engine", f"no engine environment {name!r} (there: {there})", f"{hint}qwen3emb engine list"
    )
