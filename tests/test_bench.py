"""`qwen3emb bench` as a user runs it, against a null server: modes, records, reports, bad input."""

from __future__ import annotations

import csv
import html.parser
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from null_server import Behaviour, null_server

from qwen3emb_launch.bench import calibrate, endpoint, modes, report
from qwen3emb_launch.bench import html as html_report
from qwen3emb_launch.bench.compare import compared
from qwen3emb_launch.bench.corpus import convert
from qwen3emb_launch.bench.figures import ClientLoad, Figures, Latency, client_note
from qwen3emb_launch.bench.histogram import LatencyHistogram
from qwen3emb_launch.bench.record import Record, Run, TargetInfo, from_dict, load, merged, rows_of, save
from qwen3emb_launch.bench.seed import floor_seconds
from qwen3emb_launch.bench.soak import Checkpoint, checkpoint_path, drifts_of, soak, thinned
from qwen3emb_launch.bench.spec import LoadSpec, Vocabulary
from qwen3emb_launch.bench.target import Target, Work, prepare
from qwen3emb_launch.bench.watch import Moment, Watch
from qwen3emb_launch.bench.words import WORDS
from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.cli.bench import parse_sweep, seconds
from qwen3emb_launch.cli.bench_view import sparkline
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.gateway.metrics import Metrics, render
from qwen3emb_launch.gpu import GpuSample
from qwen3emb_launch.results import plain
from qwen3emb_launch.statistics import parse_slo
from qwen3emb_launch.verify.texts import BASE

BRIEF = ["--duration", "0.5s", "--warmup", "0.1s"]
QUICK = [*BRIEF, "-c", "2"]


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict]:
    """Run `qwen3emb ARGS --json` in this process: (exit status, envelope)."""
    status = run([*args, "--json"])
    return status, json.loads(capsys.readouterr().out)


def figures(rate: float, p95: float = 10.0, **changes: object) -> Figures:
    """Figures of a made-up load; latencies in ms, all alike."""
    histogram = LatencyHistogram()
    histogram.record_all([p95 / 1000] * 100)
    base = Figures(
        seconds=1.0,
        requests=100,
        failed={},
        requests_per_s=rate,
        texts_per_s=rate,
        tokens_per_s=rate * 33,
        tokens_per_text=33,
        error_rate=0.0,
        latency=Latency(p95, p95, p95, p95, p95, p95),
        goodput_per_s=None,
        slo_misses=(),
        queue_ms=None,
        client=ClientLoad(0.1, 0.0, 0.0, 1, 1, False),
        histogram=histogram.encode(),
    )
    return replace(base, **changes)


def one(target: str = "a", number: int = 1, level: float = 1, rate: float = 10.0, **changes: object) -> Run:
    return Run(target, number, "steady", level, 0.0, figures(rate, **changes))


# As a user runs it


def test_a_bench_describes_itself_and_its_figures_add_up(capsys, tmp_path: Path) -> None:
    """One run writes every kind of report; tokens, dims, seed and versions are in the record."""
    files = [tmp_path / f"out{ending}" for ending in (".json", ".md", ".csv", ".html")]
    with null_server(Behaviour(delay=0.01)) as (url, _):
        args = [x for f in files for x in ("-o", str(f))]
        status, envelope = command(
            capsys, "bench", "--base-url", url, *QUICK, "--batch", "3", "--dims", "64", "--tokens", "20", *args
        )
    assert status == 0
    result = envelope["result"]
    (row,) = result["runs"]
    found = row["figures"]
    assert found["tokens_per_text"] == 20
    assert found["texts_per_s"] == pytest.approx(3 * found["requests_per_s"])
    assert found["tokens_per_s"] == pytest.approx(60 * found["requests_per_s"])
    assert found["gpu"] is None
    assert result["targets"][0]["dims"] == 64
    assert result["targets"][0]["tokens_exact"]
    assert result["targets"][0]["fingerprint"]["id"].endswith("?")  # a server that says little of itself
    assert result["targets"][0]["fingerprint"]["id"] in files[1].read_text()
    assert result["tool"]["version"]
    assert result["seed"] >= 0
    assert load(files[0]) == from_dict(result)
    assert "| 2 clients |" in files[1].read_text()
    assert float(next(csv.DictReader(files[2].open()))["requests_per_s"]) == found["requests_per_s"]
    assert "<svg" in files[3].read_text()


