"""`qwen3emb tune` from its words to its exit status, on stand-ins for engines that take what their settings say."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planning_cases as cases
import pytest
from null_server import Behaviour, null_server

from qwen3emb_launch import __version__, state
from qwen3emb_launch.bench import calibrate
from qwen3emb_launch.bench.figures import GpuFigures
from qwen3emb_launch.bench.target import Work
from qwen3emb_launch.cli import tune as command
from qwen3emb_launch.cli import tune_trials
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.cli.launching import Chosen, LaunchOptions
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.profile_files import load
from qwen3emb_launch.state import InstanceRecord, identify
from qwen3emb_launch.tune import winner
from qwen3emb_launch.tune.objective import Goal, Objective
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof
from qwen3emb_launch.vectors import normalised
from qwen3emb_launch.verify import runner
from qwen3emb_launch.verify.reference import ReferenceSet

QUICK = ["--profile", "demo", "-d", "0.8s", "--warmup", "0.1s", "--budget", "5m", "--rounds", "3"]


MEASURE = tune_trials.Served.measure


def record_of(name: str, url: str) -> InstanceRecord:
    me = identify(os.getpid())
    return InstanceRecord(
        name=name, state=State.READY, reason="", supervisor=me, engines=(me,) if me else (), profile="demo",
        model="null", served_model_name="null", base_url=url, engine_url=url, max_dims=256, context_length=8192,
        started_at=time.time(), launcher=__version__,
    )  # fmt: skip


class Trials:
    """What the stand-ins do: `delays` by setting, `before` is called with the number of each start."""

    def __init__(self) -> None:
        self.delays: dict[str, float] = {}
        self.before: Callable[[int], None] = lambda number: None
        self.dies: set[str] = set()
        self.started: list[Moves] = []
        self.chance = random.Random(1)

    @contextmanager
    def start(self, engines: Any, moves: Moves, slot: int, within: float) -> Iterator[Any]:
        self.started.append(moves)
        self.before(len(self.started))
        claim = state.claim(f"tune-{slot + 1}")
        try:
            with null_server(Behaviour(delay=0.005)) as (url, _):
                record = record_of(claim.name, url)
                dead = self.dies & {f"{k}={v}" for k, v in moves}
                claim.write(replace(record, restarts=1) if dead else record)
                yield tune_trials.Served(engines, moves, record, 1.0, time.monotonic() + within, None, None)
                claim.write(replace(record, state=State.STOPPED))
        finally:
            claim.release()

    def measure(self, served: tune_trials.Served, level: float, seconds: float) -> Measurement:
        """A server that answers every request in its delay, within a percent of chance."""
        delay = min((self.delays.get(f"{k}={v}", 0.02) for k, v in served.moves), default=0.02)
        delay *= 1 + 0.01 * self.chance.uniform(-1, 1)
        rate, ms = min(level / delay, 400.0), max(delay, level / 400) * 1000
        limit = min(served.engines.objective.slo.limits.values()) * 1000 if served.engines.objective.slo else 1e9
        misses = (f"p95 {ms:.3g} ms > {limit:g} ms",) if ms > limit else ()
        found = Measurement(level, seconds, rate, rate, 33 * rate, ms, ms, ms, ms, 0.0, misses, 1 << 30)
        served._alive(found)
        return found


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trials:
    made = Trials()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "make_plan", lambda options, chosen, console: cases.plan("demo", "demo"))
    monkeypatch.setattr(tune_trials.Engines, "start", lambda *words: made.start(*words))
    monkeypatch.setattr(tune_trials.Served, "measure", lambda *words: made.measure(*words))
    monkeypatch.setattr(tune_trials.Served, "prove", lambda self: Proof(True, "passed", "f"))
    (tmp_path / "space.yaml").write_text("sleep_on_idle: [false]\nbatch_tokenize: [singles]\ntokenizer_workers: [2]\n")
    return made


def tune(capsys, *words: str) -> tuple[int, dict[str, Any]]:
    status = run(["tune", *QUICK, "--space", "space.yaml", "--out", "mine.yaml", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_winner_becomes_a_profile(trials: Trials, capsys) -> None:
    """The faster setting wins the final; the profile has it, with figures and the command that repeats them."""
    trials.delays["sleep_on_idle=false"] = 0.01
    status, envelope = tune(capsys, "--goal", "latency", "--slo", "p90=1s")
    assert status == 0, envelope
    result = envelope["result"]
    assert result["winner"] == {"sleep_on_idle": "false"}
    assert result["confirmed"]
    assert result["final"][1]["ratio"]["low"] > 1
    assert [t["status"] for t in result["trials"]][:4] == ["ok", "refused", "ok", "ok"]
    assert not result["partial"]
    profile = load("./mine.yaml")
    assert profile.settings.sleep_on_idle is False
    assert [e.unit for e in profile.evidence] == ["texts/s", "ms", "GB", "times"]
    assert profile.evidence[0].command.startswith("qwen3emb bench --profile ./mine.yaml --concurrency 1 --batch 1")
    assert "within p90=1000ms" in profile.evidence[0].what
    assert oct(Path("mine.tune.jsonl").stat().st_mode & 0o777) == "0o600"


def test_people_see_the_trials_and_the_sentence(trials: Trials, capsys) -> None:
    """A line a trial on stderr, tables and the verdict on stdout."""
    words = ["--space", "space.yaml", "--out", "mine.yaml", "--goal", "latency", "--rounds", "0"]
    assert run(["tune", *QUICK, *words]) == 0
    seen = capsys.readouterr()
    assert "trial 2, move: sleep_on_idle=false" in seen.err
    assert "not tried, tokenizer_workers=2: refused: " in seen.err
    lines = [line for line in seen.out.splitlines() if "tokenizer_workers" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Not tried: tokenizer_workers=2: refused: sglang 0.5.15.post1: more than one tokenizer")
    assert "\nResult: " in seen.out
    assert "Wrote" in seen.out
    assert "qwen3emb up --profile ./mine.yaml" in seen.out


def test_an_objective_that_nothing_meets_is_exit_1(trials: Trials, capsys) -> None:
    """No profile; the nearest is in the message and the result."""
    status, envelope = tune(capsys, "--slo", "p95=1ms", "-c", "2")
    assert (status, envelope["error"]["code"]) == (1, "slo_missed")
    assert "nearest: " in envelope["error"]["message"]
    assert envelope["result"]["nearest"]["misses"]
    assert envelope["result"]["winner"] is None
    assert not Path("mine.yaml").exists()


@pytest.mark.parametrize("rounds", ["1", "2"])
def test_a_final_that_could_choose_nothing_is_refused(trials: Trials, capsys, rounds: str) -> None:
    """Fewer rounds than an interval needs: exit 2 with the reason, before anything is started or written."""
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", rounds)
    assert (status, envelope["error"]["code"]) == (2, "too_few_rounds")
    assert "nothing could win it" in envelope["error"]["message"]
    assert "--rounds 3 or more" in envelope["error"]["hint"]
    assert not trials.started
    assert not Path("mine.tune.jsonl").exists()


def test_ctrl_c_keeps_what_is_known_and_resume_goes_on(trials: Trials, capsys) -> None:
    """Exit 130, marked partial, nothing written; the next run measures only what is missing."""

    def stop(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    trials.before = stop
    status, envelope = tune(capsys, "--goal", "latency")
    assert status == 130
    assert envelope["result"]["partial"]
    assert [t["status"] for t in envelope["result"]["trials"]] == ["ok", "refused", "ok", "interrupted"]
    assert not Path("mine.yaml").exists()
    trials.started.clear()
    trials.before = lambda number: None
    status, envelope = tune(capsys, "--goal", "latency")
    assert (status, envelope["error"]["code"]) == (2, "journal_exists")
    status, envelope = tune(capsys, "--goal", "latency", "--resume")
    assert status == 0, envelope
    assert trials.started[0] == (("batch_tokenize", "singles"),)
    assert () not in trials.started[:1]


def test_a_resumed_run_writes_its_own_profile_again(trials: Trials, capsys) -> None:
    """More budget, more trials, the same file; somebody else's profile of that name stays."""
    assert tune(capsys, "--goal", "latency", "--rounds", "0")[0] == 0
    trials.delays["sleep_on_idle=false"] = 0.01
    assert tune(capsys, "--goal", "latency", "--rounds", "3")[0] == 2
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "3", "--resume")
    assert status == 0, envelope
    Path("mine.yaml").write_text("schema: 1\nname: mine\n")
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "3", "--resume")
    assert (status, envelope["error"]["code"]) == (2, "profile_exists")


