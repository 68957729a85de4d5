"""`qwen3emb status`: what runs, where, since when."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3emb_launch.cli import completion
from qwen3emb_launch.cli.shell import JsonOption, shell

if TYPE_CHECKING:
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.state import Instance, UnitRecord


@dataclass(frozen=True)
class UnitRow:
    """One engine of an instance, or its gateway. `memory_bytes` is host memory, shared pages by their part; looked at
    only where one instance is asked for."""

    name: str
    kind: str
    state: str
    pid: int | None
    restarts: int
    url: str
    memory_bytes: int | None
    reason: str
    log: str | None


@dataclass(frozen=True)
class StatusRow:
    """One instance. `seconds` is how long it has been up; None where it is not running."""

    name: str
    state: str
    running: bool
    model: str | None = None
    base_url: str | None = None
    seconds: float | None = None
    restarts: int | None = None
    pid: int | None = None
    engine_pids: tuple[int, ...] = ()
    profile: str | None = None
    max_dims: int | None = None
    context_length: int | None = None
    reason: str | None = None
    error: Mapping[str, Any] | None = None
    log: str | None = None
    units: tuple[UnitRow, ...] = ()


@dataclass(frozen=True)
class StatusResult:
    """Every instance, or the one asked for."""

    instances: tuple[StatusRow, ...]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: qwen3emb status   |   qwen3emb status demo --json")(status)


def status(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One instance. Default: all of them.", show_default=False, autocompletion=completion.instances
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the instances: state, model, address, uptime, restarts, pid. Exit 0 also when none runs.

    With a name, each of its engines and the gateway too.
    """
    with shell("status", json) as console:
        from qwen3emb_launch import state

        found = [state.find(name)] if name is not None else state.lasting(state.instances())
        for instance in found:
            if instance.warning:
                console.warn(instance.warning)
        result = StatusResult(tuple(row(instance, time.time(), weigh=name is not None) for instance in found))
        console.result(result, lambda c: _show(c, result, detail=name is not None))


def row(instance: Instance, now: float, *, weigh: bool = False) -> StatusRow:
    """An instance as a row. Pids of processes that ended are left out. `weigh`: look at each process's memory."""
    record = instance.record
    if record is None:
        return StatusRow(instance.name, instance.state, running=False, reason=instance.warning)
    live = instance.running
    return StatusRow(
        name=instance.name,
        state=instance.state,
        running=live,
        model=record.served_model_name,
        base_url=record.base_url,
        seconds=round(now - record.started_at, 1) if live else None,
        restarts=record.restarts,
        pid=record.supervisor.pid if live and record.supervisor else None,
        engine_pids=tuple(e.pid for e in record.engines) if live else (),
        profile=record.profile,
        max_dims=record.max_dims,
        context_length=record.context_length,
        reason=record.reason,
        error=record.error,
        log=record.log,
        units=tuple(_unit(unit, weigh=weigh) for unit in record.units) if live else (),
    )


def _unit(unit: UnitRecord, *, weigh: bool) -> UnitRow:
    pid = unit.process.pid if unit.process and unit.process.alive else None
    memory = _memory(pid) if pid and weigh else None
    return UnitRow(
        unit.name, unit.kind, unit.state, pid, unit.restarts, unit.url, memory, unit.reason, unit.log
    )  # fmt: skip


def _memory(pid: int) -> int | None:
    """Bytes of a process and everything below it; pages that several share count once in all. None: not ours to see."""
    from qwen3emb_launch.engine_process.guard import descendants

    total = 0
    for one in (pid, *descendants(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total or None


def _show(console: Console, result: StatusResult, *, detail: bool) -> None:
    if not result.instances:
        console.say("nothing here yet: qwen3emb up --profile demo")
        return
    if detail:
        from qwen3emb_launch.console import size

        one = result.instances[0]
        pids = ", ".join(map(str, one.engine_pids)) or None
        console.fields(
            [
                ("name", one.name),
                ("state", one.state),
                ("because", one.error["message"] if one.error else one.reason),
                ("model", one.model),
                ("address", one.base_url),
                ("profile", one.profile),
                ("dims", one.max_dims),
                ("context", one.context_length),
                ("up for", span(one.seconds)),
                ("restarts", one.restarts),
                ("pid", one.pid),
                ("engine pid", pids),
                ("log", one.log),
            ]
        )
        if one.units:
            console.text("")
            console.table(
                ("PART", "STATE", "ADDRESS", "RESTARTS", "PID", "MEMORY"),
                [
                    (u.name, u.state, u.url, u.restarts, u.pid, size(u.memory_bytes) if u.memory_bytes else None)
                    for u in one.units
                ],
            )
        return
    console.table(
        ("NAME", "STATE", "MODEL", "ADDRESS", "UP", "RESTARTS", "PID"),
        [
            (r.name, r.state, r.model, r.base_url if r.running else None, span(r.seconds), r.restarts, r.pid)
            for r in result.instances
        ],
    )


def span(seconds: float | None) -> str | None:
    """A duration for people: `42s`, `3m 5s`, `2h 7m`, `3d 4h`."""
    if seconds is None:
        return None
    whole = int(max(0.0, seconds))
    for unit, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // part}{small}"
    return f"{whole}s"