def test_a_models_own_tokenizer_is_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that names its file has words looked up there; one calibrated already is not asked again."""
    file = make_demo_model(tmp_path / "demo") / "tokenizer.json"
    seen: list[Any] = []
    monkeypatch.setattr(calibrate, "vocabulary_of", lambda spec, costs: seen.append(costs) or Vocabulary(WORDS[:20]))
    with null_server() as (url, null):
        prepare(Target("n", url, tokenizer=file), Work())
        prepare(Target("n", url), Work())
        known = Vocabulary(WORDS, 1, 1, exact=True)
        answered = null.answered
        ready = prepare(Target("n", url, tokenizer=file), Work(), known)
        assert null.answered == answered + 1
    assert ready.spec.vocabulary == known
    assert not ready.notes
    assert [costs and costs(["able"]) for costs in seen] == [{"able": 5}, None]


def test_a_wall_clock_that_jumps_moves_no_figure_and_is_said(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour forward at every look: figures are the monotonic clock's, and the record says what happened."""
    jumps, now = itertools.count(), time.time
    monkeypatch.setattr("qwen3emb_launch.bench.load.time.time", lambda: now() + 3600 * next(jumps))
    with null_server(Behaviour(delay=0.01)) as (url, _):
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK)
    assert status == 0
    found = envelope["result"]["runs"][0]["figures"]
    assert 0.3 < found["seconds"] < 1800
    edges = 4 / found["requests"]  # two clients' requests across either end count by their part
    assert found["requests_per_s"] == pytest.approx(found["requests"] / found["seconds"], rel=0.1 + edges)
    assert any("the wall clock jumped by " in warning for warning in envelope["result"]["warnings"])


def test_an_objective_decides_the_exit_status(capsys) -> None:
    """Met is 0; missed is 1 with what was seen, and the record all the same."""
    with null_server(Behaviour(delay=0.01)) as (url, _):
        met, good = command(capsys, "bench", "--base-url", url, *QUICK, "--slo", "p95=2s")
        missed, bad = command(capsys, "bench", "--base-url", url, *QUICK, "--slo", "p95=1ms")
    assert (met, missed) == (0, 1)
    figures_ = good["result"]["runs"][0]["figures"]
    assert figures_["goodput_per_s"] == pytest.approx(figures_["requests_per_s"])
    assert bad["error"]["code"] == "slo_missed"
    assert "p95" in bad["error"]["message"]
    assert bad["result"]["runs"][0]["figures"]["goodput_per_s"] == 0


def test_targets_take_turns_and_the_slower_is_seen(capsys) -> None:
    """Interleaved rounds, the order turned each round; a slow server has a part of the rate, with an interval."""
    # A busy machine adds to both: the slow one has to be slow beside that.
    with null_server(Behaviour(delay=0.02)) as (fast, _), null_server(Behaviour(delay=0.2)) as (slow, _):
        status, envelope = command(
            capsys, "bench", "--base-url", fast, "--vs", slow, "--vs", fast, "--rounds", "3", *QUICK
        )
    assert status == 0
    runs = envelope["result"]["runs"]
    names = [t["name"] for t in envelope["result"]["targets"]]
    assert len(set(names)) == 3
    assert [r["target"] for r in runs[:6]] == names + names[::-1]
    against_slow, against_self = (c["ratios"]["texts_per_s"] for c in envelope["result"]["comparisons"])
    assert against_slow["high"] < 0.6
    assert 0.6 < against_self["value"] < 1.6


@pytest.mark.parametrize(("rounds", "warned"), [("2", True), ("3", False)])
def test_a_comparison_of_too_few_rounds_is_warned_of(capsys, rounds: str, warned: bool) -> None:
    """A ratio without an interval is shown as one, and that is said before the time is spent."""
    with null_server(Behaviour()) as (one, _), null_server(Behaviour()) as (other, _):
        words = ["--base-url", one, "--vs", other, "--rounds", rounds, "-c", "2", "-d", "0.2s", "--warmup", "0"]
        assert run(["bench", *words]) == 0
    seen = capsys.readouterr()
    assert (f"--rounds {rounds} gives ratios without an interval" in seen.err) is warned
    assert ("(no interval from 2 rounds)" in seen.out) is warned


def test_a_sweep_finds_the_knee_of_a_serial_server(capsys) -> None:
    """One at a time, 30 ms each: more than a few clients bring nothing, and the sweep ends by itself."""
    with null_server(Behaviour(delay=0.03, serial=True)) as (url, _):
        status, envelope = command(capsys, "bench", "--base-url", url, "--sweep", "auto", *QUICK, "--slo", "p95=195ms")
    result = envelope["result"]
    (found,) = result["knee"].values()
    assert status == 0
    assert found["requests_per_s"] == pytest.approx(33, rel=0.25)
    assert found["level"] <= 4
    assert found["slo_level"] in (2, 4)
    assert result["runs"][-1]["level"] <= 64


def test_an_open_sweep_takes_its_rates_from_the_peak(capsys) -> None:
    """Shares of what the closed loop reached; what is offered beyond is not sustained."""
    with null_server(Behaviour(delay=0.01, serial=True)) as (url, _):
        status, envelope = command(capsys, "bench", "--base-url", url, "--sweep", "rate", *QUICK)
    levels = [r["level"] for r in envelope["result"]["runs"]]
    assert status == 0
    assert levels == sorted(levels)
    assert levels[-1] / levels[0] == pytest.approx(5.5, rel=0.05)


def test_a_burst_has_before_during_and_after(capsys) -> None:
    """Three phases, the middle one at three times the rate."""
    with null_server() as (url, _):
        status, envelope = command(
            capsys, "bench", "--base-url", url, "--rate", "60", "--burst", "3x", "-d", "1s", "--warmup", "0.1s"
        )
    runs = envelope["result"]["runs"]
    assert status == 0
    assert [r["phase"] for r in runs] == ["before", "burst", "after"]
    assert [r["level"] for r in runs] == [60, 180, 60]
    assert runs[1]["figures"]["requests_per_s"] > 2 * runs[0]["figures"]["requests_per_s"]


