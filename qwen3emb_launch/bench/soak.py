"""Hours or days of load in windows: a checkpoint line after each, resumable, drift and leaks looked for at the end.

The checkpoint is JSON lines: a header that says what the soak is, then a line a window, each flushed to the disk. A
line cut off by a crash or a full disk is dropped when resuming; the windows before it count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from qwen3emb_launch.bench.modes import Campaign
from qwen3emb_launch.bench.record import Drift, Record, Run, merged, run_from
from qwen3emb_launch.bench.spec import Phase
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.results import plain
from qwen3emb_launch.statistics import trend

HEADER = "qwen3emb-soak"
SHORTEST = 0.05  # of a window: a shorter remainder is not worth measuring, a longer warm-up not worth sending
KEPT_CURVES = 200  # windows whose histogram and timeline the record keeps; the checkpoint keeps all

MEASURES: tuple[tuple[str, str, Callable[[Run], float | None]], ...] = (
    ("texts_per_s", "1/s", lambda r: r.figures.texts_per_s),
    ("p50", "ms", lambda r: r.figures.latency.p50),
    ("p99", "ms", lambda r: r.figures.latency.p99),
    ("error_rate", "share", lambda r: r.figures.error_rate),
    ("engine_rss", "MiB", lambda r: None if r.rss is None else r.rss / 2**20),
    (
        "gpu_memory",
        "MiB",
        lambda r: r.figures.gpu.memory_bytes / 2**20 if r.figures.gpu and r.figures.gpu.memory_bytes else None,
    ),
)


class Checkpoint:
    """The windows on disk. `open` starts or resumes; a soak without a file keeps nothing."""

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self.path = path
        self._identity = {"kind": HEADER, "schema": 1, **plain(identity)}
        self.windows: list[Run] = []
        self.created: str | None = None

    def start(self, resume: bool, created: str) -> None:
        """Write the header, or read what an earlier run left.

        Raises InvalidInputError (`soak_exists`, `soak_differs`, `bad_checkpoint`), UnfitError (`report_unwritable`).
        """
        if self.path is None:
            return
        if not self.path.exists():
            if resume:
                raise InvalidInputError(
                    "no_checkpoint", f"no checkpoint {self.path} to resume", "start without --resume"
                )
            self._append({**self._identity, "created": created})
            return
        if not resume:
            raise InvalidInputError(
                "soak_exists", f"{self.path} holds an earlier soak", "go on with --resume, or give another --output"
            )
        self._read()

    def _read(self) -> None:
        assert self.path is not None  # noqa: S101 - start() checked
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        try:
            header = json.loads(lines[0])
            self.created = header.pop("created")
            self.windows = [run_from(json.loads(line)) for line in lines[1:]]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as exc:
            raise InvalidInputError(
                "bad_checkpoint", f"{self.path} is damaged: {exc!r}", "give another --output"
            ) from exc
        if header != self._identity:
            changed = sorted(k for k in {*header, *self._identity} if header.get(k) != self._identity.get(k))
            raise InvalidInputError(
                "soak_differs",
                f"{self.path} is of another soak: {', '.join(changed)} changed",
                "repeat the first command with --resume, or give another --output",
            )
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, window: Run) -> None:
        """Keep one window. Raises UnfitError (`report_unwritable`)."""
        self.windows.append(window)
        if self.path:
            self._append(plain(window))

    def _append(self, line: dict[str, Any]) -> None:
        assert self.path is not None  # noqa: S101 - the callers checked
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as exc:
            raise UnfitError(
                "report_unwritable",
                f"{self.path} cannot be written: {exc.strerror or exc}",
                "free space there; the windows so far are kept, go on with --resume",
            ) from exc


def checkpoint_path(output: Path | None) -> Path | None:
    """Where the windows of a record go."""
    return None if output is None else output.with_name(output.name + ".windows.jsonl")


def soak(campaign: Campaign, total: float, window: float, checkpoint: Checkpoint, resume: bool = False) -> Record:
    """Load one target for `total` seconds in windows of `window` seconds.

    What an earlier run measured counts. Ctrl-C or a full disk ends it with what there is, marked partial.
    """
    ready = campaign.targets[0]
    checkpoint.start(resume, campaign.created)
    if checkpoint.created:
        campaign.created = checkpoint.created
    campaign.runs += checkpoint.windows
    # Texts go on where the earlier run cannot have been: its own count is not in the checkpoint.
    campaign.text_start += len(checkpoint.windows) << 24
    done = sum(r.figures.seconds for r in campaign.runs)
    number = len(campaign.runs)
    shaping = campaign.shaping
    enough = total - SHORTEST * window
    first = True
    while done < enough and not campaign.interrupted:
        number += 1
        length = min(window, total - done)
        warmup = shaping.warmup if first else min(shaping.warmup, SHORTEST * window)
        campaign.shaping = replace(shaping, seconds=length, warmup=warmup)
        first = False
        phases = campaign.steady_phases(shaping.level)
        window_phases = (*phases[:-1], Phase("window", length, shaping.level))
        hours = f"{done / 3600:.2f} of {total / 3600:.2f} h"
        found = campaign.measure(ready, window_phases, number, f"{ready.target.name}, window {number}, {hours}")
        if not found or (campaign.interrupted and found[-1].figures.seconds < length / 2):
            campaign.runs = campaign.runs[: len(campaign.runs) - len(found)]
            break
        done += found[-1].figures.seconds
        try:
            checkpoint.add(found[-1])
        except UnfitError as error:
            campaign.warnings.append(f"{error.message}; {error.hint}")
            campaign.interrupted = True
    campaign.shaping = shaping
    campaign.interrupted |= done < enough
    overall = merged([r.figures for r in campaign.runs]) if campaign.runs else None
    record = campaign.record("soak", drifts=drifts_of(campaign.runs), overall=overall)
    return replace(record, runs=thinned(record.runs))


def drifts_of(runs: Sequence[Run]) -> tuple[Drift, ...]:
    """How each measure moved over the hours of load; first and last are medians of a tenth of the windows.

    Hours are of load, not of the wall clock, which may jump and in which a resumed soak has gaps.
    """
    found = []
    hours = list(accumulate(r.figures.seconds / 3600 for r in runs))
    for name, unit, value_of in MEASURES:
        points = [(at, v) for at, r in zip(hours, runs, strict=True) if (v := value_of(r)) is not None]
        if len(points) < 2:
            continue
        tenth = max(1, len(points) // 10)
        values = sorted(v for _, v in points[:tenth]), sorted(v for _, v in points[-tenth:])
        found.append(
            Drift(
                target=runs[0].target,
                measure=name,
                unit=unit,
                first=values[0][tenth // 2],
                last=values[1][tenth // 2],
                trend=trend([t for t, _ in points], [v for _, v in points]),
            )
        )
    return tuple(found)


def thinned(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same runs, histograms and timelines kept for every so-manieth: a record of days stays readable."""
    every = max(1, -(-len(runs) // KEPT_CURVES))
    bare = [replace(r, figures=replace(r.figures, histogram="", timeline=())) for r in runs]
    return tuple(run if number % every == 0 else bare[number] for number, run in enumerate(runs))
