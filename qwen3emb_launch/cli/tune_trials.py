"""What `tune` tries things on: engines started by `up`, proven by `verify --level quick`, loaded by `bench`."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.errors import EngineFailedError
from qwen3emb_launch.tune.objective import WRONG, Objective
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof

if TYPE_CHECKING:
    from pathlib import Path

    from qwen3emb_launch.bench.figures import Figures
    from qwen3emb_launch.bench.modes import Campaign
    from qwen3emb_launch.bench.record import Run
    from qwen3emb_launch.bench.spec import Vocabulary
    from qwen3emb_launch.bench.target import Ready, Work
    from qwen3emb_launch.cli.launching import Chosen, LaunchOptions
    from qwen3emb_launch.cli.temporary import Temporary
    from qwen3emb_launch.facts import LaunchPlan
    from qwen3emb_launch.planning import PlanRequest
    from qwen3emb_launch.state import InstanceRecord
    from qwen3emb_launch.verify.reference import ReferenceSet

LOOPBACK = "127.0.0.1"  # whatever the profile says: a trial is for nobody else
ONCE = {"restart.limit": "0"}  # a configuration that dies is a result, not to be tried again and again
FIRST_PORT = 30200
NOTICED_WITHIN = 3.0  # seconds from failing requests to the supervisor's word about a dead engine
MEMORY_BACK_WITHIN = 15.0  # seconds from an engine's end until the driver has given its memory back
MEMORY_NOISE = 256 << 20
SHORTEST = 3.0  # seconds that an answer is awaited, however little is left
ANSWERED = 0.9  # share of the arrivals of an open loop that must be answered while it lasts


@dataclass
class Engines:
    """The machine of a run: plans, starts, proves and measures configurations of one plan.

    `fixed` are the user's own `--set` words; `changing` names the settings that may change the vectors. `vocabulary` is
    found on the first engine that is loaded: all serve one model.
    """

    options: LaunchOptions
    chosen: Chosen
    plan_now: LaunchPlan
    fixed: Mapping[str, str]
    work: Work
    objective: Objective
    open_loop: bool
    warmup: float
    vectors: Path
    ram_bytes: int | None = None  # free when the run began, for engines without a GPU; None is not known
    changing: frozenset[str] = frozenset()
    warn: Callable[[str], None] = print
    say: Callable[[str], None] = print
    baseline: ReferenceSet | None = None
    texts: int = 0  # where the next load's texts begin: none is sent twice
    warned: set[str] = field(default_factory=set)
    vocabulary: Vocabulary | None = None

    def plan(self, moves: Moves) -> str:
        """The command, without what differs from start to start."""
        planned = self._plan(moves)
        parts = [planned.argv, dict(planned.env), planned.replicas, planned.gateway]
        return json.dumps(parts, sort_keys=True, default=str)

    def _plan(self, moves: Moves) -> LaunchPlan:
        from qwen3emb_launch import planning

        return planning.plan(self.request(moves))

    def request(self, moves: Moves) -> PlanRequest:
        """What `up` would plan, on the engine, model and GPU that were found at the beginning."""
        from qwen3emb_launch import planning
        from qwen3emb_launch.planning.front import FIRST_PRIVATE_PORT

        return planning.PlanRequest(
            profile=self.chosen.profile,
            model=self.plan_now.model,
            engine=self.plan_now.engine,
            gpu=self.chosen.gpu,
            overrides={**self.fixed, **dict(moves)},
            environ=dict(os.environ),
            name="tune",
            host=LOOPBACK,
            port=FIRST_PORT,
            engine_port=FIRST_PRIVATE_PORT,
            ram_bytes=self.ram_bytes,
            gateway_workers=int((self.plan_now.gateway or {}).get("workers", 1)),
        )

    def keep_baseline(self, vectors: ReferenceSet) -> None:
        """What later trials are held to, also those of a resumed run."""
        from qwen3emb_launch.verify.reference import save

        self.baseline = vectors
        save(vectors, self.vectors)

    def load_baseline(self) -> None:
        """The vectors that an earlier run of this journal kept."""
        from qwen3emb_launch.verify.reference import load

        if self.vectors.is_file():
            self.baseline = load(self.vectors)

    @contextmanager
    def start(self, moves: Moves, slot: int, within: float) -> Iterator[Served]:
        """Served by `up` in an instance of its own, ended without waiting for anybody."""
        from qwen3emb_launch import state
        from qwen3emb_launch.cli.temporary import serving
        from qwen3emb_launch.engine_process.ports import free_port

        name = f"tune-{slot + 1}"
        card = self.chosen.gpu
        before = self._memory()
        words = self._words(moves, free_port(LOOPBACK, FIRST_PORT + 20 * slot))
        began = time.monotonic()
        try:
            with serving(name, words, within, environ=_pinned(self.chosen), drain=False, say=self.say) as run:
                ready = time.monotonic() - began
                _, record = state.running(name)
                index = None if card is None else card.index
                yield Served(self, moves, record, ready, began + within, before, index, run)
        finally:
            self._memory_back(before)

    def _words(self, moves: Moves, port: int) -> list[str]:
        options = self.options
        words = ["--host", LOOPBACK, "--port", str(port), "--no-verify"]
        for option, value in (("--profile", options.profile), ("--model", options.model), ("--engine", options.engine)):
            words += [option, value] if value is not None else []
        words += ["--offline"] if options.offline else []
        for key, value in {**ONCE, **self.fixed, **dict(moves)}.items():
            words += ["--set", f"{key}={value}"]
        return words

    def _memory(self) -> int | None:
        """Bytes used on the GPU now, by everybody."""
        from qwen3emb_launch import gpu

        if self.chosen.gpu is None:
            return None
        with gpu.sampler(self.chosen.gpu.index) as sample:
            seen = sample()
        return seen.memory_bytes if seen else None

    def _memory_back(self, before: int | None) -> None:
        """The next plan looks at free memory: wait until the driver has this engine's back."""
        end = time.monotonic() + MEMORY_BACK_WITHIN
        pause = threading.Event()
        while before is not None and time.monotonic() < end:
            used = self._memory()
            if used is None or used <= before + MEMORY_NOISE:
                return
            pause.wait(0.2)