def test_an_engine_that_died_under_load_has_no_figures(trials: Trials, capsys) -> None:
    """A restart during the measurement is a failed trial, however good the rest looked."""
    trials.dies.add("sleep_on_idle=false")
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "0")
    assert status == 0
    failed = next(t for t in envelope["result"]["trials"] if t["label"] == "sleep_on_idle=false")
    assert (failed["status"], failed["code"]) == ("failed", "engine_died")


@pytest.mark.parametrize("words", [["--rate", "20"], ["--concurrency", "2"]])
def test_a_trial_is_loaded_by_bench(trials: Trials, capsys, monkeypatch, words: list[str]) -> None:
    """A server's answers become the trial's figures: rates, the percentile that counts, memory of the processes."""
    Path("one.yaml").write_text("tokenizer_workers: [2]\n")
    monkeypatch.setattr(tune_trials.Served, "measure", MEASURE)
    _, envelope = tune(capsys, *words, "--rounds", "0", "--goal", "latency", "--dims", "64", "--space", "one.yaml")
    (measured,) = envelope["result"]["trials"][0]["measurements"]
    assert measured["error_rate"] == 0
    assert measured["texts_per_s"] > 0
    assert measured["tokens_per_s"] == pytest.approx(33 * measured["texts_per_s"])
    assert measured["objective_ms"] == pytest.approx(measured["p95"])
    assert measured["memory_bytes"] > 1 << 20
    assert not any("ms" in miss for miss in measured["misses"])  # there is no objective