def test_a_soak_ended_early_goes_on_from_its_checkpoint(tmp_path: Path, capsys) -> None:
    """Windows of an interrupted soak count; a line cut off by a crash is dropped; another load is refused."""
    out = tmp_path / "soak.json"
    with null_server(Behaviour(delay=0.005)) as (url, _):
        args = ["bench", "--base-url", url, *QUICK, "--window", "0.3s", "-o", str(out)]
        assert command(capsys, *args, "--soak", "0.6s")[0] == 0
        kept = checkpoint_path(out)
        assert kept is not None
        with kept.open("ab") as file:
            file.write(b'{"target": "cut')
        again, refused = command(capsys, *args, "--soak", "1.5s")
        assert (again, refused["error"]["code"]) == (2, "soak_exists")
        other, differs = command(capsys, *args, "--soak", "1.5s", "--resume", "--batch", "2")
        assert (other, differs["error"]["code"]) == (2, "soak_differs")
        status, envelope = command(capsys, *args, "--soak", "1.5s", "--resume")
    assert status == 0
    record = load(out)
    assert len(record.runs) == len(kept.read_bytes().splitlines()) - 1 >= 5
    assert sum(r.figures.seconds for r in record.runs) >= 1.4
    assert {d["measure"] for d in envelope["result"]["drifts"]} >= {"p50", "texts_per_s"}
    (row,) = rows_of(record)
    assert row.figures.requests == sum(r.figures.requests for r in record.runs)


def test_a_full_disk_ends_a_soak_with_what_there_is(tmp_path: Path) -> None:
    """The checkpoint cannot be written: the windows so far are the result, partial, and the reason is in it."""
    with null_server() as (url, _):
        work = Work(seed=1)
        ready = prepare(Target("n", url), work)
        campaign = modes.Campaign([ready], work, modes.Shaping(level=1, warmup=0))
        checkpoint = Checkpoint(tmp_path / "c", {"a": 1})
        checkpoint._append = lambda line: None if "kind" in line else checkpoint_full(tmp_path)  # type: ignore[method-assign]
        record = soak(campaign, 2.0, 0.3, checkpoint)
    assert record.partial
    assert len(record.runs) == 1
    assert any("cannot be written" in w for w in record.warnings)


def checkpoint_full(path: Path) -> None:
    raise UnfitError("report_unwritable", f"{path} cannot be written: No space left on device", "free space")


def test_ctrl_c_saves_a_partial_record(tmp_path: Path) -> None:
    """SIGINT as the terminal sends it: exit 130, the report written and marked, no process left."""
    out = tmp_path / "out.json"
    with null_server(Behaviour(delay=0.005)) as (url, endpoint):
        bench = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "qwen3emb_launch",
                "bench",
                "--base-url",
                url,
                "-d",
                "60s",
                "--warmup",
                "0.1s",
                "-o",
                str(out),
                "--json",
            ],
            stdout=subprocess.PIPE,
            env=dict(os.environ),
            start_new_session=True,
        )
        deadline = time.monotonic() + 30
        while endpoint.answered < 1000 and time.monotonic() < deadline:  # well past the warm-up: something was measured
            time.sleep(0.02)
        os.killpg(bench.pid, signal.SIGINT)
        stdout, _ = bench.communicate(timeout=30)
    envelope = json.loads(stdout)
    assert bench.returncode == 130
    assert envelope["error"]["code"] == "interrupted"
    assert envelope["result"]["partial"]
    assert load(out).partial
    assert load(out).runs[0].figures.requests > 0


def test_without_a_terminal_it_says_lines_and_prints_a_table(capsys) -> None:
    """No live display in a pipe: a line a load on stderr, tab-separated rows on stdout."""
    with null_server() as (url, _):
        assert run(["bench", "--base-url", url, *QUICK]) == 0
    streams = capsys.readouterr()
    assert "load\trequests/s\t" in streams.out
    assert "bench: " in streams.err
    assert "\x1b" not in streams.out + streams.err


def test_a_record_can_be_shown_and_compared(capsys, tmp_path: Path) -> None:
    """`show` renders again, `compare` puts loads side by side and names what else differs."""
    a, b, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "p.html"
    with null_server() as (url, _):
        for path, batch in ((a, "1"), (b, "2")):
            assert run(["bench", "--base-url", url, *QUICK, "--batch", batch, "-o", str(path), "--json"]) == 0
    capsys.readouterr()
    assert run(["bench", "show", str(a), "-o", str(page)]) == 0
    assert "2 clients" in capsys.readouterr().out
    assert page.is_file()
    status, envelope = command(capsys, "bench", "compare", str(a), str(b))
    assert status == 0
    assert any("batch is 2, not 1" in d for d in envelope["result"]["differences"])
    assert {line["measure"] for line in envelope["result"]["lines"]} >= {"requests/s", "p95 ms"}


LAUNCHED = {
    "engine": "sglang 0.5.16 cuda", "dtype": "bfloat16", "profile": "h100", "profile_hash": "65ad5edb8f73ab78",
    "packages": " ".join(f"{p}={n}.1" for n, p in enumerate(("torch", *(f"package-{n}" for n in range(14))))),
    "model": "m", "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.159.04", "plan": "unreadable", "revision": None,
}  # fmt: skip


