"""Sends a load from worker processes and gathers what happened.

Also a command for hosts without the launcher: `python -m qwen3emb_launch.bench.load spec.json > result.json`, where the
spec is `LoadSpec` as JSON (calibrated on the endpoint first unless it brings a vocabulary or a corpus) and the result
has raw latencies. Standard library only.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from qwen3emb_launch.bench.calibrate import vocabulary_of
from qwen3emb_launch.bench.spec import LoadSpec
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError

READY_WITHIN = 60.0  # seconds for the workers' start, texts built
START_AFTER = 0.1  # seconds from `ready` to the common start
GRACE = 15.0  # seconds beyond the phases and the drain until a silent worker is given up


@dataclass
class Batch:
    """Finished requests, in columns. Times are seconds since the start of the load; `kind` is an index of `kinds`."""

    scheduled: array[float] = field(default_factory=lambda: array("d"))
    sent: array[float] = field(default_factory=lambda: array("d"))
    done: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[int] = field(default_factory=lambda: array("l"))
    kind: array[int] = field(default_factory=lambda: array("h"))
    kinds: list[str] = field(default_factory=lambda: [""])

    def __len__(self) -> int:
        return len(self.done)

    def extend(self, other: Batch) -> None:
        """Append another batch, its kinds renumbered."""
        for kind in other.kinds:
            if kind not in self.kinds:
                self.kinds.append(kind)
        numbers = [self.kinds.index(k) for k in other.kinds]
        self.scheduled += other.scheduled
        self.sent += other.sent
        self.done += other.done
        self.tokens += other.tokens
        self.kind.extend(numbers[k] for k in other.kind)

    def rows(self) -> Iterator[tuple[float, float, float, int, str]]:
        """(scheduled, sent, done, tokens, kind) a request."""
        for scheduled, sent, done, tokens, kind in zip(
            self.scheduled, self.sent, self.done, self.tokens, self.kind, strict=True
        ):
            yield scheduled, sent, done, tokens, self.kinds[kind]

    @classmethod
    def of(cls, event: dict[str, Any]) -> Batch:
        """From a worker's `samples` event."""
        batch = cls(kinds=list(event["kinds"]))
        for name in ("scheduled", "sent", "done", "tokens", "kind"):
            getattr(batch, name).frombytes(base64.b64decode(event[name]))
        return batch


@dataclass
class PhaseTimes:
    """One phase as it really was. `cpu` is the busiest worker's share of one core; seconds since the start."""

    name: str
    measured: bool
    began: float
    ended: float
    cpu: float


@dataclass
class LoadResult:
    """What a load did. `batch` is empty when a consumer took the samples as they came."""

    spec: LoadSpec
    started_at: float  # seconds since the epoch
    start: float  # the same moment on the monotonic clock
    batch: Batch
    phases: list[PhaseTimes]
    sent: int
    unfinished: int
    texts_taken: int
    reopened: int
    dims: int | None
    wire: str | None
    details: dict[str, str]
    lag: float
    peak_rss: int
    interrupted: bool
    clock_jump: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data with raw columns, for the command below."""
        columns = {n: list(getattr(self.batch, n)) for n in ("scheduled", "sent", "done", "tokens", "kind")}
        rest = {k: v for k, v in self.__dict__.items() if k not in ("spec", "batch", "phases")}
        return {
            **rest,
            "spec": self.spec.public(),
            "phases": [p.__dict__ for p in self.phases],
            "kinds": self.batch.kinds,
            "requests": columns,
        }


class _Worker:
    """A worker process and the thread that reads its events."""

    def __init__(self, spec: LoadSpec, number: int, events: Queue[tuple[int, dict[str, Any]]]) -> None:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(p for p in (package, os.environ.get("PYTHONPATH")) if p)
        self.number = number
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen3emb_launch.bench.load_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.tell(spec.share(number).to_dict())

        def read() -> None:
            assert self.process.stdout is not None  # noqa: S101 - PIPE
            for line in self.process.stdout:
                events.put((number, json.loads(line)))
            events.put((number, {"event": "eof"}))

        threading.Thread(target=read, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None  # noqa: S101 - PIPE
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Close its stdin, which stops it, and make sure."""
        assert self.process.stdin is not None  # noqa: S101 - PIPE
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(spec: LoadSpec, watch: Callable[[Batch], None] | None = None, keep: bool = True) -> LoadResult:
    """Send the load and return what happened. Ctrl-C ends it early: the result says `interrupted`.

    `watch` gets every batch as it comes, warm-up included; `keep=False` does not gather them (a soak of days). Raises
    InvalidInputError (`bad_load`) for a spec that cannot be run, CheckFailedError (`load_worker_died`).
    """
    events: Queue[tuple[int, dict[str, Any]]] = Queue()
    if spec.processes < 1:
        raise InvalidInputError("bad_load", f"{spec.processes} client processes", "give --processes 1 or more")
    spec = _enough(spec)
    workers = [_Worker(spec, n, events) for n in range(spec.processes)]
    try:
        _await_ready(workers, events)
        return _gather(spec, workers, events, watch, keep)
    finally:
        for worker in workers:
            worker.end()


