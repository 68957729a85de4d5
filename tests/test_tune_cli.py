"""`qwen3emb tune` from its words to its exit status, on stand-ins for engines that take what their settings say."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import planning_cases as cases
import pytest
from null_server import Behaviour, null_server

from qwen3emb_launch import __version__, state
from qwen3emb_launch.cli import tune as command
from qwen3emb_launch.cli import tune_trials
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.profile_files import load
from qwen3emb_launch.state import InstanceRecord, identify
from qwen3emb_launch.tune import winner
from qwen3emb_launch.tune.trials import Measurement, Moves, Proof

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
                yield tune_trials.Served(engines, moves, record, 1.0, None, None)
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
    assert [t["status"] for t in result["trials"]][:4] == ["ok", "ok", "ok", "refused"]
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
    assert "refused: sglang 0.5.15.post1: more than one tokenizer worker" in seen.out
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


def test_ctrl_c_keeps_what_is_known_and_resume_goes_on(trials: Trials, capsys) -> None:
    """Exit 130, marked partial, nothing written; the next run measures only what is missing."""

    def stop(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    trials.before = stop
    status, envelope = tune(capsys, "--goal", "latency")
    assert status == 130
    assert envelope["result"]["partial"]
    assert [t["status"] for t in envelope["result"]["trials"]] == ["ok", "ok", "interrupted"]
    assert not Path("mine.yaml").exists()
    trials.started.clear()
    trials.before = lambda number: None
    status, envelope = tune(capsys, "--goal", "latency")
    assert (status, envelope["error"]["code"]) == (2, "journal_exists")
    status, envelope = tune(capsys, "--goal", "latency", "--resume")
    assert status == 0, envelope
    assert trials.started[0] == (("batch_tokenize", "singles"),)
    assert () not in trials.started[:1]


def test_an_engine_that_died_under_load_has_no_figures(trials: Trials, capsys) -> None:
    """A restart during the measurement is a failed trial, however good the rest looked."""
    trials.dies.add("sleep_on_idle=false")
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "0")
    assert status == 0
    failed = envelope["result"]["trials"][1]
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


def test_what_was_tuned_is_in_the_journals_first_line(trials: Trials, capsys) -> None:
    """Another load is another run: --resume refuses and names what differs."""
    tune(capsys, "--goal", "latency", "--rounds", "0")
    Path("mine.yaml").unlink()
    status, envelope = tune(capsys, "--goal", "latency", "--rounds", "0", "--resume", "--tokens", "64")
    assert (status, envelope["error"]["code"]) == (2, "journal_mismatch")
    assert envelope["error"]["details"]["differ"] == ["load"]