def launched(*facts: dict[str, object]) -> Record:
    targets = tuple(TargetInfo(f"t{n}", "http://h/v1", "m", f, fingerprint={"id": "f1"}) for n, f in enumerate(facts))
    return Record("versus", {"batch": 1, "tokens": "33"}, targets, (one("t0"),), "now", 1)


def test_a_terminal_has_room_for_what_a_target_is(tmp_path: Path, capsys) -> None:
    """Lines of a screen's width, nothing but packages left out, and those counted; a kept page has them all."""
    record = launched(LAUNCHED, {})
    shown = report.headline(record, whole=False)
    assert max(len(f"{name:15}  {value}") for name, value in shown) <= 120
    assert ("  packages", "torch 0.1, 14 more in the record") in shown
    words = "\n".join(value for _, value in shown)
    assert all(str(v) in words for k, v in LAUNCHED.items() if k not in ("packages", "revision"))
    assert [name for name, _ in shown if name.startswith("t")] == ["texts a request", "t0", "t1"]
    assert "revision" not in words
    assert "package-13 14.1" in report.markdown(record)
    assert "  - on: NVIDIA H100 80GB HBM3, driver 580.159.04\n" in report.markdown(record)
    save(record, tmp_path / "r.json")
    assert run(["bench", "show", str(tmp_path / "r.json")]) == 0
    assert "package-13" not in capsys.readouterr().out


def test_packages_that_differ_are_named_one_by_one() -> None:
    """A comparison says which package moved, not two lists of fifteen; a record without them is another matter."""
    before, after = (launched({"packages": f"torch={v} numpy=2.5"}) for v in ("2.11", "2.12"))
    assert compared([("x", before), ("y", after)]).differences == ("y: torch is 2.12, was 2.11",)
    unknown = launched({})
    assert compared([("x", unknown), ("y", after)]).differences == ("y: packages is torch=2.12 numpy=2.5, was None",)
    assert not compared([("x", unknown), ("y", unknown)]).differences


def test_records_of_other_vectors_say_so_when_compared() -> None:
    """A faster engine that answers other vectors is no faster engine: the fingerprints' difference is named."""
    runs = (one(),)
    before, after, unknown = (
        Record(
            mode="steady",
            load={},
            targets=(TargetInfo("a", "u", "m", fingerprint=fingerprint),),
            runs=runs,
            created="now",
            seed=1,
        )
        for fingerprint in ({"id": "one"}, {"id": "two"}, {})
    )
    assert any("fingerprint is two, was one" in d for d in compared([("x", before), ("y", after)]).differences)
    assert not compared([("x", before), ("y", unknown)]).differences


# Bad input


@pytest.mark.parametrize(
    ("behaviour", "extra", "status", "code"),
    [
        (Behaviour(fault="norm"), [], 1, "wrong_answer"),
        (Behaviour(fault="nan"), [], 1, "wrong_answer"),
        (Behaviour(fault="count"), [], 1, "wrong_answer"),
        (Behaviour(fault="dims"), ["--dims", "64"], 1, "wrong_answer"),
        (Behaviour(fault="http_503"), [], 5, "endpoint_error"),
        (Behaviour(api_key="right"), [], 5, "unauthorized"),
        (Behaviour(), ["--slo", "soon"], 2, "bad_slo"),
        (Behaviour(), ["--tokens", "many"], 2, "bad_load"),
        (Behaviour(), ["--repeat-rate", "1.5"], 2, "bad_load"),
        (Behaviour(), ["--format", "hex"], 2, "bad_load"),
        (Behaviour(), ["--sweep", "up"], 2, "bad_sweep"),
        (Behaviour(), ["--burst", "0.5x"], 2, "bad_burst"),
        (Behaviour(), ["--duration", "soon"], 2, "bad_duration"),
        (Behaviour(), ["--preset", "other"], 2, "bad_preset"),
        (Behaviour(), ["--sweep", "auto", "--burst", "3x"], 2, "usage"),
        (Behaviour(), ["--soak", "1h", "--vs", "http://x/v1"], 2, "usage"),
        (Behaviour(), ["--rate", "5", "-c", "2"], 2, "usage"),
        (Behaviour(), ["--burst", "3x", "--requests", "9"], 2, "usage"),
        (Behaviour(), ["--sweep", "auto", "--rounds", "2"], 2, "usage"),
        (Behaviour(), ["--preset", "seed", "--rate", "5"], 2, "usage"),
        (Behaviour(), ["--resume"], 2, "usage"),
        (Behaviour(), ["--vs", "http://[::1"], 2, "bad_url"),
        (Behaviour(), ["--vs", "http://x:y/v1"], 2, "bad_url"),
        (Behaviour(), ["--corpus", "/nowhere.txt"], 2, "no_corpus"),
        (Behaviour(), ["--output", "x.pdf"], 2, "bad_output"),
        (Behaviour(), ["--api-key-env", "NOT_SET_ANYWHERE"], 2, "no_api_key"),
        (Behaviour(), ["--soak", "1s", "--resume", "-o", "{tmp}/none.json"], 2, "no_checkpoint"),
    ],
)
def test_bad_input_has_a_code_a_hint_and_measures_nothing(behaviour, extra, status, code, capsys, tmp_path) -> None:
    """Before any load: the exit status of its kind, and the next thing to do."""
    with null_server(behaviour) as (url, endpoint):
        got, envelope = command(
            capsys, "bench", "--base-url", url, *BRIEF, *(x.replace("{tmp}", str(tmp_path)) for x in extra)
        )
    assert (got, envelope["error"]["code"]) == (status, code)
    assert envelope["error"]["hint"]
    assert endpoint.answered < 100


