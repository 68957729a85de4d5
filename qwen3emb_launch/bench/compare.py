"""Records put side by side: the loads they share, and in what else they differ.

Records of separate runs share no rounds, so there is no interval: what changed between the runs is in the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen3emb_launch.bench.record import Record, Row, rows_of
from qwen3emb_launch.errors import InvalidInputError

SETTINGS = ("batch", "tokens", "corpus", "repeat_rate", "dims", "encoding", "shape", "requests")
FACTS = ("engine", "gpu", "driver", "revision", "profile", "profile_hash")


@dataclass(frozen=True)
class Line:
    """One measure of one load; `values` in the order of the records, None where one has none."""

    load: str
    measure: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Compared:
    """The shared loads, and what else differs between the records."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    differences: tuple[str, ...]


def compared(records: Sequence[tuple[str, Record]]) -> Compared:
    """Compare named records. Raises InvalidInputError (`nothing_shared`) when no phase and level is in all of them."""
    tables = [_first_target(record) for _, record in records]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        loads = "; ".join(
            f"{name}: {', '.join(_load(k) for k in t)}" for (name, _), t in zip(records, tables, strict=True)
        )
        raise InvalidInputError(
            "nothing_shared", f"the records have no load in common ({loads})", "measure both with the same load"
        )
    lines = [
        Line(_load(key), measure, tuple(_value(table[key], measure) for table in tables))
        for key in shared
        for measure in ("requests/s", "texts/s", "tokens/s", "p50 ms", "p95 ms", "p99 ms", "Wh/1M tokens")
    ]
    kept = tuple(line for line in lines if any(v is not None for v in line.values))
    return Compared(tuple(name for name, _ in records), kept, tuple(_differences(records)))


def _first_target(record: Record) -> dict[tuple[str, float], Row]:
    name = record.targets[0].name if record.targets else ""
    return {(r.phase, r.level): r for r in rows_of(record) if r.target == name}


def _load(key: tuple[str, float]) -> str:
    return f"{key[0]} {key[1]:g}"


def _value(row: Row, measure: str) -> float | None:
    figures = row.figures
    if measure == "Wh/1M tokens":
        return figures.gpu.watt_hours_per_million_tokens if figures.gpu else None
    rates = {"requests/s": figures.requests_per_s, "texts/s": figures.texts_per_s, "tokens/s": figures.tokens_per_s}
    if measure in rates:
        return rates[measure]
    value = getattr(figures.latency, measure.split()[0])
    return None if value is None else float(value)


def _differences(records: Sequence[tuple[str, Record]]) -> list[str]:
    found = []
    first = records[0][1]
    for name, record in records[1:]:
        for key in SETTINGS:
            a, b = first.load.get(key), record.load.get(key)
            if a != b:
                found.append(f"{name}: {key} is {b}, not {a}: the loads are not alike")
        if first.targets and record.targets:
            one, other = first.targets[0], record.targets[0]
            facts = [(key, one.facts.get(key), other.facts.get(key)) for key in FACTS]
            facts += _packages(one.facts.get("packages"), other.facts.get("packages"))
            found += [f"{name}: {key} is {now}, was {then}" for key, then, now in facts if now != then]
            ids = [t.fingerprint.get("id") for t in (one, other)]
            if None not in ids and ids[0] != ids[1]:
                found.append(f"{name}: fingerprint is {ids[1]}, was {ids[0]}: other vectors (qwen3emb diff)")
            if one.model != other.model:
                found.append(f"{name}: model is {other.model}, was {one.model}")
        if record.partial:
            found.append(f"{name}: is partial")
    if first.partial:
        found.append(f"{records[0][0]}: is partial")
    return found


def _packages(then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Package by package, where both records have them: (name, version then, version now)."""
    if not (isinstance(then, str) and isinstance(now, str)):
        return [("packages", then, now)]
    one, other = (dict(part.split("=", 1) for part in text.split() if "=" in part) for text in (then, now))
    return [(package, one.get(package), other.get(package)) for package in sorted({*one, *other})]
