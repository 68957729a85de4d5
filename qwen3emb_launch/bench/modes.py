"""The ways to bench: steady, against others, a sweep to the knee, a burst. Each ends in a Record, partial if stopped.

A mode decides what to send and when to stop; `measure` does it. Ctrl-C ends the load in the air, keeps what it had,
and ends the mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from qwen3emb_launch.bench import endpoint
from qwen3emb_launch.bench.figures import Figures, client_note, figures_of
from qwen3emb_launch.bench.load import Batch, LoadResult
from qwen3emb_launch.bench.load import run as send
from qwen3emb_launch.bench.record import Comparison, Record, Row, Run, TargetInfo, this_tool
from qwen3emb_launch.bench.spec import Phase, Shape
from qwen3emb_launch.bench.target import Ready, Work
from qwen3emb_launch.bench.watch import Watch
from qwen3emb_launch.statistics import Slo, ratio

Measured = TypeVar("Measured", Run, Row)

COMPARED = ("texts_per_s", "p50", "p95", "p99")
KNEE_GAIN = 0.05  # a doubling of the clients that brings less is past the knee
SUSTAINED = 0.95  # share of the arrivals that must be answered while they last
SWEEP_ERRORS = 0.01  # share of failures that ends a sweep
MOST_CLIENTS = 1024
RATE_STEPS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)  # of the closed-loop peak


class Listener:
    """What a mode tells while it runs; the shell shows it. Every method may be left as it is."""

    def begin(self, title: str, seconds: float) -> None:
        """A load starts; `seconds` in all, warm-up included."""

    def batch(self, batch: Batch) -> None:
        """Requests finished, warm-up included."""

    def end(self, run: Run) -> None:
        """One phase was measured."""


@dataclass(frozen=True)
class Shaping:
    """How the load is laid: clients or rate, for how long, how often."""

    shape: Shape = "closed"
    level: float = 16
    seconds: float = 20.0
    warmup: float = 3.0
    requests: int | None = None
    rounds: int = 1


@dataclass
class Campaign:
    """One bench under way: targets made ready, and what has been measured so far."""

    targets: Sequence[Ready]
    work: Work
    shaping: Shaping
    slo: Slo | None = None
    listener: Listener = field(default_factory=Listener)
    runs: list[Run] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seen: dict[str, LoadResult] = field(default_factory=dict)
    interrupted: bool = False
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    text_start: int = 0

    def measure(self, ready: Ready, phases: Iterable[Phase], number: int = 1, title: str = "") -> list[Run]:
        """Send one load and keep its measured phases. Texts are unique over the whole campaign."""
        spec = replace(
            ready.spec,
            phases=tuple(phases),
            shape=self.shaping.shape,
            requests=self.shaping.requests,
            seed=self.work.seed * 1000 + number,
            text_start=self.text_start,
        )
        self.listener.begin(title or ready.target.name, spec.seconds)
        before = endpoint.queue_seconds(spec)
        with Watch(ready.target.gpu, ready.target.pids) as watch:
            result = send(spec, self.listener.batch)
        self.interrupted |= result.interrupted
        self.text_start += result.texts_taken
        self.seen[ready.target.name] = result
        queue = None if result.interrupted else _queue_ms(before, endpoint.queue_seconds(spec))
        measured = [p for p in result.phases if p.measured]
        found = []
        for phase in measured:
            figures = figures_of(result, phase, self.slo, queue if len(measured) == 1 else None)
            began, ended = result.start + phase.began, result.start + phase.ended
            figures = replace(figures, gpu=watch.gpu_figures(began, ended, figures.tokens_per_s))
            level = next(p.level for p in spec.phases if p.name == phase.name)
            run = Run(
                target=ready.target.name,
                round=number,
                phase=phase.name,
                level=level,
                at=result.started_at + phase.began,
                figures=figures,
                rss=watch.peak_rss(began, ended),
                shape=self.shaping.shape,
            )
            found.append(run)
            self.listener.end(run)
        self._note(result, found)
        self.runs += found
        return found

    def _note(self, result: LoadResult, runs: Sequence[Run]) -> None:
        """Warnings a reader must see beside the figures, once each."""
        notes = []
        if abs(result.clock_jump) > 1:
            notes.append(f"the wall clock jumped by {result.clock_jump:.1f} s; figures use the monotonic clock")
        notes += [note for run in runs if (note := client_note(run.figures))]
        corpus_texts = result.texts_taken
        if result.spec.corpus and corpus_texts:
            notes += _corpus_note(result)
        for note in notes:
            if note.partition("(")[0] not in {w.partition("(")[0] for w in self.warnings}:
                self.warnings.append(note)

    def steady_phases(self, level: float) -> tuple[Phase, ...]:
        """Warm-up, then the measured stretch."""
        warm = (Phase("warmup", self.shaping.warmup, level, measured=False),) if self.shaping.warmup > 0 else ()
        return (*warm, Phase("steady", self.shaping.seconds, level))

    def record(self, mode: str, **more: Any) -> Record:
        """What has been measured so far, as an artefact."""
        notes = [note for ready in self.targets for note in ready.notes]
        return Record(
            mode=mode,
            load={**self.work.public(), **asdict(self.shaping)},
            targets=tuple(self._info(ready) for ready in self.targets),
            runs=tuple(self.runs),
            created=self.created,
            seed=self.work.seed,
            slo=str(self.slo) if self.slo else None,
            warnings=tuple(dict.fromkeys([*notes, *self.warnings])),
            partial=self.interrupted,
            tool=this_tool(),
            **more,
        )

    def _info(self, ready: Ready) -> TargetInfo:
        result = self.seen.get(ready.target.name)
        vocabulary = ready.spec.vocabulary
        return TargetInfo(
            name=ready.target.name,
            url=ready.spec.url,
            model=ready.spec.model,
            facts=dict(ready.target.facts),
            tokens_exact=bool(vocabulary and vocabulary.exact),
            dims=result.dims if result else None,
            wire=result.wire if result else None,
            fingerprint=dict(ready.target.fingerprint),
        )


def steady(campaign: Campaign) -> Record:
    """The same load, `rounds` times; several targets take turns, and are compared with the first."""
    shaping = campaign.shaping
    for number in range(1, shaping.rounds + 1):
        order = campaign.targets if number % 2 else list(reversed(campaign.targets))
        for ready in order:
            title = f"{ready.target.name}, round {number} of {shaping.rounds}" if shaping.rounds > 1 else ""
            campaign.measure(ready, campaign.steady_phases(shaping.level), number, title)
            if campaign.interrupted:
                return campaign.record(_steady_name(campaign), comparisons=compare(campaign.runs))
    return campaign.record(_steady_name(campaign), comparisons=compare(campaign.runs))


def _steady_name(campaign: Campaign) -> str:
    return "versus" if len(campaign.targets) > 1 else "steady"


def burst(campaign: Campaign, factor: float) -> Record:
    """The level, `factor` times it, the level again: how long does the aftermath last?"""
    shaping = campaign.shaping
    for ready in campaign.targets:
        base, high = shaping.level, shaping.level * factor
        phases = (
            Phase("warmup", shaping.warmup, base, measured=False),
            Phase("before", shaping.seconds, base),
            Phase("burst", shaping.seconds, high),
            Phase("after", shaping.seconds, base),
        )
        campaign.measure(ready, phases, title=f"{ready.target.name}, {factor:g}x burst")
        if campaign.interrupted:
            break
    return campaign.record("burst")


def sweep(campaign: Campaign, levels: Sequence[float] | None) -> Record:
    """Rising levels. None chooses them: clients doubled, or rates in steps of the peak, until more brings no more."""
    for ready in campaign.targets:
        planned = list(levels) if levels else _first_levels(campaign, ready)
        seen: list[Run] = []
        for number, level in enumerate(_rising(planned, campaign.shaping.shape, seen, chosen=levels is not None), 1):
            what = "clients" if campaign.shaping.shape == "closed" else "requests/s"
            seen += campaign.measure(
                ready, campaign.steady_phases(level), number, f"{ready.target.name}, {level:g} {what}"
            )
            if campaign.interrupted:
                break
        if campaign.interrupted:
            break
    return campaign.record("sweep", knee=knee(campaign.runs, campaign.shaping.shape, campaign.slo))


def _first_levels(campaign: Campaign, ready: Ready) -> list[float]:
    """Where a sweep of the tool's own choosing starts: one client, or shares of the closed loop's peak."""
    if campaign.shaping.shape == "closed":
        return [1.0]
    open_loop = campaign.shaping
    campaign.shaping = replace(open_loop, shape="closed")
    kept = len(campaign.runs)
    peak = campaign.measure(ready, campaign.steady_phases(max(1, open_loop.level)), title=f"{ready.target.name}, peak")
    campaign.shaping = open_loop
    del campaign.runs[kept:]
    top = peak[-1].figures.requests_per_s if peak else 0.0
    return [max(0.1, round(top * step, 1)) for step in RATE_STEPS] if top else []


def _rising(planned: list[float], shape: Shape, seen: list[Run], chosen: bool) -> Iterable[float]:
    """The planned levels; beyond them a closed loop of the tool's own choosing doubles until it pays no more."""
    yield from _until_broken(planned, seen, chosen)
    if chosen or shape == "open":
        return
    level = planned[-1]
    while level < MOST_CLIENTS and not (seen and seen[-1].figures.error_rate > SWEEP_ERRORS):
        rates = [r.figures.requests_per_s for r in seen]
        if len(rates) >= 3 and max(rates[-2:]) < max(rates[:-2]) * (1 + KNEE_GAIN):
            return
        level *= 2
        yield level