OURS, THEIRS = {"owned_by": "qwen3emb"}, {"owned_by": "vllm"}


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ([{"id": "m", **THEIRS}], "m"),
        ([{"id": "/models/m", **OURS}, {"id": "m", **OURS}, {"id": "/models/m:query", **OURS}], "/models/m"),
        ([{"id": "m", **THEIRS}, {"id": "n", **THEIRS}], None),
        ([{"id": "m"}, {"id": "n"}], None),
        (["m"], None),
        ([], None),
    ],
)
def test_the_model_is_named_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch, listed, chosen) -> None:
    """One model under several names, as our gateway lists it with its tasks, is no choice."""
    monkeypatch.setattr(endpoint, "ask", lambda spec, path: (200, json.dumps({"data": listed}).encode()))
    spec = LoadSpec("http://h/v1", "", ())
    if chosen:
        assert endpoint.served_model(spec) == chosen
        return
    with pytest.raises(InvalidInputError) as caught:
        endpoint.served_model(spec)
    assert caught.value.code == "model_needed"


def test_an_endpoint_that_is_down_exits_5(capsys) -> None:
    """Nothing answers: said with the address."""
    status, envelope = command(capsys, "bench", "--base-url", "http://127.0.0.1:9/v1")
    assert (status, envelope["error"]["code"]) == (5, "endpoint_down")
    assert "127.0.0.1:9" in envelope["error"]["message"]


def test_no_instance_and_no_url_says_how_to_go_on(capsys) -> None:
    """Nothing runs and nothing was named."""
    status, envelope = command(capsys, "bench")
    assert (status, envelope["error"]["code"]) == (3, "not_running")


def test_an_endpoint_that_breaks_during_the_run_is_no_success(capsys) -> None:
    """Every answer wrong once the load is on: exit 1, kinds counted."""
    with null_server(Behaviour(fault="http_503", fault_from=60)) as (url, _):
        # The sixty are asked in the warm-up, also where the machine stands still for most of it.
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK, "--warmup", "2s")
    assert (status, envelope["error"]["code"]) == (1, "no_right_answer")
    assert envelope["result"]["runs"][0]["figures"]["failed"]["http_503"] > 0


def test_an_unwritable_report_loses_no_figures(capsys, tmp_path: Path) -> None:
    """The folder is a file: exit 3, and the result is in the envelope all the same."""
    (tmp_path / "file").write_text("")
    with null_server() as (url, _):
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK, "-o", str(tmp_path / "file" / "x.json"))
    assert (status, envelope["error"]["code"]) == (3, "report_unwritable")
    assert envelope["result"]["runs"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"kind": "qwen3emb-bench", "schema": 99}', '{"kind": "qwen3emb-bench"}']
)
def test_what_is_no_record_is_refused(text, tmp_path: Path) -> None:
    """Empty, foreign, newer or damaged files are named."""
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match=r"r\.json"):
        load(path)


# Corpora


def test_blank_and_broken_lines_are_counted_and_named(tmp_path: Path, capsys) -> None:
    """They are left out, the record says how many and where; the texts sent are the file's own."""
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "  "}\n{broken\n{"text": 5}\n"two \\u00e9"\n{"title": "x"}\n\xff\n')
    with null_server() as (url, endpoint):
        endpoint.texts = []
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK, "--corpus", str(path))
    assert status == 0
    warnings = " ".join(envelope["result"]["warnings"])
    assert "2 blank and 4 broken lines" in warnings
    assert "line 4: no JSON" in warnings
    assert "sent more than once" in warnings
    assert set(endpoint.texts) - {BASE[0]} == {"one", "two é"}  # that one is asked for the fingerprint
    assert envelope["result"]["load"]["corpus"] == str(path)


def test_a_text_file_and_a_named_field_are_read(tmp_path: Path) -> None:
    """One text a line, or the field that --column names."""
    plain_file, fielded = tmp_path / "c.txt", tmp_path / "c.jsonl"
    plain_file.write_text("a\r\n\nb", encoding="utf-8")
    fielded.write_text('{"x": "q", "text": "no"}\n', encoding="utf-8")
    assert convert(plain_file, tmp_path / "o").texts == 2
    assert convert(fielded, tmp_path / "o", "x").texts == 1
    assert (tmp_path / "o").read_text() == '"q"\n'
    with pytest.raises(InvalidInputError, match="no usable text"):
        convert(fielded, tmp_path / "o", "y")


