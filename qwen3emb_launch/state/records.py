"""The read side: what every command may know of an instance."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, UnfitError, nearest
from qwen3emb_launch.lifecycle import TERMINAL, State
from qwen3emb_launch.paths import paths

SCHEMA = 1
MARK = "temporary"  # a file in the folder of an instance that lives for one run of another command
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one: pid, start time in clock ticks since boot, boot id."""

    pid: int
    start: int
    boot: str

    @property
    def alive(self) -> bool:
        """Whether that very process still runs; a zombie does not."""
        seen = identify(self.pid)
        return seen is not None and (seen.start, seen.boot) == (self.start, self.boot)


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none, or only a zombie."""
    try:
        fields_ = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if fields_[0] in (b"Z", b"X") else ProcessId(pid, int(fields_[19]), boot)


_KINDS: dict[str, type[str | int | float | dict[str, Any]]] = {
    **dict.fromkeys(("name", "reason", "profile", "model", "served_model_name", "base_url", "engine_url", "log"), str),
    **dict.fromkeys(("max_dims", "context_length", "restarts"), int),
    **dict.fromkeys(("started_at", "ready_at"), float),
    "error": dict,
}
_OPTIONAL = frozenset(("log", "ready_at", "error"))


@dataclass(frozen=True)
class UnitRecord:
    """One process of an instance: an engine or the gateway. `name` is engine, engine-2, … or gateway.

    `url` is its own address, `keys` the name of the file with an engine's keys in the instance's folder.
    """

    name: str
    kind: str
    state: State
    reason: str
    process: ProcessId | None
    url: str
    restarts: int = 0
    log: str | None = None
    keys: str | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UnitRecord:
        """The inverse of `results.plain`. Raises ValueError, KeyError or TypeError on anything else."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        process = values["process"]
        values |= {"state": State(values["state"]), "process": ProcessId(**process) if process else None}
        for key in ("name", "kind", "reason", "url"):
            if not isinstance(values[key], str):
                raise TypeError(f"{key} is {values[key]!r}")
        for key in ("log", "keys"):
            if not isinstance(values.get(key), str | None):
                raise TypeError(f"{key} is {values[key]!r}")
        if not isinstance(values.get("restarts", 0), int):
            raise TypeError(f"restarts is {values['restarts']!r}")
        return cls(**values)


@dataclass(frozen=True)
class InstanceRecord:
    """What the supervisor says of itself. Times are seconds since the epoch; None is not yet, or unknown.

    `engines` are the engines' main processes, `units` everything it looks after, with the gateway. `base_url` is where
    users call, with an API key of theirs where `needs_key`; `engine_url` is the first engine's own address (the same
    without a gateway).
    """

    name: str
    state: State
    reason: str
    supervisor: ProcessId | None
    engines: tuple[ProcessId, ...]
    profile: str
    model: str
    served_model_name: str
    base_url: str
    engine_url: str
    max_dims: int
    context_length: int
    started_at: float
    ready_at: float | None = None
    restarts: int = 0
    log: str | None = None
    error: Mapping[str, Any] | None = None
    launcher: str = ""
    units: tuple[UnitRecord, ...] = ()
    needs_key: bool = False
    schema: int = SCHEMA

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InstanceRecord:
        """The inverse of `results.plain`. Raises ValueError, KeyError or TypeError on anything else."""
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']} is newer than {SCHEMA}")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        supervisor = values["supervisor"]
        values["state"] = State(values["state"])
        values["supervisor"] = ProcessId(**supervisor) if supervisor else None
        values["engines"] = tuple(ProcessId(**e) for e in values["engines"])
        values["units"] = tuple(UnitRecord.from_dict(u) for u in values.get("units", ()))
        for key, kind in _KINDS.items():
            if not isinstance(values.get(key, kind()), kind) and (key not in _OPTIONAL or values[key] is not None):
                raise TypeError(f"{key} is {values[key]!r}")
        return cls(**values)

    @property
    def processes(self) -> tuple[ProcessId, ...]:
        """Every process that may run: the supervisor, the engines, the gateway."""
        units = (unit.process for unit in self.units)
        return tuple(dict.fromkeys(p for p in (self.supervisor, *self.engines, *units) if p is not None))