def _until_broken(planned: Sequence[float], seen: Sequence[Run], chosen: bool) -> Iterable[float]:
    for level in planned:
        if not chosen and seen and seen[-1].figures.error_rate > SWEEP_ERRORS:
            return
        yield level


def knee(runs: Sequence[Run], shape: Shape, slo: Slo | None) -> dict[str, Any]:
    """By target: the level from which more brings no more, and the highest that meets the objective.

    Closed loop: the fewest clients within 5% of the best rate. Open loop: the highest rate that is 95% answered, of the
    requests that really came: in a few seconds Poisson arrivals are off the rate asked for by more; the lowest one,
    not `kept`, where none was. `passed`: a level above it was tried, else the knee lies somewhere beyond.
    `nearest` is the level that came closest when none met the objective.
    """
    out: dict[str, Any] = {}
    for name in dict.fromkeys(r.target for r in runs):
        tried = [r for r in runs if r.target == name]
        mine = [r for r in tried if r.figures.requests]
        if not mine:
            out[name] = None
            continue
        best = max(r.figures.requests_per_s for r in mine)
        if shape == "closed":
            kept = [r for r in mine if r.figures.requests_per_s >= best * (1 - KNEE_GAIN)]
            at = min(kept, key=lambda r: r.level)
        else:
            kept = [r for r in mine if r.figures.requests_per_s >= SUSTAINED * r.figures.arrived_per_s]
            at = max(kept, key=lambda r: r.level) if kept else min(mine, key=lambda r: r.level)
        found: dict[str, Any] = {
            "level": at.level,
            "requests_per_s": at.figures.requests_per_s,
            "kept": bool(kept),
            "passed": any(r.level > at.level for r in tried),
        }
        if slo:
            meeting = [r for r in mine if not r.figures.slo_misses]
            top = max(meeting, key=lambda r: r.level, default=None)
            found["slo_level"] = top.level if top else None
            found["slo_requests_per_s"] = top.figures.requests_per_s if top else None
            if top is None:
                near = nearest_miss(mine, slo)
                found["nearest"] = {"level": near.level, "misses": list(near.figures.slo_misses)}
        out[name] = found
    return out


