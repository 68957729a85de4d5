"""Putting units in place and taking them away again. What was not written by us is never touched."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch import unit_text
from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, UnfitError
from qwen3emb_launch.files import write_atomic
from qwen3emb_launch.systemd import places
from qwen3emb_launch.systemd.manager import Manager
from qwen3emb_launch.systemd.places import Places
from qwen3emb_launch.systemd.spec import WRITTEN_BY

STOP_PATIENCE = 900.0  # seconds; the unit's own TimeoutStopSec ends a stop before
LOCAL = "local.conf"
LOCAL_TEXT = """\
# Yours: `qwen3emb systemd install` and upgrades leave this folder alone. After a change:
# systemctl daemon-reload, then systemctl restart of the unit (with --user for a user's).
[Service]
#Environment=QWEN3EMB_SET_SERVER__PORT=30001
#Environment=CUDA_VISIBLE_DEVICES=1
#MemoryMax=64G
"""


@dataclass(frozen=True)
class Written:
    """One file and what became of it: written, changed, unchanged, removed, kept."""

    path: Path
    did: str


@dataclass(frozen=True)
class Installed:
    """What `install` did. `notes` are for people: what is still to be done."""

    unit: str
    scope: str
    files: tuple[Written, ...]
    enabled: bool
    started: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removed:
    """What `uninstall` did."""

    unit: str
    scope: str
    files: tuple[Written, ...]
    notes: tuple[str, ...] = ()


def check_launcher(python: Path, package: Path) -> None:
    """Whether a service of another user can run this qwen3emb. Raises UnfitError `launcher_private`."""
    for path in (python.resolve(), package.resolve()):
        hidden = str(path).startswith(("/home/", "/root/", "/run/user/"))  # ProtectHome=yes
        closed = next((p for p in path.parents if not p.stat().st_mode & stat.S_IXOTH), None)
        if hidden or closed:
            raise UnfitError(
                "launcher_private",
                f"a system service cannot run this qwen3emb: {path} lies in {closed or 'a home folder'}, "
                "which other users do not see",
                "install it for all: /usr/bin/python3 -m venv /opt/qwen3emb; "
                "/opt/qwen3emb/bin/pip install qwen3emb-launch; or a unit of your own: --user",
            )


def install(
    where: Places, unit: str, text: str, manager: Manager | None, *, cuda: bool, enable: bool, now: bool
) -> Installed:
    """Write the unit and what goes with it; with a manager, make it known, enable and start it.

    Doing it again changes nothing. Raises InvalidInputError `not_ours` for a unit file that somebody else wrote,
    UnfitError when the disk refuses, and what Manager raises.
    """
    if manager:
        manager.check()
    path = where.unit(unit)
    _ours(path)
    files = [_write(place, body) for place, body in _companions(where, cuda=cuda).items()]
    files.append(_write(path, text))
    local = where.drop_ins(unit) / LOCAL
    if not local.parent.exists():
        files.append(_write(local, LOCAL_TEXT))
    notes: list[str] = []
    changed = any(f.did != "unchanged" for f in files)
    if manager is None:
        return Installed(unit, where.scope, tuple(files), False, False, ("written only: systemd was not told",))
    if where.scope == "system" and changed:
        manager.tool("systemd-sysusers", str(where.companions["sysusers"]))
        manager.tool("systemd-tmpfiles", "--create", str(where.companions["tmpfiles"]))
    if changed:
        manager.do("daemon-reload")
    template = unit == places.TEMPLATE
    if enable and not template:
        manager.do("enable", "--", unit)
    before = {} if template else manager.show(unit)
    running = before.get("ActiveState") in ("active", "activating", "reloading")
    if now and not running and not template:
        manager.do("start", "--no-block", "--", unit)
        notes.append(f"it starts now; wait for it: systemctl {_flag(where)}start {unit}")
    elif running and changed:
        notes.append(f"it still runs as before: systemctl {_flag(where)}restart {unit}")
    return Installed(unit, where.scope, tuple(files), enable and not template, now and not template, tuple(notes))


def uninstall(where: Places, unit: str, manager: Manager | None) -> Removed:
    """Stop and disable the unit and remove what `install` wrote. Files that people changed are kept, and named.

    Doing it again is no error. Raises as `install`.
    """
    path = where.unit(unit)
    if manager:
        manager.check()
    _ours(path)
    if manager and path.exists():
        for instance in manager.loaded("qwen3emb@*") if unit == places.TEMPLATE else [unit]:
            manager.do("disable", "--now", "--", instance, patience=STOP_PATIENCE)
    files, notes = [*_remove_drop_ins(where.drop_ins(unit))], []
    if path.exists():
        files.append(_remove(path))
    if not installed(where):
        files += [_remove(place) for place in where.companions.values() if place.exists() and _is_ours(place)]
        if where.scope == "system":
            notes.append(
                f"engines, models and the account stay: rm -r {places.HOME} {places.CACHE}; userdel {places.USER}"
            )
    if manager and files:
        manager.do("daemon-reload")
        if unit != places.TEMPLATE:
            _forget_failure(manager, unit)
    return Removed(unit, where.scope, tuple(files), tuple(notes))


def installed(where: Places) -> list[str]:
    """Our units in this scope."""
    found = [*where.units.glob("qwen3emb-*.service"), *where.units.glob(places.TEMPLATE)]
    return sorted(p.name for p in found if _is_ours(p))


def status(where: Places, manager: Manager) -> list[dict[str, Any]]:
    """Every unit of ours, with what systemd says of it. Numbers that it does not tell are None."""
    names = [name for name in installed(where) if name != places.TEMPLATE]
    names += [n for n in manager.loaded("qwen3emb@*") if n not in names] if places.TEMPLATE in installed(where) else []
    return [_status(manager.show(name), name, where) for name in names]


def _status(seen: Mapping[str, str], name: str, where: Places) -> dict[str, Any]:
    def number(key: str) -> int | None:
        text = seen.get(key, "")
        return int(text) if text.isdigit() and int(text) < 1 << 63 else None

    return {
        "unit": name,
        "scope": where.scope,
        "active": seen.get("ActiveState") or None,
        "sub": seen.get("SubState") or None,
        "result": seen.get("Result") or None,
        "says": seen.get("StatusText") or None,
        "pid": number("MainPID") or None,
        "restarts": number("NRestarts"),
        "memory_bytes": number("MemoryCurrent"),
        "enabled": seen.get("UnitFileState") or None,
        "since": seen.get("ActiveEnterTimestamp") or None,
        "file": seen.get("FragmentPath") or None,
        "drop_ins": seen.get("DropInPaths", "").split(),
        "needs_reload": seen.get("NeedDaemonReload") == "yes",
    }


def _companions(where: Places, *, cuda: bool) -> dict[Path, str]:
    """The files beside the units, by place."""
    if where.scope == "user":
        return {}
    bodies = {
        "sysusers": unit_text.sysusers(places.USER, places.HOME),
        "tmpfiles": unit_text.tmpfiles(places.USER, places.HOME, places.CACHE),
    }
    if cuda:
        bodies["modules"] = unit_text.modules_load()
    head = f"# {WRITTEN_BY}.\n"
    return {where.companions[kind]: head + body for kind, body in bodies.items()}


def _is_ours(path: Path) -> bool:
    try:
        return WRITTEN_BY in path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError):
        return False


def _ours(path: Path) -> None:
    if path.exists() and not _is_ours(path):
        raise InvalidInputError(
            "not_ours", f"{path} was not written by qwen3emb", f"move it away, or choose another --name: mv {path} …"
        )


def _write(path: Path, text: str) -> Written:
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if before == text:
            return Written(path, "unchanged")
        write_atomic(path, text, mode=0o644, folder_mode=0o755)
    except (OSError, UnicodeDecodeError) as error:
        raise disk_error(error if isinstance(error, OSError) else OSError(str(error)), path) from error
    return Written(path, "written" if before is None else "changed")


def _remove(path: Path) -> Written:
    try:
        path.unlink()
    except OSError as error:
        raise disk_error(error, path) from error
    return Written(path, "removed")


def _remove_drop_ins(folder: Path) -> list[Written]:
    """The folder, unless somebody put something into it."""
    if not folder.is_dir():
        return []
    entries = list(folder.iterdir())
    theirs = [p for p in entries if p.name != LOCAL or p.read_text(encoding="utf-8", errors="replace") != LOCAL_TEXT]
    if theirs:
        return [Written(p, "kept") for p in theirs]
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    return [Written(folder, "removed")]


def _forget_failure(manager: Manager, unit: str) -> None:
    with suppress(CheckFailedError):  # a unit that never failed is not known any more
        manager.do("reset-failed", "--", unit)


def _flag(where: Places) -> str:
    return "--user " if where.scope == "user" else ""
