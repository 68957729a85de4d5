"""The artefact of a bench: it describes itself, is written whole or not at all, and is read back by any later version.

Times of day are UTC. Keys, prompts and headers are never in it.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from qwen3emb_launch import __version__
from qwen3emb_launch.bench.figures import Figures, Latency
from qwen3emb_launch.bench.histogram import LatencyHistogram
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.results import plain
from qwen3emb_launch.statistics import Ratio, Trend

SCHEMA = 1
KIND = "qwen3emb-bench"


@dataclass(frozen=True)
class TargetInfo:
    """What was measured, as far as it is known; `facts` holds engine, GPU, driver, model revision, profile hash…

    `fingerprint` is `verify`'s: what decides the vectors, `{"id", "complete", "parts"}`; empty where nobody could say.
    """

    name: str
    url: str
    model: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    tokens_exact: bool = False
    dims: int | None = None
    wire: str | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One phase of one load. `level` is clients or requests/s, `rss` the engine's most resident bytes if local.

    `shape` is `closed` or `open`; empty in records of 0.1 from before it was kept: the load's own then.
    """

    target: str
    round: int
    phase: str
    level: float
    at: float
    figures: Figures
    rss: int | None = None
    shape: str = ""


@dataclass(frozen=True)
class Comparison:
    """`target` over `baseline`, a measure at a time: texts_per_s, p50, p95, p99."""

    baseline: str
    target: str
    ratios: Mapping[str, Ratio]


@dataclass(frozen=True)
class Drift:
    """How one measure moved during a soak. `trend.slope` is per hour, in `unit`."""

    target: str
    measure: str
    unit: str
    first: float
    last: float
    trend: Trend | None


@dataclass(frozen=True)
class Record:
    """A whole bench."""

    mode: str
    load: Mapping[str, Any]
    targets: tuple[TargetInfo, ...]
    runs: tuple[Run, ...]
    created: str
    seed: int
    slo: str | None = None
    knee: Mapping[str, Any] | None = None
    comparisons: tuple[Comparison, ...] = ()
    drifts: tuple[Drift, ...] = ()
    overall: Figures | None = None  # of a soak, whose single runs keep no histograms
    claims: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    partial: bool = False
    tool: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    kind: str = KIND

    @property
    def levels(self) -> tuple[float, ...]:
        """The load levels in order of first appearance."""
        return tuple(dict.fromkeys(r.level for r in self.runs))


@dataclass(frozen=True)
class Row:
    """The rounds of one (target, phase, level) as one line: medians of rates, percentiles of the merged histogram."""

    target: str
    phase: str
    level: float
    rounds: int
    figures: Figures
    shape: str = ""


def rows_of(record: Record) -> list[Row]:
    """One row a target, phase and level; a soak is one row."""
    if record.overall and record.runs:
        first = record.runs[0]
        return [Row(first.target, first.phase, first.level, len(record.runs), record.overall, first.shape)]
    groups: dict[tuple[str, str, float], list[Run]] = {}
    for run in record.runs:
        groups.setdefault((run.target, run.phase, run.level), []).append(run)
    return [
        Row(*key, rounds=len(runs), figures=merged([r.figures for r in runs]), shape=runs[0].shape)
        for key, runs in groups.items()
    ]