def test_a_parquet_corpus_is_read_and_sent(tmp_path: Path, capsys) -> None:
    """Rows of several row groups, compressed; nulls and blank texts are left out and counted, the rest is sent."""
    path = tmp_path / "c.parquet"
    rows = ["one", "two é", None, " ", "三"]
    pyarrow.parquet.write_table(
        pyarrow.table({"id": range(5), "text": rows, "title": ["t"] * 5}), path, row_group_size=2, compression="zstd"
    )
    with null_server() as (url, endpoint):
        endpoint.texts = []
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK, "--corpus", str(path))
    assert status == 0
    assert "2 blank" in " ".join(envelope["result"]["warnings"])
    assert set(endpoint.texts) - {BASE[0]} == {"one", "two é", "三"}
    assert convert(path, tmp_path / "o", "title").texts == 5


def test_a_parquet_file_without_texts_is_an_input_error(tmp_path: Path) -> None:
    """No such column is named with those there are; numbers are no texts; a broken file is said to be one."""
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2]}), path)
    with pytest.raises(InvalidInputError, match="it has id"):
        convert(path, tmp_path / "o")
    with pytest.raises(InvalidInputError, match="int, not a text"):
        convert(path, tmp_path / "o", "id")
    path.write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match="no readable Parquet"):
        convert(path, tmp_path / "o")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, not a missing module."""
    path = tmp_path / "c.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidInputError, match="pyarrow is not installed") as caught:
        convert(path, tmp_path / "o")
    assert "[parquet]" in caught.value.hint


# Pure parts


def test_records_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    """Every part, comparisons and drifts with their trends included."""
    runs = tuple(one(t, n, rate=r) for n in (1, 2, 3) for t, r in (("a", 10.0 + n), ("b", 12.0 + n)))
    record = Record(
        mode="versus",
        load={"shape": "closed", "batch": 1, "tokens": "33"},
        targets=(),
        runs=runs,
        created="2026-01-01T00:00:00+00:00",
        seed=1,
        comparisons=modes.compare(runs),
        drifts=drifts_of([one(rate=float(n)) for n in range(20)]),
        overall=figures(1.0),
    )
    save(record, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == from_dict(plain(record))
    assert load(tmp_path / "r.json").drifts[0].trend is not None


def test_rounds_merge_by_median_and_common_histogram() -> None:
    """Rates by median, percentiles over all answers, failures added."""
    both = merged([figures(10.0, 10.0), figures(30.0, 30.0), figures(20.0, 20.0, failed={"norm": 3})])
    assert both.requests_per_s == 20
    assert both.requests == 300
    assert both.failed == {"norm": 3}
    assert both.error_rate == pytest.approx(3 / 303)
    assert both.latency.p50 == pytest.approx(20, rel=0.01)
    assert both.latency.max == pytest.approx(30, rel=0.01)


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (ClientLoad(0.95, 0.0, 1.0, 1, 2, True), "--processes 4"),
        (ClientLoad(0.06, 2.0, 2.7, 1, 4, False), None),
        (ClientLoad(0.20, 30.0, 40.0, 1, 1, False), "had to wait for a core"),
        (ClientLoad(0.20, 90.0, 1.0, 1, 1, False), None),  # late for want of a free connection
    ],
)
def test_what_the_client_had_to_do_with_the_figures_is_said(client: ClientLoad, said: str | None) -> None:
    """Busy itself, kept waiting by others on its machine, or neither."""
    note = client_note(figures(10.0, 100.0, client=client))
    assert (said in note) if said and note else note is said


def test_a_warning_is_said_once_however_many_phases_have_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Three phases of one burst behind a client that was busy: one warning."""
    monkeypatch.setattr(modes, "client_note", lambda figures: f"busy ({figures.client.cpu:.3f})")
    with null_server() as (url, _):
        status, envelope = command(capsys, "bench", "--base-url", url, *QUICK, "--burst", "3x")
    assert status == 0
    assert len([w for w in envelope["result"]["warnings"] if w.startswith("busy")]) == 1


def test_a_load_shorter_than_its_requests_says_so(capsys) -> None:
    """Requests of 0.4 s begin before a window of 0.2 s and end after it: no wrong answer, but none to count either."""
    with null_server(Behaviour(delay=0.4)) as (url, _):
        arguments = ["--duration", "0.2s", "--warmup", "0.1s", "-c", "2"]
        status, envelope = command(capsys, "bench", "--base-url", url, *arguments)
    assert status == 1
    assert envelope["error"]["code"] == "too_short"
    assert "--duration" in envelope["error"]["hint"]


def test_a_sweep_that_still_rises_claims_no_knee() -> None:
    """The best level being the last one measured, the knee is beyond it."""
    runs = tuple(one(level=n, rate=n * 10.0) for n in (1, 2, 4))
    common = {"mode": "sweep", "load": {"shape": "closed"}, "targets": (), "runs": runs, "created": "now", "seed": 1}
    record = Record(**common, knee=modes.knee(runs, "closed", None))
    assert report.knee_lines(record) == ["a: no knee up to 4 clients, 40 requests/s; more clients: --sweep 8,16"]
    flat = tuple(one(level=n, rate=20.0) for n in (1, 2, 4))
    record = Record(**{**common, "runs": flat}, knee=modes.knee(flat, "closed", None))
    assert report.knee_lines(record) == ["a: the knee is at 1 client, 20 requests/s"]


