"""From finished requests to figures: throughput, latency, errors, goodput, and whether the client was the limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3emb_launch.bench.histogram import LatencyHistogram
from qwen3emb_launch.bench.load import Batch, LoadResult, PhaseTimes
from qwen3emb_launch.statistics import Slo, percentile

BUSY_CLIENT = 0.85  # share of a core above which the client may be what was measured
# Late sends are the client's doing where it is half busy: below that, few of its moments fall into another's work.
LATE_CLIENT = 0.5
LATE_SHARE = 0.05  # of the latency, 99th percentile beside 99th percentile: what makes the client visible in it
LEAST_LATE = 0.001  # seconds
STARVED = 0.25  # of p99: sends so late from a client with little to do, whose event loop was as late
TIMELINE_BUCKETS = 120


@dataclass(frozen=True)
class Latency:
    """Milliseconds, of right answers; None when there was none. From the scheduled send time in an open loop."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True)
class ClientLoad:
    """What the load generator itself was busy with. `cpu` is the busiest process's share of one core.

    `late_ms` is the 99th percentile of scheduled to sent: above zero only in an open loop.
    """

    cpu: float
    late_ms: float
    lag_ms: float
    peak_rss: int
    processes: int
    limited: bool


@dataclass(frozen=True)
class GpuFigures:
    """NVML over one phase. Each is None where NVML did not say. Energy is per million prompt tokens, in watt hours."""

    busy: float | None
    memory_bytes: int | None
    watts: float | None
    watt_hours_per_million_tokens: float | None


@dataclass(frozen=True)
class Figures:
    """One measured phase of one load on one endpoint.

    Rates count right answers only; after a warm-up, a request across the phase's edge counts by the part inside.
    `failed` is by kind. `timeline` is (second, requests/s, p50 ms, p95 ms), `histogram` HdrHistogram's own text form.
    """

    seconds: float
    requests: int
    failed: Mapping[str, int]
    requests_per_s: float
    texts_per_s: float
    tokens_per_s: float | None
    tokens_per_text: float | None
    error_rate: float
    latency: Latency
    goodput_per_s: float | None
    slo_misses: tuple[str, ...]
    queue_ms: float | None
    client: ClientLoad
    gpu: GpuFigures | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    timeline: tuple[tuple[float, float, float | None, float | None], ...] = ()
    histogram: str = ""

    @property
    def arrived_per_s(self) -> float:
        """Requests that were to be answered, whatever came of them."""
        return (self.requests + sum(self.failed.values())) / self.seconds

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Figures:
        """The inverse of `results.plain`."""
        values = dict(data)
        values["latency"] = Latency(**values["latency"])
        values["client"] = ClientLoad(**values["client"])
        values["gpu"] = GpuFigures(**values["gpu"]) if values.get("gpu") else None
        values["slo_misses"] = tuple(values["slo_misses"])
        values["timeline"] = tuple((r[0], r[1], r[2], r[3]) for r in values["timeline"])
        return cls(**values)


def window(result: LoadResult, phase: PhaseTimes) -> tuple[float, float]:
    """The phase's span in seconds since the start; a load of N requests lasts until its last answer."""
    if result.spec.requests is None or not len(result.batch):
        return phase.began, phase.ended
    return phase.began, max(phase.began + 1e-9, max(result.batch.done))


