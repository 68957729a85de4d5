"""What the gateway counts, as plain numbers on the hot path and Prometheus text when somebody asks.

Counters are incremented in place (no locks: one process, one event loop). A snapshot is a flat mapping of series to
numbers, so that the workers' snapshots can be added up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from time import monotonic

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PARTS = ("total", "queue", "engine", "gateway")
RECENT = 2_000  # requests kept for the status page's percentiles

HELP: dict[str, tuple[str, str]] = {
    "qwen3emb_requests_total": ("counter", "Embedding requests by HTTP status and whose error it was."),
    "qwen3emb_items_total": ("counter", "Inputs answered with a vector."),
    "qwen3emb_tokens_total": ("counter", "Prompt tokens of answered inputs."),
    "qwen3emb_cached_tokens_total": ("counter", "Prompt tokens of inputs answered from the cache."),
    "qwen3emb_request_seconds": ("histogram", "Time of a request: total, queue (for a call), engine, gateway."),
    "qwen3emb_cache_hits_total": ("counter", "Inputs found, by cache level."),
    "qwen3emb_cache_misses_total": ("counter", "Inputs not found in any cache level."),
    "qwen3emb_cache_entries": ("gauge", "Vectors in memory."),
    "qwen3emb_cache_bytes": ("gauge", "Bytes of vectors in memory, with bookkeeping."),
    "qwen3emb_cache_evictions_total": ("counter", "Vectors evicted from memory."),
    "qwen3emb_coalesced_total": ("counter", "Inputs that joined an equal one already on its way."),
    "qwen3emb_engine_calls_total": ("counter", "Calls to engines that brought vectors."),
    "qwen3emb_engine_call_items": ("histogram", "Inputs of a call."),
    "qwen3emb_engine_tokens_total": ("counter", "Prompt tokens sent to engines."),
    "qwen3emb_retries_total": ("counter", "Inputs sent again after an engine failed or was busy."),
    "qwen3emb_queue_items": ("gauge", "Inputs waiting for a call."),
    "qwen3emb_in_air_items": ("gauge", "Inputs in calls."),
    "qwen3emb_connections": ("gauge", "Open client connections."),
    "qwen3emb_upstream_up": ("gauge", "1 for an engine that gets traffic."),
    "qwen3emb_upstream_calls_total": ("counter", "Answered and failed calls of an engine."),
    "qwen3emb_saved_money_total": ("counter", "What the answered tokens would have cost at the named API's price."),
}  # fmt: skip


class Histogram:
    """Counts by bucket; `sum` in the unit of the values."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """One observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def series(self, name: str, labels: str = "") -> Iterable[tuple[str, float]]:
        """Its cumulative series in Prometheus' form."""
        inner = labels[1:-1] + "," if labels else ""
        running = 0
        for bound, count in zip((*map(_number, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{{inner}le="{bound}"}}', running
        yield f"{name}_sum{labels}", self.sum
        yield f"{name}_count{labels}", running


class Metrics:
    """Everything counted in one process."""

    def __init__(self) -> None:
        self.started = monotonic()
        self.requests: Counter[tuple[int, str]] = Counter()
        self.items = 0
        self.tokens = 0
        self.cached_tokens = 0
        self.hits = {"memory": 0, "disk": 0}
        self.misses = 0
        self.coalesced = 0
        self.calls = 0
        self.engine_tokens = 0
        self.retries = 0
        self.seconds = {part: Histogram(BUCKETS) for part in PARTS}
        self.call_items = Histogram(SIZES)
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._rate_since = monotonic()
        self._rate_items = 0
        self._rate = 0.0

    def answered(self, total: float, queue: float, engine: float, now: float) -> None:
        """A request was answered with vectors; seconds."""
        seconds = self.seconds
        seconds["total"].add(total)
        if engine:
            seconds["queue"].add(queue)
            seconds["engine"].add(engine)
        seconds["gateway"].add(max(0.0, total - queue - engine))
        self.recent.append((now, total))

    def call(self, items: int, tokens: int, seconds: float) -> None:
        """A call to an engine brought vectors."""
        self.calls += 1
        self.engine_tokens += tokens
        self.call_items.add(items)
        self._rate_items += items
        elapsed = monotonic() - self._rate_since
        if elapsed >= 1.0:
            self._rate = self._rate_items / elapsed
            self._rate_items, self._rate_since = 0, monotonic()

    @property
    def items_per_second(self) -> float:
        """What the engines did lately."""
        return self._rate

    def snapshot(self) -> dict[str, float]:
        """Series and values of what is counted here; gauges of other parts are added by the caller."""
        out: dict[str, float] = {
            "qwen3emb_items_total": self.items,
            "qwen3emb_tokens_total": self.tokens,
            "qwen3emb_cached_tokens_total": self.cached_tokens,
            "qwen3emb_cache_misses_total": self.misses,
            "qwen3emb_coalesced_total": self.coalesced,
            "qwen3emb_engine_calls_total": self.calls,
            "qwen3emb_engine_tokens_total": self.engine_tokens,
            "qwen3emb_retries_total": self.retries,
        }
        for (status, source), count in sorted(self.requests.items()):
            out[f'qwen3emb_requests_total{{status="{status}",error_source="{source}"}}'] = count
        for level, count in self.hits.items():
            out[f'qwen3emb_cache_hits_total{{level="{level}"}}'] = count
        for part, histogram in self.seconds.items():
            out.update(histogram.series("qwen3emb_request_seconds", f'{{part="{part}"}}'))
        out.update(self.call_items.series("qwen3emb_engine_call_items"))
        return out

    def recent_seconds(self, window: float) -> list[float]:
        """Times of the requests answered within the last `window` seconds, at most the last 2,000."""
        since = monotonic() - window
        return [seconds for at, seconds in self.recent if at >= since]


def label(value: str) -> str:
    """A label's value, escaped as the exposition format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def add_up(snapshots: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Several workers' snapshots as one. Everything here is a count or a size, so sums are right; an upstream is up
    when any worker has it up."""
    total: dict[str, float] = {}
    for snapshot in snapshots:
        for series, value in snapshot.items():
            if series.startswith("qwen3emb_upstream_up"):
                total[series] = max(total.get(series, 0), value)
            else:
                total[series] = total.get(series, 0) + value
    return total


def by_worker(snapshots: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Several workers' snapshots beside each other: each series with the label of its worker."""
    out: dict[str, float] = {}
    for worker, snapshot in sorted(snapshots.items()):
        for series, value in snapshot.items():
            name, brace, labels = series.partition("{")
            out[f'{name}{{worker="{worker}"{"," + labels if brace else "}"}'] = value
    return out


def render(snapshot: Mapping[str, float]) -> str:
    """Prometheus text exposition format 0.0.4, families together, in the order of HELP."""
    families: dict[str, list[str]] = {name: [] for name in HELP}
    for series, value in snapshot.items():
        name = series.partition("{")[0]
        for suffix in ("_bucket", "_sum", "_count"):
            if name not in families and name.removesuffix(suffix) in families:
                name = name.removesuffix(suffix)
        families[name].append(f"{series} {_number(value)}")
    lines: list[str] = []
    for name, rows in families.items():
        if rows:
            kind, text = HELP[name]
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *rows]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