@dataclass
class Served:
    """One configuration while it serves. `deadline` is the monotonic moment when the run's budget is over."""

    engines: Engines
    moves: Moves
    record: InstanceRecord
    ready_s: float
    deadline: float
    memory_before: int | None
    gpu: int | None
    run: Temporary | None = None
    _ready: Ready | None = None

    def prove(self) -> Proof:
        """The quick level; vectors are held to the baseline's, unless a setting may change them."""
        proof = self._proof()
        if self.run:
            self.run.failed |= not proof.passed
        return proof

    def _proof(self) -> Proof:
        from qwen3emb_launch import state
        from qwen3emb_launch.cli.verify import read_plan
        from qwen3emb_launch.paths import paths
        from qwen3emb_launch.verify.diff import compare_sets
        from qwen3emb_launch.verify.runner import Request, verify
        from qwen3emb_launch.verify.session import Options

        instance, _ = state.running(self.record.name)
        known, _ = read_plan(instance.plan)
        options = Options("quick", context=self.record.context_length)
        memory = paths().cache / "weights.json"
        report, kept = verify(
            Request(
                self.record.base_url,
                options,
                memory,
                api_key=_key(),
                timeout=self._at_most(60.0) / 3,  # after three without an answer it asks no more
                known=known,
                keep_vectors=True,
            )
        )
        fingerprint = str(report.fingerprint.get("id"))
        if not report.passed or kept is None:
            why = "; ".join(f"{c.title}: {c.cause or c.seen}" for c in report.failures)
            return Proof(False, why or report.summary, fingerprint)
        if not self.moves:
            self.engines.keep_baseline(kept)
        if not self.moves or self.engines.baseline is None:
            return Proof(True, report.summary, fingerprint)
        allowed = float(report.environment["allowed_distance"] or 0.0)
        found = compare_sets(self.engines.baseline, kept, 2 * allowed)
        cosine = found.cosine.get("min")
        if not found.may_share and not self.engines.changing & {key for key, _ in self.moves}:
            return Proof(False, f"other vectors than the baseline's: {found.reason}", fingerprint, cosine)
        return Proof(True, report.summary, fingerprint, cosine)

    def measure(self, level: float, seconds: float) -> Measurement:
        """One load, every answer checked."""
        from qwen3emb_launch.bench.modes import Campaign, Shaping

        engines = self.engines
        shape = "open" if engines.open_loop else "closed"
        shaping = Shaping(shape, level, seconds, engines.warmup)  # type: ignore[arg-type]
        ready = self._target()
        drain = self._at_most(ready.spec.drain, besides=seconds + engines.warmup)
        ready = replace(ready, spec=replace(ready.spec, drain=drain))
        campaign = Campaign([ready], engines.work, shaping, engines.objective.slo)
        campaign.text_start = engines.texts
        runs = campaign.measure(ready, campaign.steady_phases(level))
        engines.texts = campaign.text_start
        if campaign.interrupted:
            raise KeyboardInterrupt
        self._tell(campaign)
        measured = self._measurement(runs[-1])
        self._alive(measured)
        return measured

    def _at_most(self, seconds: float, besides: float = 0.0) -> float:
        """So many seconds, or what is left of the budget beside others: a dead engine must not outlast it."""
        return max(SHORTEST, min(seconds, self.deadline - time.monotonic() - besides))

    def _target(self) -> Ready:
        from qwen3emb_launch.bench.target import Target, prepare

        if self._ready is None:
            target = Target(
                name=self.record.name,
                url=self.record.base_url,
                model=self.record.served_model_name,
                api_key=_key(),
                gpu=self.gpu,
                pids=lambda: tuple(e.pid for e in self.record.engines),
                tokenizer=self.engines.plan_now.model.path / "tokenizer.json",
            )
            self._ready = prepare(target, self.engines.work, self.engines.vocabulary)
            self.engines.vocabulary = self._ready.spec.vocabulary
        return self._ready

    def _tell(self, campaign: Campaign) -> None:
        """What a reader of the figures must know, once."""
        for note in (*(n for r in campaign.targets for n in r.notes), *campaign.warnings):
            kind = note.partition("(")[0].replace(self.record.name, "")
            if kind not in self.engines.warned:
                self.engines.warned.add(kind)
                self.engines.warn(note)

    def _measurement(self, run: Run) -> Measurement:
        from qwen3emb_launch.bench.histogram import LatencyHistogram

        figures, objective = run.figures, self.engines.objective
        at = LatencyHistogram(figures.histogram or None).at(objective.percentile)
        latency = figures.latency
        return Measurement(
            level=run.level,
            seconds=figures.seconds + self.engines.warmup,
            requests_per_s=figures.requests_per_s,
            texts_per_s=figures.texts_per_s,
            tokens_per_s=figures.tokens_per_s,
            p50=latency.p50,
            p95=latency.p95,
            p99=latency.p99,
            objective_ms=None if at is None else at * 1000,
            error_rate=figures.error_rate,
            misses=self._misses(figures),
            memory_bytes=self._memory_of(run),
            watts=figures.gpu.watts if figures.gpu else None,
        )

    def _misses(self, figures: Figures) -> tuple[str, ...]:
        """Objectives missed; failures and a rate that is not kept up with are misses without being asked for."""
        found = list(figures.slo_misses)
        slo = self.engines.objective.slo
        if (slo is None or slo.errors is None) and figures.error_rate > WRONG:
            kinds = ", ".join(f"{kind} {count}" for kind, count in figures.failed.items())
            found.append(f"errors {figures.error_rate:.2%} ({kinds})")
        # What really arrived, not the rate asked for: in a few seconds Poisson arrivals are off by more than that.
        arrived = figures.arrived_per_s
        if self.engines.open_loop and figures.requests_per_s < ANSWERED * arrived:
            found.append(f"{figures.requests_per_s:.4g} of {arrived:.4g} requests/s answered in time")
        return tuple(found)

    def _memory_of(self, run: Run) -> int | None:
        seen = run.figures.gpu.memory_bytes if run.figures.gpu else None
        if seen is not None and self.memory_before is not None:
            return max(0, seen - self.memory_before)
        return run.rss

    def _alive(self, measured: Measurement) -> None:
        """Figures of an engine that died meanwhile are none."""
        from qwen3emb_launch import state
        from qwen3emb_launch.lifecycle import State

        end = time.monotonic() + (NOTICED_WITHIN if measured.error_rate > WRONG else 0.0)
        pause = threading.Event()
        while True:
            found = state.load(self.record.name)
            record = found.record if found else None
            lives = record is not None and record.state in (State.READY, State.DEGRADED)
            if record is None or not lives or record.restarts > self.record.restarts:
                said = record.reason if record else "its record is gone"
                raise EngineFailedError(
                    "engine_died",
                    f"the engine died under {measured.level:g}: {said}",
                    f"qwen3emb logs {self.record.name}",
                )
            if time.monotonic() >= end:
                return
            pause.wait(0.1)