def test_an_open_loops_knee_is_judged_by_what_arrived() -> None:
    """86 of 100 requests/s came by chance and all were answered: kept. Of 200 only 150 were: past the knee."""
    runs = [
        one(level=50, rate=52, requests=52),
        one(level=100, rate=86, requests=86),
        one(level=200, rate=150, requests=150, failed={"timeout": 45}),
    ]
    found = modes.knee(runs, "open", None)
    assert found["a"] == {"level": 100, "requests_per_s": 86, "kept": True, "passed": True}
    assert report.knee_lines(swept_by_rate(runs)) == ["a: the knee is at 100/s, 86 requests/s"]


def swept_by_rate(runs: list[Run]) -> Record:
    return Record(
        mode="sweep", load={"shape": "open"}, targets=(), runs=tuple(runs), created="now", seed=1,
        knee=modes.knee(runs, "open", None),
    )  # fmt: skip


def test_a_sweep_of_rates_claims_no_knee_that_it_has_not_passed() -> None:
    """The last rate served as the others were: the knee is beyond it. None kept up with: it is below the first."""
    served = [one(level=n, rate=n, requests=n) for n in (50, 100, 200)]
    assert report.knee_lines(swept_by_rate(served)) == [
        "a: no knee up to 200/s, 200 requests/s; the highest rate tried was still served; "
        "higher ones: --sweep rate:300,400"
    ]
    late = {"failed": {"timeout": 100}}
    over = [one(level=n, rate=40, requests=40, **late) for n in (200, 400)]
    assert report.knee_lines(swept_by_rate(over)) == [
        "a: no rate tried was kept up with: at 200/s, 40 requests/s; lower ones: --sweep rate:50,100"
    ]
    broken = [*served[:2], one(level=200, rate=0, requests=0, **late)]
    assert report.knee_lines(swept_by_rate(broken)) == ["a: the knee is at 100/s, 100 requests/s"]
    old = swept_by_rate(served)
    bare = {"a": {"level": 200, "requests_per_s": 200.0}}  # a record of before
    assert "no knee up to 200/s" in report.knee_lines(replace(old, knee=bare))[0]


def test_an_objective_that_nothing_meets_says_the_nearest() -> None:
    """The level whose worst excess is the smallest."""
    slo = parse_slo("p95=5ms")
    runs = [one(level=n, rate=n * 10.0, p95=6.0 + abs(n - 2), slo_misses=("p95",)) for n in (1, 2, 4)]
    found = modes.knee(runs, "closed", slo)["a"]
    assert found["slo_level"] is None
    assert found["nearest"]["level"] == 2


def test_a_soak_record_of_days_stays_small() -> None:
    """4,320 windows keep 200 curves."""
    runs = thinned([one(number=n) for n in range(4320)])
    assert len(runs) == 4320
    assert sum(bool(r.figures.histogram) for r in runs) <= 200


class References(html.parser.HTMLParser):
    """Everything a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img", "object"):
            self.found.append(tag)
        self.found += [
            f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]


@pytest.mark.parametrize("mode", ["steady", "sweep", "burst", "soak", "versus", "seed"])
def test_the_page_needs_no_network_and_no_script(mode) -> None:
    """Plots of every mode; names that try to be markup are text."""
    runs = tuple(
        one(
            "<script>alert(1)</script>",
            n,
            level=float(n),
            rate=10.0 * n,
            timeline=((0.0, 5.0, 1.0, 2.0), (1.0, 6.0, 1.0, 2.0)),
        )
        for n in range(1, 4)
    )
    record = Record(
        mode=mode,
        load={"shape": "closed", "batch": 1, "tokens": "33"},
        targets=(),
        runs=runs,
        created="now",
        seed=1,
        claims=({"claim": "x", "verdict": "y"},),
        drifts=drifts_of(runs),
        warnings=("careful",),
    )
    page = html_report.page(record)
    parser = References()
    parser.feed(page)
    assert parser.found == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert page.count("<svg") >= 1
    assert "<script" not in page
    assert report.markdown(record)


@pytest.mark.parametrize(
    ("name", "columns"), [("short", 2), ("a-machine-with-a-long-name.example.com:30000", 1), ("推" * 20, 1)]
)
def test_a_legend_of_long_names_has_one_column(name, columns) -> None:
    """Two beside each other would be written over each other."""
    plot = html_report._xy("t", [(f"{name}{n}", [(0, 1), (1, 2)]) for n in (1, 2)], "x")
    places = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="12"', plot)
    assert len(set(places)) == columns


def test_reports_tell_the_first_failure_of_each_kind() -> None:
    """The terminal, the page and the Markdown alike; what the endpoint said is text, in one line."""
    runs = (
        one(failed={"http_503": 2}, details={"http_503": "<b>busy</b>\n- later"}),
        one(details={"http_503": "again"}),
    )
    record = Record(
        mode="steady", load={}, targets=(), runs=runs, created="now", seed=1, warnings=("careful",)
    )  # fmt: skip
    assert report.failure_lines(record) == ["first http_503: <b>busy</b>\n- later"]
    assert "first http_503: &lt;b&gt;busy&lt;/b&gt;" in html_report.page(record)
    assert report.markdown(record).endswith("\n> - first http_503: <b>busy</b> - later\n> - warning: careful\n")


def test_the_compute_floor_of_the_claim() -> None:
    """32 x 2048 tokens of the 4B on a 4090 take 3.1 s at its peak: 85 ms is impossible. Unknown GPUs have no floor."""
    shape = CATALOG["4b"].shape
    assert floor_seconds(shape, "NVIDIA GeForce RTX 4090", 32, 2048) == pytest.approx(3.1, abs=0.1)
    assert floor_seconds(shape, "NVIDIA A100-SXM4-80GB", 1, 1) == pytest.approx(shape.flops_per_token(1) / 312e12)
    assert floor_seconds(shape, "Radeon", 32, 2048) is None


def gateway_metrics() -> str:
    counted = Metrics()
    counted.answered(total=0.5, queue=0.2, engine=0.25, now=0.0)
    counted.answered(total=0.5, queue=0.4, engine=0.05, now=0.0)
    counted.answered(total=0.001, queue=0.0, engine=0.0, now=0.0)  # from the cache: it waited for nobody
    return render(counted.snapshot())


VLLM = 'vllm:request_queue_time_seconds_{0}{{engine="0",model_name="m"}} {1}\n'


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (gateway_metrics(), pytest.approx((0.6, 2))),
        (VLLM.format("sum", "1.5e-1") + VLLM.format("count", "3.0"), (0.15, 3)),
        ("qwen3emb_requests_total 3\n", None),
    ],
)
def test_time_in_queue_is_the_gateways_or_the_engines(monkeypatch: pytest.MonkeyPatch, text: str, seen) -> None:
    """Sum and count so far, by their series; nobody's word is no figure."""
    monkeypatch.setattr(endpoint, "ask", lambda spec, path, body=None: (200, text.encode()))
    assert endpoint.queue_seconds(LoadSpec(url="http://a/v1", model="m", phases=())) == seen