@dataclass(frozen=True)
class Instance:
    """An instance as everyone but its supervisor sees it.

    `state` is the record's while its supervisor lives. A supervisor that died without a last word leaves `failed`.
    `record` is None when instance.json is missing or cannot be read; `warning` then says why.
    """

    name: str
    folder: Path
    state: State
    running: bool
    record: InstanceRecord | None
    warning: str | None = None

    @property
    def temporary(self) -> bool:
        """Whether it lived for one run of another command; what is left of it then are the logs of a failed run."""
        return (self.folder / MARK).exists()

    @property
    def events(self) -> Path:
        """Every transition, a JSON line each."""
        return self.folder / "events.jsonl"

    @property
    def plan(self) -> Path:
        """The launch plan, JSON."""
        return self.folder / "plan.json"

    @property
    def supervisor_log(self) -> Path:
        """What a detached supervisor said."""
        return self.folder / "logs" / "supervisor.log"

    def engine_key(self) -> str | None:
        """The key of the first engine's admin routes, for this user's other commands. None when there is none."""
        return self._key("admin-api-key")

    def engine_api_key(self) -> str | None:
        """The key that the first engine asks of every request, where only the gateway is to call it; else None."""
        return self._key("api-key")

    def _key(self, which: str) -> str | None:
        units = self.record.units if self.record else ()
        file = next((unit.keys for unit in units if unit.keys), "engine.yaml")
        try:
            keys = json.loads((self.folder / Path(file).name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        key = keys.get(which) if isinstance(keys, dict) else None
        return str(key) if key else None


def check_name(name: str) -> str:
    """The name, if it can be one. Raises InvalidInputError `bad_name`."""
    if not NAME.fullmatch(name):
        raise InvalidInputError(
            "bad_name",
            f"instance name {name!r}: lower-case letters, digits, '.', '_' and '-', at most 63, no leading sign",
            "qwen3emb up --name my-embeddings",
        )
    return name


def load(name: str) -> Instance | None:
    """One instance, or None when there is no such folder. Raises UnfitError where the state folder is closed."""
    folder = paths().instances / name
    try:
        if not NAME.fullmatch(name) or not folder.is_dir():
            return None
    except OSError as error:
        raise unusable(folder, error) from error
    path = folder / "instance.json"
    try:
        record = InstanceRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Instance(name, folder, State.STOPPED, False, None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        warning = f"{path} cannot be read ({error}); taken as left over"
        return Instance(name, folder, State.FAILED, False, None, warning)
    running = record.supervisor is not None and record.supervisor.alive and record.state not in TERMINAL
    if running or record.state in TERMINAL:
        return Instance(name, folder, record.state, running, record)
    record = replace(record, reason=f"its supervisor ended without a word while {record.state}")
    return Instance(name, folder, State.FAILED, False, record)


def instances() -> list[Instance]:
    """Every instance there is, running or not, by name. A folder whose `up` was refused before a plan is none."""
    try:
        names = sorted(p.name for p in paths().instances.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unusable(paths().instances, error) from error
    found = [instance for name in names if (instance := load(name)) is not None]
    return [i for i in found if i.record or i.warning or i.plan.exists()]


def lasting(found: Iterable[Instance]) -> list[Instance]:
    """Those that are somebody's: not the logs that a run of another command has left."""
    return [one for one in found if one.running or not one.temporary]


def find(name: str | None = None, *, or_last: bool = False) -> Instance:
    """The named instance, or the only running one; with `or_last`, where none runs, the one that was started last.

    Raises InvalidInputError `unknown_instance` (nearest name in the hint) or `which_instance`, UnfitError `not_running`
    when no name was given and nothing runs.
    """
    if name is not None:
        found = load(name)
        if found is None:
            names = [i.name for i in instances()]
            guess = nearest(name, names)
            raise InvalidInputError(
                "unknown_instance",
                f"no instance {name!r}" + (f"; known: {', '.join(names)}" if names else "; there is none yet"),
                f"did you mean {guess!r}?" if guess else "qwen3emb status",
            )
        return found
    known = instances()
    running = [i for i in known if i.running]
    if len(running) > 1:
        raise InvalidInputError(
            "which_instance", f"several instances run: {', '.join(i.name for i in running)}", "name one of them"
        )
    ended = {i.record.started_at: i for i in known if i.record} if or_last else {}
    if not running and ended:
        return ended[max(ended)]
    if not running:
        raise UnfitError("not_running", "no instance is running", "qwen3emb up")
    return running[0]


def running(name: str | None = None) -> tuple[Instance, InstanceRecord]:
    """The named (or only) instance, which must be running. Raises as `find`, and UnfitError `not_running`."""
    found = find(name)
    if not found.running or found.record is None:
        raise UnfitError(
            "not_running",
            f"instance {found.name!r} is not running (it is {found.state})",
            f"qwen3emb logs {found.name}",
        )
    return found, found.record


def unusable(path: Path, error: OSError) -> UnfitError:
    """The error for a state file or folder that cannot be read or written."""
    return UnfitError(
        "state_unwritable",
        f"{path} cannot be used: {error.strerror or error}",
        "free space or rights there, or set QWEN3EMB_STATE_DIR to a folder of yours",
    )
