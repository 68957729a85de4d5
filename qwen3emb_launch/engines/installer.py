"""`engine install`: build an environment, or adopt one, so that it is used only once it is whole and was looked at."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen3emb_launch import gpu
from qwen3emb_launch.engines import inspection, record, registry, releases
from qwen3emb_launch.engines.build import Builder, disk_usage, environment_python, remove_others, users
from qwen3emb_launch.engines.plugin import PluginWheel, plugin_wheel, unpack
from qwen3emb_launch.engines.record import Record
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import EngineFacts, Flavour
from qwen3emb_launch.progress import Progress, SilentProgress

DRIVER = 580  # the first driver series for CUDA 13, which every release from 0.5.11 is built with


@dataclass(frozen=True)
class Installed:
    """What an install did. `log` is pip's full output, None when pip was not needed."""

    did: Literal["installed", "repaired", "rebuilt", "plugin", "adopted", "nothing"]
    facts: EngineFacts
    seconds: float
    size_bytes: int | None
    log: Path | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: the flags by their number, `engine check --json` lists them."""
        kept = ("name", "flavour", "version", "python", "adopted", "packages", "plugin")
        return {
            "did": self.did,
            **{key: getattr(self.facts, key) for key in kept},
            "flags": len(self.facts.flags),
            "seconds": round(self.seconds, 3),
            "size_bytes": self.size_bytes,
            "log": self.log,
            "notes": self.notes,
        }


def install(
    flavour: Flavour | None = None,
    *,
    version: str | None = None,
    python: Path | None = None,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    wait: float = 3600.0,
) -> Installed:
    """Make sure that the environment is there; build, complete, repair or rebuild it as needed.

    `python` adopts an existing environment instead. `force` builds anew though all is well. `wait` is how long another
    install of the same environment may take, in seconds. Ctrl-C at any point leaves what the next call goes on from.

    Raises InvalidInputError, UnfitError, NetworkError or CheckFailedError; docs/engine.md lists the codes.
    """
    shown = progress or SilentProgress()
    started = time.monotonic()
    if python is not None:
        return _adopt(python, flavour, version, name, force, shown, wait, started)
    chosen = flavour or registry.default_flavour()
    wanted = releases.build(chosen, version)
    usual = wanted == releases.build(chosen)
    name = record.check_name(name or (chosen if usual else f"{chosen}-{wanted.version}"))
    notes = _notes(wanted)
    with plugin_wheel() as wheel:
        done = None if force else _unchanged(name, wanted, wheel)
        if done is None:
            with record.locked(name, shown, wait) as hold:
                done = None if force else _unchanged(name, wanted, wheel)  # by the one that was waited for
                if done is None:
                    return _build(name, wanted, wheel, force, shown, hold, started, notes)
    return Installed("nothing", registry.facts(done), time.monotonic() - started, done.size_bytes, None, notes)


def _unchanged(name: str, wanted: releases.Build, wheel: PluginWheel) -> Record | None:
    found = record.load(name)
    if found is None or found.adopted or registry.trouble(found):
        return None
    same = found.key == wanted.key and found.plugin_mark == wheel.mark and inspection.fresh(found.inspection)
    return found if same else None


def _build(
    name: str,
    wanted: releases.Build,
    wheel: PluginWheel,
    force: bool,
    shown: Progress,
    hold: int,
    started: float,
    notes: tuple[str, ...],
) -> Installed:
    before = record.load(name)
    if before is not None and before.adopted:
        raise InvalidInputError(
            "engine_name_taken", f"environment {name!r} is an adopted one ({before.python})", "give another --name"
        )
    folder = record.folder(name)
    env = folder / f"env-{wanted.key}"
    builder = Builder(env, folder / "install.log", shown, hold)
    current = before if before and before.key == wanted.key else None
    whole = current is not None and not registry.trouble(current) and inspection.fresh(current.inspection)
    if force:
        _refuse_in_use(name, env)
        builder.clear()
    elif whole and current is not None:
        shown.step("bringing the plugin up to date")
        builder.install_wheel(wheel.path)
        found = current.with_(plugin=wheel.version, plugin_mark=wheel.mark)
        record.save(found)
        return Installed(
            "plugin", registry.facts(found), time.monotonic() - started, found.size_bytes, builder.log, notes
        )
    for left in folder.parent.glob(f"{record.going(name)}*"):
        shutil.rmtree(left, ignore_errors=True)  # of a removal that was interrupted; the lock is ours
    for note in notes:
        shown.step(note)  # before gigabytes are fetched
    record.write_note(name, wanted.flavour, wanted.version)
    builder.build(wanted)
    builder.install_wheel(wheel.path)
    shown.step("checking that it starts")
    seen = inspection.inspect(environment_python(env), wanted.flavour)
    found = Record(
        name=name,
        flavour=wanted.flavour,
        python=environment_python(env),
        adopted=False,
        key=wanted.key,
        installed_at=time.time(),
        size_bytes=disk_usage(env),
        inspection=seen,
        plugin=wheel.version,
        plugin_mark=wheel.mark,
    )
    record.save(found)
    remove_others(keep=env)
    did: Literal["installed", "repaired", "rebuilt"] = (
        "installed" if before is None else "rebuilt" if force or current is None else "repaired"
    )
    return Installed(did, registry.facts(found), time.monotonic() - started, found.size_bytes, builder.log, notes)


def _refuse_in_use(name: str, env: Path) -> None:
    busy = users(env)
    if busy:
        raise UnfitError(
            "engine_in_use",
            f"environment {name!r} is in use by process {', '.join(map(str, busy))}; --force would delete it there",
            "stop it first: qwen3emb down; or build a second one with --name",
            {"pids": busy},
        )


def _adopt(
    python: Path,
    flavour: Flavour | None,
    version: str | None,
    name: str | None,
    force: bool,
    shown: Progress,
    wait: float,
    started: float,
) -> Installed:
    if version is not None:
        raise InvalidInputError(
            "usage",
            "--version chooses what is built; an adopted environment has its own sglang",
            "leave one of them out",
        )
    name = record.check_name(name or "adopted")
    given = python.expanduser().absolute()
    path = given / "bin" / "python" if given.is_dir() else given
    if not path.is_file():
        raise InvalidInputError("python_missing", f"no python at {path}", "--python /path/to/env/bin/python")
    with plugin_wheel() as wheel, record.locked(name, shown, wait):
        before = record.load(name)
        if before is None and record.folder(name).exists():
            raise InvalidInputError(
                "engine_name_taken", f"{name!r} is an environment that was begun here", "give another --name"
            )
        if before is not None and not (before.adopted and (force or before.python == path)):
            raise InvalidInputError(
                "engine_name_taken",
                f"{name!r} is {before.python} already",
                f"give another --name, or `qwen3emb engine remove {name}` first",
            )
        same = before is not None and (before.plugin_mark, before.broken) == (wheel.mark, None) and not force
        if before and same and flavour in (None, before.flavour) and inspection.fresh(before.inspection):
            return Installed("nothing", registry.facts(before), time.monotonic() - started, None, None)
        shown.step(f"looking at {path}")
        seen = inspection.inspect(path, flavour)
        releases.check_version(seen.version)
        with record.translated(record.folder(name)):
            record.folder(name).mkdir(parents=True, exist_ok=True)
        found = Record(
            name=name,
            flavour=seen.flavour,
            python=path,
            adopted=True,
            key="",
            installed_at=time.time(),
            size_bytes=None,
            inspection=seen,
            plugin=wheel.version,
            plugin_mark=wheel.mark,
            plugin_path=unpack(wheel, record.folder(name)),
        )
        record.save(found)
        if found.plugin_path:
            remove_others(keep=found.plugin_path)
    note = releases.untested(seen.version)
    return Installed("adopted", registry.facts(found), time.monotonic() - started, None, None, (note,) if note else ())


def _notes(wanted: releases.Build) -> tuple[str, ...]:
    """What the user should know, though nothing forbids the install."""
    notes = [releases.untested(wanted.version)]
    if wanted.flavour == "cuda":
        gpus = gpu.inventory()
        old = [
            g for g in gpus if g.driver and g.driver.split(".")[0].isdigit() and int(g.driver.split(".")[0]) < DRIVER
        ]
        if not gpus:
            notes.append("no NVIDIA GPU is found here: this environment can be built, not run")
        elif old:
            notes.append(f"CUDA 13 needs the NVIDIA driver {DRIVER} or later; {old[0].name} has {old[0].driver}")
    return tuple(note for note in notes if note)