def test_gpu_energy_comes_from_the_cards_counter() -> None:
    """300 J a second at 1,000 tokens a second is 83 Wh per million tokens; no card, no figure, not zero."""
    watch = Watch(None)
    watch.moments = [Moment(float(t), GpuSample(0.5, 2**30 * t, 250.0, 300.0 * t), None) for t in range(4)]
    found = watch.gpu_figures(0, 3, 1000)
    assert found is not None
    assert found.watts == pytest.approx(300)
    assert found.watt_hours_per_million_tokens == pytest.approx(300 * 1000 / 3600)
    assert found.memory_bytes == 3 * 2**30
    assert Watch(None).gpu_figures(0, 3, 1000) is None


def test_a_span_without_a_sample_has_the_memory_of_the_moment_beside_it() -> None:
    """A busy machine may sample none in a brief span; what was long before or after is another's."""
    watch = Watch(None)
    watch.moments = [Moment(at, None, rss) for at, rss in ((1.0, 10), (2.0, 30), (2.1, 20), (4.0, None), (9.0, 50))]
    assert watch.peak_rss(1.5, 2.5) == 30
    assert watch.peak_rss(2.2, 2.9) == 20
    assert watch.peak_rss(2.7, 4.2) is None  # the processes were gone at 4.0
    assert watch.peak_rss(7.5, 8.0) == 50
    assert watch.peak_rss(5.0, 6.5) is None


def test_memory_of_an_engine_that_was_started_again() -> None:
    """The engine's memory goes on being watched after its restart: who it is is asked again and again."""
    script = "import sys; block = bytearray(20 << 20); print(flush=True); sys.stdin.read()"
    engines: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        engines.append(subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1))
        engines[-1].stdout.readline()

    def until(condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    with Watch(None, lambda: [engine.pid for engine in engines if engine.poll() is None]) as watch:
        start()
        until(lambda: any(m.rss for m in watch.moments))
        engines[0].communicate(b"")
        mark = len(watch.moments)
        until(lambda: any(m.rss is None for m in watch.moments[mark:]))
        start()
        mark = time.monotonic()
        until(lambda: (watch.peak_rss(mark, time.monotonic()) or 0) > 20 << 20)
        engines[1].communicate(b"")


@pytest.mark.parametrize(
    ("text", "value"), [("30", 30), ("30s", 30), ("5m", 300), ("72h", 259200), ("0.5s", 0.5), ("250ms", 0.25)]
)
def test_durations(text, value) -> None:
    """A number with an optional unit."""
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "open_loop", "shape", "levels"),
    [
        ("auto", False, "closed", None),
        ("auto", True, "open", None),
        ("rate", False, "open", None),
        ("1,4", False, "closed", (1, 4)),
        ("rate:1.5,3", False, "open", (1.5, 3)),
        ("concurrency:2", True, "closed", (2,)),
    ],
)
def test_sweeps(text, open_loop, shape, levels) -> None:
    """What is swept and over which levels."""
    found = parse_sweep(text, open_loop)
    assert (found.shape, found.levels) == (shape, levels)


def test_sparkline() -> None:
    """From zero to the highest bar."""
    assert sparkline([0, 5, 10]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""