def _key() -> str | None:
    """Of a gateway that asks for one."""
    return os.environ.get("OPENAI_API_KEY")


def _pinned(chosen: Chosen) -> dict[str, str]:
    """Every start on the same card, whichever has the most free memory then."""
    if chosen.gpu is None:
        return {}
    return {"CUDA_VISIBLE_DEVICES": str(chosen.gpu.index), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def facts_of(plan: LaunchPlan) -> dict[str, Any]:
    """What the figures were measured on, for the journal's identity and the evidence."""
    from qwen3emb_launch import __version__

    packages = plan.engine.packages
    versions = {"sglang": plan.engine.version} | {k: packages[k] for k in ("torch", "transformers") if k in packages}
    if plan.engine.plugin:
        versions["plugin"] = plan.engine.plugin
    return {
        "profile": plan.profile,
        "profile_hash": plan.profile_hash,
        "model": plan.model.name,
        "revision": plan.model.revision,
        "weight_bytes": plan.model.weight_bytes,
        "hardware": plan.gpu.name if plan.gpu else processor(),
        "driver": plan.gpu.driver if plan.gpu else None,
        "versions": {**versions, "qwen3emb": __version__},
    }


def processor() -> str:
    """The CPU's own name and the number of cores that this process may use."""
    from pathlib import Path

    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