def test_a_run_calibrates_once(trials: Trials, capsys, monkeypatch) -> None:
    """What a word costs is found on the first engine that is loaded; the others serve the same model."""
    Path("one.yaml").write_text("sleep_on_idle: [false]\nbatch_tokenize: [singles]\n")
    monkeypatch.setattr(tune_trials.Served, "measure", MEASURE)
    found = []
    real = calibrate.vocabulary_of
    monkeypatch.setattr(calibrate, "vocabulary_of", lambda *words: found.append(words) or real(*words))
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "0", "--space", "one.yaml")
    assert status == 0, envelope
    assert len(trials.started) >= 3
    assert len(found) == 1
    rates = [m for t in envelope["result"]["trials"] for m in t["measurements"]]
    assert all(m["tokens_per_s"] == pytest.approx(33 * m["texts_per_s"]) for m in rates)


def test_a_profile_that_cannot_be_written_loses_no_figures(trials: Trials, capsys, monkeypatch) -> None:
    """The error carries the outcome, and --resume only writes."""

    def full(path: Path, text: str) -> None:
        raise UnfitError("disk_full", "the disk is full", "free some")

    with monkeypatch.context() as broken:
        broken.setattr(winner, "save", full)
        status, envelope = tune(capsys, "--goal", "latency")
    assert (status, envelope["error"]["code"]) == (3, "disk_full")
    tried = len(envelope["result"]["trials"])
    assert tried >= 4
    trials.started.clear()
    status, envelope = tune(capsys, "--goal", "latency", "--resume")
    assert status == 0
    assert Path("mine.yaml").exists()
    assert len(envelope["result"]["trials"]) == tried
    assert not trials.started


def test_a_dry_run_starts_nothing_and_says_what_is_refused(trials: Trials, capsys) -> None:
    """The space with reasons, and the planner's word on each value."""
    status, envelope = tune(capsys, "--dry-run")
    assert status == 0
    assert "tokenizer_workers=2" in envelope["result"]["refused"]
    assert not trials.started
    assert not Path("mine.tune.jsonl").exists()


def test_a_dry_run_says_which_values_come_to_a_command_that_is_known(trials: Trials, capsys) -> None:
    """What the profile has already, said by the user's own space, and a value that the planner turns into it."""
    Path("space.yaml").write_text("env.OMP_NUM_THREADS: [1, 2]\noverlap_schedule: [false, null]\n")
    status, envelope = tune(capsys, "--dry-run")
    assert status == 0
    same = dict.fromkeys(
        ("env.OMP_NUM_THREADS=1", "overlap_schedule=false", "overlap_schedule=null"), "the same command as baseline"
    )
    assert envelope["result"]["same"] == same
    assert run(["tune", *QUICK, "--space", "space.yaml", "--dry-run"]) == 0
    by = {tuple(line.split("\t")[:2]): line.split("\t")[3] for line in capsys.readouterr().out.splitlines()[1:]}
    assert by["env.OMP_NUM_THREADS", "1"] == "same: the same command as baseline"
    assert by["env.OMP_NUM_THREADS", "2"] == ""


def test_what_was_tuned_is_in_the_journals_first_line(trials: Trials, capsys) -> None:
    """Another load is another run: --resume refuses and names what differs."""
    tune(capsys, "--goal", "latency", "--rounds", "0")
    Path("mine.yaml").unlink()
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "0", "--resume", "--tokens", "64")
    assert (status, envelope["error"]["code"]) == (2, "journal_mismatch")
    assert envelope["error"]["details"]["differ"] == ["load.tokens"]


# ---- parts of a trial ---------------------------------------------------------------------------------------------


def engines_for(tmp_path: Path, **more: Any) -> tune_trials.Engines:
    plan = cases.plan("h100", "4b", "0.5.16")
    assert plan.gpu is not None
    values: dict[str, Any] = {
        "options": LaunchOptions(profile="h100", model="4b", settings=("tp=1",), offline=True),
        "chosen": Chosen(cases.load("h100"), plan.gpu, "h100"),
        "plan_now": plan,
        "fixed": {"tp": "1"},
        "work": Work(),
        "objective": Objective(Goal.THROUGHPUT),
        "open_loop": False,
        "warmup": 1.0,
        "vectors": tmp_path / "vectors.json",
    }
    return tune_trials.Engines(**values | more)