def merged(rounds: Sequence[Figures]) -> Figures:
    """Several rounds as one."""
    if len(rounds) == 1:
        return rounds[0]
    histogram = LatencyHistogram()
    failed: dict[str, int] = {}
    details: dict[str, str] = {}
    for f in rounds:
        if f.histogram:
            histogram.merge(LatencyHistogram(f.histogram))
        for kind, count in f.failed.items():
            failed[kind] = failed.get(kind, 0) + count
        details = {**f.details, **details}
    requests, wrong = sum(f.requests for f in rounds), sum(failed.values())

    def middle(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return median(known) if known else None

    def ms(value: float | None) -> float | None:
        return None if value is None else value * 1000

    gpus = [f.gpu for f in rounds if f.gpu]
    medians: dict[str, Any] = {k: middle([getattr(g, k) for g in gpus]) for k in plain(gpus[0])} if gpus else {}
    return replace(
        rounds[0],
        seconds=sum(f.seconds for f in rounds),
        requests=requests,
        failed=failed,
        details=details,
        requests_per_s=median(f.requests_per_s for f in rounds),
        texts_per_s=median(f.texts_per_s for f in rounds),
        tokens_per_s=middle([f.tokens_per_s for f in rounds]),
        error_rate=wrong / (wrong + requests) if wrong else 0.0,
        latency=Latency(*(ms(v) for v in (histogram.mean(), *(histogram.at(p) for p in (50, 90, 95, 99, 100))))),
        goodput_per_s=middle([f.goodput_per_s for f in rounds]),
        slo_misses=tuple(dict.fromkeys(m for f in rounds for m in f.slo_misses)),
        queue_ms=middle([f.queue_ms for f in rounds]),
        client=max((f.client for f in rounds), key=lambda c: (c.limited, c.cpu)),
        gpu=replace(gpus[0], **medians) if gpus else None,
        timeline=rounds[0].timeline,
        histogram=histogram.encode() if histogram.count else "",
    )


def this_tool() -> dict[str, Any]:
    """The load generator's own side."""
    return {
        "name": "qwen3emb",
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def write_text(path: Path, text: str) -> None:
    """Write a report whole or not at all. Raises UnfitError (`report_unwritable`), an earlier file kept."""
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
        ) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as exc:
        if partial:
            partial.unlink(missing_ok=True)
        raise UnfitError(
            "report_unwritable",
            f"{path} cannot be written: {exc.strerror or exc}",
            "free space there, or give another --output",
        ) from exc


def save(record: Record, path: Path) -> None:
    """The record as JSON."""
    write_text(path, json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")


def load(path: Path) -> Record:
    """Read a record. Raises InvalidInputError (`no_record`, `bad_record`, `newer_record`).

    The envelope that `bench --json` prints is taken too.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise InvalidInputError("no_record", f"no file {path}", "qwen3emb bench --output FILE writes one") from exc
    except (OSError, ValueError) as exc:
        raise InvalidInputError("bad_record", f"{path} cannot be read as JSON: {exc}", "is it a bench record?") from exc
    if isinstance(data, dict) and data.get("command") == "bench" and isinstance(data.get("result"), dict):
        data = data["result"]
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise InvalidInputError("bad_record", f"{path} is no bench record", "qwen3emb bench --output FILE writes one")
    if data.get("schema", 0) > SCHEMA:
        raise InvalidInputError(
            "newer_record", f"{path} has schema {data['schema']}, this version reads {SCHEMA}", "update qwen3emb"
        )
    try:
        return from_dict(data)
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise InvalidInputError("bad_record", f"{path} is a damaged bench record: {exc!r}", "measure again") from exc


def from_dict(data: Mapping[str, Any]) -> Record:
    """The inverse of `results.plain`. Raises KeyError, TypeError or ValueError for anything else."""
    values = dict(data)
    values["targets"] = tuple(TargetInfo(**t) for t in data["targets"])
    values["runs"] = tuple(run_from(r) for r in data["runs"])
    values["comparisons"] = tuple(
        Comparison(c["baseline"], c["target"], {k: Ratio(**r) for k, r in c["ratios"].items()})
        for c in data["comparisons"]
    )
    values["drifts"] = tuple(
        Drift(**{**d, "trend": Trend(**d["trend"]) if d["trend"] else None}) for d in data["drifts"]
    )
    values["overall"] = Figures.from_dict(data["overall"]) if data.get("overall") else None
    values["claims"] = tuple(data["claims"])
    values["warnings"] = tuple(data["warnings"])
    return Record(**values)


def run_from(data: Mapping[str, Any]) -> Run:
    """One run from its plain data."""
    return Run(**{**data, "figures": Figures.from_dict(data["figures"])})