def nearest_miss(runs: Sequence[Measured], slo: Slo) -> Measured:
    """The one that came closest to the objective: the smallest worst ratio of seen to limit."""
    from qwen3emb_launch.bench.histogram import LatencyHistogram

    def excess(run: Run | Row) -> float:
        histogram = LatencyHistogram(run.figures.histogram or None)
        worst = [(histogram.at(p) or float("inf")) / limit for p, limit in slo.limits.items()]
        if slo.errors is not None and run.figures.error_rate > slo.errors:
            worst.append(run.figures.error_rate / max(slo.errors, 1e-6))
        return max(worst, default=0.0)

    return min(runs, key=excess)


def measure_of(figures: Figures, name: str) -> float | None:
    """One of COMPARED."""
    value = figures.texts_per_s if name == "texts_per_s" else getattr(figures.latency, name)
    return None if value is None else float(value)


def compare(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """Every later target over the first, round by round; rounds that one of them lacks are left out."""
    names = list(dict.fromkeys(r.target for r in runs))
    if len(names) < 2:
        return ()
    by = {(r.target, r.round): r.figures for r in runs}
    found = []
    for name in names[1:]:
        ratios = {}
        for measure in COMPARED:
            pairs = [
                (measure_of(by[names[0], n], measure), measure_of(by[name, n], measure))
                for n in sorted({r.round for r in runs})
                if (names[0], n) in by and (name, n) in by
            ]
            good = [(a, b) for a, b in pairs if a and b and a > 0 and b > 0]
            if good:
                ratios[measure] = ratio([a for a, _ in good], [b for _, b in good])
        found.append(Comparison(names[0], name, ratios))
    return tuple(found)


def _queue_ms(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    """Mean time in the engine's queue between two readings, in milliseconds."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1]) * 1000


def _corpus_note(result: LoadResult) -> list[str]:
    from pathlib import Path

    with Path(result.spec.corpus or "").open("rb") as lines:
        have = sum(1 for _ in lines)
    if result.texts_taken <= have:
        return []
    times = result.texts_taken / have
    return [f"the corpus was sent more than once ({have} texts, {times:.1f} times in one load): a cache may flatter"]