def served_on(engines: tune_trials.Engines, moves: Moves = (), before: int | None = None) -> tune_trials.Served:
    record = record_of("tune-1", "http://127.0.0.1:1/v1")
    return tune_trials.Served(engines, moves, record, 1.0, time.monotonic() + 100, before, 0)


def test_up_gets_every_word_that_decides(tmp_path: Path) -> None:
    """Profile, model, fixed settings and the trial's own; on loopback, on the card that was planned for."""
    engines = engines_for(tmp_path)
    words = engines._words((("kv_pool", "full"),), 30200)
    assert words == [
        "--host", "127.0.0.1", "--port", "30200", "--no-verify", "--profile", "h100",
        "--model", "4b", "--offline", "--set", "restart.limit=0", "--set", "tp=1", "--set", "kv_pool=full",
    ]  # fmt: skip
    assert tune_trials._pinned(engines.chosen) == {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_commands_are_equal_where_the_launch_is(tmp_path: Path) -> None:
    """A setting said as the rule would decide it is the same command; replicas and the gateway make another."""
    engines = engines_for(tmp_path)
    base = engines.plan(())
    assert engines.plan((("max_prefill_tokens", "16384"),)) == base
    different = [(("replicas", "2"),), (("gateway.enabled", "false"),), (("max_prefill_tokens", "8192"),)]
    assert len({base, *map(engines.plan, different)}) == 4


def test_trials_are_planned_with_as_many_gateway_workers_as_up_starts(tmp_path: Path) -> None:
    """What is compared and refused is the plan that runs."""
    plan = cases.plan("h100", "4b", "0.5.16", gateway_workers=2)
    assert engines_for(tmp_path, plan_now=plan).request(()).gateway_workers == 2


def test_gpu_memory_is_what_the_trial_added(tmp_path: Path) -> None:
    """What others held on the card before the start is not the engine's; without a GPU it is the resident memory."""
    gpu = GpuFigures(busy=0.9, memory_bytes=10 << 30, watts=300.0, watt_hours_per_million_tokens=None)

    def run_with(figures: GpuFigures | None) -> Any:
        return SimpleNamespace(figures=SimpleNamespace(gpu=figures), rss=3 << 30)

    served = served_on(engines_for(tmp_path), before=1 << 30)
    assert served._memory_of(run_with(gpu)) == 9 << 30
    assert served_on(engines_for(tmp_path))._memory_of(run_with(None)) == 3 << 30


def test_the_next_start_waits_for_the_drivers_memory(tmp_path: Path, monkeypatch) -> None:
    """The planner looks at free memory: an engine that has just ended must not count."""
    readings = iter([9 << 30, 5 << 30, 1 << 30])
    engines = engines_for(tmp_path)
    monkeypatch.setattr(tune_trials.Engines, "_memory", lambda self: next(readings))
    engines._memory_back(1 << 30)
    assert next(readings, None) is None


def vectors(shift: float) -> ReferenceSet:
    texts = [f"text {n}" for n in range(12)]
    made = {t: tuple(normalised([math.sin(n * k + shift * k) for k in range(1, 33)])) for n, t in enumerate(texts, 1)}
    return ReferenceSet("here", "bfloat16", made)


@pytest.mark.parametrize(("shift", "changing", "passed"), [(0.0, False, True), (0.4, False, False), (0.4, True, True)])
def test_vectors_must_be_the_baselines_unless_they_may_change(
    tmp_path: Path, monkeypatch, shift: float, changing: bool, passed: bool
) -> None:
    """A trial with other vectors is wrong however fast; where the user allowed it, the cosine is recorded."""
    name = "quantization"
    engines = engines_for(tmp_path, changing=frozenset({name} if changing else ()))
    engines.keep_baseline(vectors(0.0))
    report = SimpleNamespace(
        passed=True, failures=(), fingerprint={"id": "f"}, summary="ok", environment={"allowed_distance": 5e-4}
    )
    monkeypatch.setattr(runner, "verify", lambda request: (report, vectors(shift)))
    monkeypatch.setattr(state, "running", lambda name: (SimpleNamespace(plan=tmp_path / "none.json"), None))
    proof = served_on(engines, ((name, "fp8"),)).prove()
    assert proof.passed is passed
    assert proof.cosine is not None
    again = engines_for(tmp_path)
    again.load_baseline()
    assert again.baseline is not None  # a resumed run holds trials to the same vectors
    assert again.baseline.vectors.keys() == vectors(0.0).vectors.keys()