def _enough(spec: LoadSpec) -> LoadSpec:
    """No more processes than closed-loop clients: a worker without a client would do nothing."""
    if spec.shape == "open":
        return spec
    clients = int(max((p.level for p in spec.phases), default=1))
    return replace(spec, processes=max(1, min(spec.processes, clients)))


def _await_ready(workers: list[_Worker], events: Queue[tuple[int, dict[str, Any]]]) -> None:
    waiting = {w.number for w in workers}
    deadline = time.monotonic() + READY_WITHIN
    while waiting:
        try:
            number, event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise _died(f"not ready after {READY_WITHIN:.0f} s") from None
        if event["event"] == "failed":
            raise InvalidInputError("bad_load", event["message"], "qwen3emb bench --help")
        if event["event"] == "eof":
            raise _died("ended before it was ready")
        waiting.discard(number)


def _gather(
    spec: LoadSpec,
    workers: list[_Worker],
    events: Queue[tuple[int, dict[str, Any]]],
    watch: Callable[[Batch], None] | None,
    keep: bool,
) -> LoadResult:
    start = time.monotonic() + START_AFTER
    started_at = time.time() + START_AFTER
    for worker in workers:
        worker.tell({"start": start})
    batch, ends, ended, interrupted = Batch(), list[dict[str, Any]](), set[int](), False
    phases: dict[str, PhaseTimes] = {}
    deadline = start + spec.seconds + spec.drain + GRACE
    while len(ends) < len(workers):
        try:
            number, event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise _died("fell silent") from None
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            deadline = min(deadline, time.monotonic() + spec.drain + GRACE)
            for worker in workers:
                worker.tell({"stop": True})
            continue
        if event["event"] == "samples":
            some = Batch.of(event)
            if keep:
                batch.extend(some)
            if watch and len(some):
                watch(some)
        elif event["event"] == "phase":
            _merge(phases, event)
        elif event["event"] == "end":
            ends.append(event)
            ended.add(number)
        elif event["event"] == "failed" or (event["event"] == "eof" and number not in ended):
            raise _died(event.get("message", "ended early"))
    details: dict[str, str] = {}
    for end in ends:
        details = {**end["details"], **details}
    return LoadResult(
        spec=spec,
        started_at=started_at,
        start=start,
        batch=batch,
        phases=list(phases.values()),
        sent=sum(e["sent"] for e in ends),
        unfinished=sum(e["unfinished"] for e in ends),
        texts_taken=len(ends) * max(e["texts_taken"] for e in ends),
        reopened=sum(e["reopened"] for e in ends),
        dims=next((e["dims"] for e in ends if e["dims"]), None),
        wire=next((e["wire"] for e in ends if e["wire"]), None),
        details=details,
        lag=max(e["lag"] for e in ends),
        peak_rss=sum(e["peak_rss"] for e in ends),
        interrupted=interrupted,
        clock_jump=(time.time() - started_at) - (time.monotonic() - start),
    )


def _merge(phases: dict[str, PhaseTimes], event: dict[str, Any]) -> None:
    """The phases of all workers as one: widest span, busiest core."""
    cpu = event["cpu"] / max(event["ended"] - event["began"], 1e-9)
    seen = phases.get(event["name"])
    if seen is None:
        phases[event["name"]] = PhaseTimes(event["name"], event["measured"], event["began"], event["ended"], cpu)
        return
    seen.began = min(seen.began, event["began"])
    seen.ended = max(seen.ended, event["ended"])
    seen.cpu = max(seen.cpu, cpu)


def _died(why: str) -> CheckFailedError:
    return CheckFailedError("load_worker_died", f"a load-generating process {why}", "its own words are above")


def main() -> None:
    """Spec file (or `-`) in, result on stdout."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m qwen3emb_launch.bench.load SPEC.json|-")
    text = sys.stdin.read() if sys.argv[1] == "-" else Path(sys.argv[1]).read_text(encoding="utf-8")
    try:
        spec = LoadSpec.from_dict(json.loads(text))
        if spec.vocabulary is None and spec.corpus is None:
            spec = replace(spec, vocabulary=vocabulary_of(spec))
        result = run(spec)
    except (LaunchError, ValueError, TypeError, OSError) as exc:
        raise SystemExit(f"error: {exc}") from None
    sys.stdout.write(json.dumps(result.to_dict()) + "\n")


if __name__ == "__main__":
    main()