def figures_of(result: LoadResult, phase: PhaseTimes, slo: Slo | None, queue_ms: float | None = None) -> Figures:
    """The figures of one phase. Requests belong to the phase in which they were scheduled."""
    spec = result.spec
    began, ended = window(result, phase)
    failed: Counter[str] = Counter()
    latencies: list[float] = []
    late: list[float] = []
    inside = token_share = 0.0
    counted = tokens = 0
    limit = slo.strictest if slo else None
    good = 0.0
    warmed = phase is not result.phases[0]  # else nothing was in flight at the first edge to balance the last one
    for scheduled, sent, done, used, kind in result.batch.rows():
        begins = scheduled >= began and (scheduled < ended or spec.requests is not None)
        if kind:
            failed[kind] += begins
            continue
        latency = done - scheduled
        share = _overlap(sent, done, began, ended) if warmed else float(begins and done <= ended)
        inside += share
        if limit is not None and latency <= limit:
            good += share
        if used >= 0:
            token_share += share * used
        if begins:
            latencies.append(latency)
            late.append(sent - scheduled)
            if used >= 0:
                tokens += used
                counted += 1
    if result.unfinished and phase is _last_measured(result):
        failed["unfinished"] += result.unfinished
    failed = +failed
    seconds = max(ended - began, 1e-9)
    histogram = LatencyHistogram()
    histogram.record_all(latencies)
    wrong = sum(failed.values())
    error_rate = wrong / (wrong + len(latencies)) if wrong else 0.0
    percentiles = {at: seen for at in (slo.limits if slo else ()) if (seen := histogram.at(at)) is not None}
    late_p99 = percentile(late, 99) if late else 0.0
    return Figures(
        seconds=seconds,
        requests=len(latencies),
        failed=dict(failed),
        requests_per_s=inside / seconds,
        texts_per_s=inside * spec.batch / seconds,
        tokens_per_s=token_share / seconds if counted else None,
        tokens_per_text=tokens / counted / spec.batch if counted else None,
        error_rate=error_rate,
        latency=Latency(*(_ms(v) for v in (histogram.mean(), *(histogram.at(p) for p in (50, 90, 95, 99, 100))))),
        goodput_per_s=good / seconds if limit is not None else None,
        slo_misses=tuple(slo.misses(percentiles, error_rate)) if slo else (),
        queue_ms=queue_ms,
        client=ClientLoad(
            cpu=phase.cpu,
            late_ms=late_p99 * 1000,
            lag_ms=result.lag * 1000,
            peak_rss=result.peak_rss,
            processes=spec.processes,
            limited=client_limits(phase.cpu, late_p99, result.lag, histogram.at(99)),
        ),
        details={k: v for k, v in result.details.items() if k in failed},
        timeline=_timeline(result.batch, began, ended),
        histogram=histogram.encode() if latencies else "",
    )


def client_limits(cpu: float, late: float, lag: float, latency: float | None) -> bool:
    """Whether the figures may be the load generator's own, not the endpoint's.

    `cpu` is its busiest process's share of a core, `late` and `latency` 99th percentiles, `lag` the worst of its event
    loop, in seconds. Sends wait for a free connection too, at an endpoint that does not keep up: then the loop is on
    time, and the endpoint is what was measured.
    """
    if cpu > BUSY_CLIENT:
        return True
    return cpu > LATE_CLIENT and latency is not None and min(late, lag) > max(LEAST_LATE, LATE_SHARE * latency)


def client_note(figures: Figures) -> str | None:
    """What the load generator had to do with the figures, if anything."""
    client, tail = figures.client, figures.latency.p99
    if client.limited:
        return (
            f"the client may be the limit (its busiest process used {client.cpu:.0%} of a core, sends up to "
            f"{client.late_ms:.1f} ms late): repeat with --processes {2 * client.processes}"
        )
    if tail and min(client.late_ms, client.lag_ms) > STARVED * tail:
        return (
            f"the client had to wait for a core (sends up to {client.late_ms:.1f} ms late at {client.cpu:.0%} of one): "
            "latencies include it; load from another machine, or leave this one a core"
        )
    return None


def _overlap(sent: float, done: float, began: float, ended: float) -> float:
    """The part of a request's life inside the window: 1 for one wholly inside. Takes the edges' chance out of rates."""
    if sent >= began and done <= ended:
        return 1.0
    inside = min(done, ended) - max(sent, began)
    return max(0.0, inside / (done - sent)) if done > sent else 0.0


def _last_measured(result: LoadResult) -> PhaseTimes | None:
    return next((p for p in reversed(result.phases) if p.measured), None)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _timeline(batch: Batch, began: float, ended: float) -> tuple[tuple[float, float, float | None, float | None], ...]:
    """Completions and latencies by second, or by as many seconds as keep it to 120 points, to the end of the phase."""
    count = min(TIMELINE_BUCKETS, round(ended - began))
    if count < 2:
        return ()
    width = (ended - began) / count
    buckets: list[list[float]] = [[] for _ in range(count)]
    for scheduled, _, done, _, kind in batch.rows():
        number = int((done - began) // width)
        if not kind and 0 <= number < count:
            buckets[number].append(done - scheduled)
    return tuple(
        (
            round(number * width, 3),
            len(bucket) / width,
            _ms(percentile(bucket, 50)) if bucket else None,
            _ms(percentile(bucket, 95)) if bucket else None,
        )
        for number, bucket in enumerate(buckets)
    )
