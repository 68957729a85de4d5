"""`verify` on the real engine: a right endpoint passes, each fault is refused with its cause named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import faults_in_part as in_part
import faulty_endpoint as faults
import numpy as np
import pytest
from conftest import Endpoint, start_engine
from faulty_endpoint import Fault, faulty
from warm_python import warm

from qwen3emb_launch.demo_model import DemoShape, make_demo_model
from qwen3emb_launch.verify import runner, texts
from qwen3emb_launch.verify.reference import DEMO_SET, Transformers, load, transformers_reference
from qwen3emb_launch.verify.report import Report, Verdict
from qwen3emb_launch.verify.runner import Request, verify
from qwen3emb_launch.verify.session import Options, Vector
from tests.test_gateway_process import gateway, until

pytestmark = pytest.mark.engine
HERE = Path(__file__).resolve().parents[1]


def ask(url: str, memory: Path, *only: str, level: str = "quick", **more: object) -> Report:
    options = Options(level, **{k: more.pop(k) for k in ("max_latency", "strict", "context") if k in more})
    report, _ = verify(Request(url, options, memory / "weights.json", only=frozenset(only), **more))
    return report


def wrong(report: Report) -> dict[str, str]:
    return {c.id: c.cause for c in report.failures}


@pytest.fixture(scope="session")
def fp32_endpoint(
    engine_python: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """The same checkpoint in float32, with a context that does not take the long texts."""
    log = tmp_path_factory.mktemp("engine32") / "log"
    with start_engine(engine_python, demo_model, log, "--dtype", "float32", context_length=512) as endpoint:
        yield endpoint


def test_full_level_passes_on_the_real_engine(demo_endpoint: Endpoint, engine_python: Path, tmp_path: Path) -> None:
    """Every required check holds; what a bare engine lacks is a warning; transformers agrees within the tolerance."""
    report = ask(demo_endpoint.base_url, tmp_path, level="full", python=engine_python)
    assert report.passed, wrong(report)
    by_id = {c.id: c for c in report.checks}
    assert by_id["transformers"].verdict is Verdict.PASS
    assert by_id["transformers"].figures["min_cosine"] > 0.9999
    warned = {c.id for c in report.checks if c.verdict is Verdict.WARN} - {"latency"}
    assert warned <= {"base64", "refusals", "error_form"}
    assert {c.id for c in report.checks if c.verdict is Verdict.SKIP} == {"golden", "ranking"}
    assert report.fingerprint["complete"]
    assert report.fingerprint["parts"]["engine_version"]


def test_a_right_endpoint_is_never_refused(demo_endpoint: Endpoint, fp32_endpoint: Endpoint, tmp_path: Path) -> None:
    """Run after run on a bfloat16 and a float32 engine, all of them pass. QWEN3EMB_TEST_REPEATS=20 for a long proof."""
    for endpoint, dtype in ((demo_endpoint, "bfloat16"), (fp32_endpoint, "float32")):
        for _ in range(int(os.environ.get("QWEN3EMB_TEST_REPEATS", "5"))):
            report = ask(endpoint.base_url, tmp_path)
            assert report.passed, wrong(report)
            assert report.precision.startswith(dtype)


def test_float32_agrees_to_six_digits(fp32_endpoint: Endpoint, engine_python: Path, tmp_path: Path) -> None:
    """A float32 engine is held to a float32 tolerance, and keeps it."""
    report = ask(fp32_endpoint.base_url, tmp_path, "transformers", python=engine_python)
    assert report.passed, wrong(report)
    figures = report.checks[-1].figures
    assert figures["allowed"] == pytest.approx(1e-5)
    assert figures["min_cosine"] > 0.999999


def test_an_engine_behind_a_gateway_is_held_to_its_own_precision(
    fp32_endpoint: Endpoint, engine_python: Path, tmp_path: Path
) -> None:
    """By URL alone: what SGLang says that it computes in comes through, not what the checkpoint is kept in, and none of
    its other words."""
    with gateway(tmp_path, "--upstream", fp32_endpoint.base_url, "--model", "demo") as gw:
        until(lambda: gw.call("/ready")[0] == 200, 60)
        (row, *_) = json.loads(gw.call("/v1/models")[1])["data"]
        assert row.keys() == {"id", "object", "created", "owned_by", "dimensions", "dtype"}
        report = ask(gw.base, tmp_path, "transformers", python=engine_python, folder=fp32_endpoint.model)
    assert report.passed, wrong(report)
    assert report.precision.startswith("float32 (the gateway says)")
    assert report.checks[-1].figures["allowed"] == pytest.approx(1e-5)


# Fault, the check that must fail, and what its cause must say.
QUICK: list[tuple[Fault, str, str]] = [
    (faults.unnormalised, "norm", "no L2 normalisation"),
    (faults.ignores_dimensions, "dims", "ignored"),
    (faults.slices_only, "dims", "not renormalised"),
    (faults.slices_the_end, "dims", "last components"),
    (faults.swaps_vectors, "order", "order of a batch is swapped"),
    (faults.reverses_items, "order", "order of a batch is swapped"),
    (faults.index_from_one, "order", "index fields"),
    (faults.drops_an_item, "batch", "items of a batch are dropped"),
    (faults.noise, "steady", "noise"),
    (faults.constant_noise, "demo_reference", "noise or a coarser number format"),
    (faults.int8_storage, "demo_reference", "noise or a coarser number format"),
    (faults.constant, "distinct", "a constant"),
    (faults.not_a_number, "finite", "every vector is NaN"),
    (faults.nulls, "finite", "every vector is NaN"),
    (faults.zeros, "norm", "zero vector"),
    (faults.overflow, "finite", "overflow .*float16"),
    (faults.strips_instruction, "instruction", "instruction is stripped"),
    (faults.space_after_query, "faithful", "space after `Query:`"),
    (faults.lower_cases, "faithful", "lower-cased"),
    (faults.strips_space, "faithful", "white space is stripped"),
    (faults.newlines_to_spaces, "faithful", "line breaks"),
    (faults.some_widths, "width", "another width"),
    (faults.fails_one_in_five, "reliable", "about one request in 5 fails"),
    (faults.wrong_one_in_five, "steady", "intermittent"),
    (faults.mixes_under_load, "steady", "cross-talk"),
    (faults.broken_base64, "base64", "base64"),
    (faults.dies, "reliable", "fail"),
    (faults.two_decimals, "norm", "quantised storage"),
    (faults.two_decimals_renormalised, "dims", "rounded or quantised storage"),
    (faults.drops_signs, "signs", "signs of the components are lost"),
    (faults.drops_signs, "demo_reference", "signs of the components are lost"),
    (faults.permutes_dims, "demo_reference", "components in another order"),
    (faults.flips_half_the_signs, "demo_reference", "another basis: signs flipped"),
    (faults.drops_duplicates, "batch", "items of a batch are dropped"),
    (faults.caches_by_length, "faithful", "texts of one length"),
    (faults.repeats_in_large_batches, "batch", "is repeated"),
    (faults.repeats_in_large_batches, "faithful", "in large batches"),
    (faults.half_filled_with_zeros, "width", "filled up with zeros"),
    (faults.strips_html, "faithful", "^HTML tags are stripped$"),
    (faults.older_model_one_in_twenty, "steady", "intermittent"),
    *in_part.QUICK,
]


@pytest.mark.parametrize(("fault", "check", "cause"), QUICK, ids=lambda v: getattr(v, "__name__", None))
def test_quick_names_the_fault(demo_endpoint: Endpoint, tmp_path: Path, fault: Fault, check: str, cause: str) -> None:
    """The quick level refuses a faulty endpoint, and its failing check says what is wrong."""
    with faulty(demo_endpoint.base_url, fault) as url:
        found = wrong(ask(url, tmp_path))
    assert check in found, found
    assert re.search(cause, found[check]), found


@pytest.mark.parametrize("fault", [faults.permutes_dims, faults.flips_half_the_signs, faults.rotates])
def test_another_basis_is_seen_without_knowing_what_is_served(
    demo_endpoint: Endpoint, tmp_path: Path, fault: Fault
) -> None:
    """An endpoint that hides what it serves is known by the angles between its vectors, which no basis changes."""
    with faulty(demo_endpoint.base_url, fault, hidden=True) as url:
        found = wrong(ask(url, tmp_path, max_latency=5000.0))
    assert re.search("another order|another basis", found["demo_reference"]), found


FULL: list[tuple[Fault, str, str]] = [
    (faults.cuts_batches_wrongly, "large_batch", "put together wrongly"),
    (faults.spoils_long_passes, "long_batch", "in a long pass"),
    (faults.truncates, "tail", r"truncated at about (4[89]\d|5\d\d) tokens"),
    (faults.caches_by_prefix, "tail", "truncated at about|cached by prefix"),
    (faults.truncates_too_long, "limit", "cut without a word"),
    (faults.mixes_under_load, "cross_talk", "cross-talk"),
    (faults.crashes_on_bad_input, "refusals", "5xx"),
    (faults.accepts_anything, "refusals", "silently accepted"),
    *in_part.FULL,
]


@pytest.mark.parametrize(("fault", "check", "cause"), FULL, ids=lambda v: getattr(v, "__name__", None))
def test_full_names_the_fault(demo_endpoint: Endpoint, tmp_path: Path, fault: Fault, check: str, cause: str) -> None:
    """Faults that only long texts, load or bad requests show are found by the full level's checks."""
    with faulty(demo_endpoint.base_url, fault) as url:
        found = wrong(ask(url, tmp_path, check, *(("limit", "large_batch") * (check == "throughout")), level="full"))
    assert check in found, found
    assert re.search(cause, found[check]), found


def test_a_small_context_is_no_fault(fp32_endpoint: Endpoint, tmp_path: Path) -> None:
    """An engine that takes 512 tokens passes in full: texts that cannot fit are left out, not held against it."""
    report = ask(fp32_endpoint.base_url, tmp_path, level="full")
    assert report.passed, wrong(report)


def test_an_honest_proxy_passes(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """The proxy itself is no fault, also when the server's information routes are hidden."""
    with faulty(demo_endpoint.base_url, faults.honest, hidden=True) as url:
        report = ask(url, tmp_path, max_latency=5000.0)
    assert report.passed, wrong(report)


def test_base64_is_judged_where_it_is_answered(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """An endpoint that answers base64 passes that check; one that ignores it is warned of, and fails when strict."""
    with faulty(demo_endpoint.base_url, faults.right_base64) as url:
        report = ask(url, tmp_path, "base64", "openai")
    assert [c.verdict for c in report.checks] == [Verdict.PASS] * 3
    with faulty(demo_endpoint.base_url, faults.ignores_base64) as url:
        lenient, strict = (ask(url, tmp_path, "base64", strict=s) for s in (False, True))
    assert lenient.checks[-1].verdict is Verdict.WARN
    assert set(wrong(strict)) == {"base64"}


def test_slow_is_a_warning_on_a_cpu_and_a_failure_elsewhere(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """The default limit warns on a CPU; a limit asked for, or an endpoint that is no CPU engine, is held to it."""
    with faulty(demo_endpoint.base_url, faults.slow) as url:
        lenient, asked = ask(url, tmp_path, "latency"), ask(url, tmp_path, "latency", max_latency=100.0)
    with faulty(demo_endpoint.base_url, faults.slow, hidden=True) as url:
        elsewhere = ask(url, tmp_path, "latency")
    assert lenient.passed
    assert lenient.checks[-1].verdict is Verdict.WARN
    for report in (asked, elsewhere):
        assert wrong(report)["latency"].startswith("slow")


def test_usage_that_is_missing_is_a_warning_unless_strict(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """Usage does not make vectors wrong; `--strict` requires it."""
    with faulty(demo_endpoint.base_url, faults.no_usage) as url:
        assert ask(url, tmp_path, "usage").passed
        assert wrong(ask(url, tmp_path, "usage", strict=True)) == {"usage": "usage is missing"}


def test_strict_fails_a_bare_engine(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """What our gateway promises is required of an endpoint on request: error form, unknown models refused."""
    report = ask(demo_endpoint.base_url, tmp_path, "refusals", "error_form", strict=True)
    assert set(wrong(report)) == {"refusals", "error_form"}


@pytest.fixture(scope="session")
def warm_python(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The engine's python with its imports done, once for all references below: a fork a call instead of 4 s each."""
    modules = ("transformers.models.qwen3.modeling_qwen3", "transformers.models.auto")
    environ = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with warm(engine_python, tmp_path_factory.mktemp("warm"), modules, environ) as python:
        yield python


@pytest.fixture(scope="session")
def badly_quantising(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that fp8 costs 1 - cosine 0.06 at most, as it does one of the 4B's shape with random weights.

    Its embeddings are small beside what the layers add, and its attention is sharp, so errors are carried on.
    """
    folder = make_demo_model(tmp_path_factory.mktemp("bad") / "Qwen3-Embedding-bad", DemoShape(layers=4))
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8:start]).items():
        factor = 1.5 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1 / 64 if "embed" in name else None
        if factor:
            begin, end = (start + at for at in entry["data_offsets"])
            wide = (np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32) * factor
            raw[begin:end] = (wide.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    file.write_bytes(raw)
    return folder


@pytest.fixture(scope="session")
def computed(warm_python: Path, demo_model: Path, badly_quantising: Path) -> Iterator[str]:
    """A server that computes with transformers, wrongly on request."""
    process = subprocess.Popen(
        [str(warm_python), str(HERE / "transformers_endpoint.py"), str(demo_model), str(badly_quantising)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    watchdog.cancel()
    assert port, "the transformers endpoint did not start"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture
def kept_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's answers do not change between tests, and a text's not with those beside it: each is asked once."""
    monkeypatch.setattr(runner, "transformers_reference", _kept)


KEPT: dict[tuple[object, ...], Transformers] = {}


def _kept(
    python: Path, folder: Path, texts: Sequence[str], *, dtypes: Sequence[str], device: str, alternatives: bool
) -> Transformers:
    key = (python, folder, tuple(dtypes), device, alternatives)
    seen = KEPT[key].sets[dtypes[0]].vectors if key in KEPT else {}
    new = [text for text in texts if text not in seen]
    if new:
        found = transformers_reference(python, folder, new, dtypes=dtypes, device=device, alternatives=alternatives)
        KEPT[key] = _merged(KEPT.get(key, found), found)
    return _merged(KEPT[key], KEPT[key], texts)


def _merged(one: Transformers, other: Transformers, texts: Sequence[str] | None = None) -> Transformers:
    """What both say, or of that what they say of `texts`."""

    def both(a: Mapping[str, Vector], b: Mapping[str, Vector]) -> dict[str, Vector]:
        together = {**a, **b}
        return together if texts is None else {text: together[text] for text in texts if text in together}

    return replace(
        one,
        sets={name: replace(a, vectors=both(a.vectors, other.sets[name].vectors)) for name, a in one.sets.items()},
        alternatives={name: both(a, other.alternatives[name]) for name, a in one.alternatives.items()},
    )


@pytest.fixture
def without_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float8 is slow to emulate on a CPU, so the text of 4,500 tokens is left out; another has more than 512."""
    monkeypatch.setattr(texts, "REFERENCE", texts.REFERENCE[:-1])


@pytest.mark.usefixtures("kept_reference")
@pytest.mark.parametrize(
    ("mode", "check", "cause"),
    [
        ("mean", "demo_reference", "mean pooling"),
        ("cls", "distinct", "one vector|confused"),
        ("no_eos", "demo_reference", "does not append"),
        ("im_end", "demo_reference", "im_end"),
        ("double_eos", "demo_reference", "twice"),
        ("right_padding", "batch", "padding on the wrong side"),
        ("right_padding_128", "demo_reference", "padding on the wrong side"),
        ("left_unmasked_128", "demo_reference", "not masked"),
        ("bidirectional", "demo_reference", "not causal"),
        ("second_last_layer", "demo_reference", "layer before the last"),
        ("bos", "demo_reference", "put before the text"),
        ("last_two", "demo_reference", "mean of the last two"),
        ("weighted_mean", "demo_reference", "weighted by position"),
        ("rotary_base", "demo_reference", "rotary base"),
    ],
)
def test_a_wrong_computation_is_named(
    computed: str, warm_python: Path, tmp_path: Path, mode: str, check: str, cause: str
) -> None:
    """Pooling, EOS and padding faults, computed with transformers, are recognised for what they are."""
    found = wrong(ask(f"{computed}/{mode}/v1", tmp_path, python=warm_python, max_latency=5000.0))
    assert check in found, found
    assert re.search(cause, found[check]), found


@pytest.mark.parametrize("mode", ["right", "half"])
def test_another_right_server_passes(computed: str, tmp_path: Path, mode: str) -> None:
    """A server of another make that computes rightly, in float32 or float16, is not refused."""
    report = ask(f"{computed}/{mode}/v1", tmp_path, max_latency=5000.0)
    assert report.passed, wrong(report)


@pytest.mark.usefixtures("kept_reference", "without_the_longest")
def test_float8_is_judged_by_what_it_does_to_the_checkpoint(computed: str, warm_python: Path, tmp_path: Path) -> None:
    """Quantised right, it is within what the emulation says of this checkpoint, which is closer than the estimate."""
    fp8 = {"quantization": "fp8", "dtype": "bfloat16"}
    told = ask(f"{computed}/fp8/v1", tmp_path, "transformers", python=warm_python, known=fp8)
    assert told.passed, wrong(told)
    figures = told.checks[-1].figures
    assert figures["min_cosine_to_fp8"] > 0.99999
    assert figures["min_cosine"] == pytest.approx(figures["fp8_reference_min_cosine"], abs=1e-4)
    assert 1 - figures["min_cosine"] < figures["allowed"] < 0.02
    untold = ask(f"{computed}/fp8/v1", tmp_path, "transformers", python=warm_python)
    assert "noise or a coarser number format" in wrong(untold)["transformers"]


QUANTISED = {"quantization": "fp8", "dtype": "bfloat16"}


@pytest.mark.usefixtures("kept_reference", "without_the_longest")
def test_a_checkpoint_that_quantises_badly_is_a_warning(computed: str, warm_python: Path, tmp_path: Path) -> None:
    """Another right implementation of fp8 agrees with transformers' own as far as that is from float32, or better."""
    report = ask(f"{computed}/quantised_right/v1", tmp_path, "transformers", python=warm_python, known=QUANTISED)
    check = report.checks[-1]
    assert check.verdict is Verdict.WARN, check
    assert "computed right" in check.cause
    figures = check.figures
    assert figures["judged_by"] == "fp8"
    assert figures["min_cosine"] < 0.95, "no checkpoint that quantises badly"
    assert figures["min_cosine_to_fp8"] > figures["min_cosine"]
    assert figures["mean_cosine_to_fp8"] > (1 + figures["mean_cosine"]) / 2


@pytest.mark.usefixtures("kept_reference", "without_the_longest")
@pytest.mark.parametrize(
    ("mode", "fault", "cause"),
    [
        ("mean", None, "^mean pooling"),
        ("no_eos", None, "does not append"),
        ("im_end", None, "im_end"),
        ("double_eos", None, "appended twice"),
        ("right_padding_128", None, "padding on the wrong side"),
        ("left_unmasked_128", None, "not masked"),
        ("bidirectional", None, "not causal"),
        ("second_last_layer", None, "layer before the last"),
        ("right", faults.strips_instruction, "instruction is stripped"),
        ("right", faults.space_after_query, "space after `Query:`"),
        ("right", faults.lower_cases, "lower-cased"),
        ("right", faults.strips_space, "white space .*stripped"),
        ("right", faults.truncates, "truncated"),
        ("right", faults.permutes_dims, "components in another order"),
    ],
)
def test_a_fault_is_named_where_the_checkpoint_quantises_badly(
    computed: str, warm_python: Path, tmp_path: Path, mode: str, fault: Fault | None, cause: str
) -> None:
    """The faults of a float8 endpoint are refused and named, whatever float8 costs its checkpoint."""
    url = f"{computed}/quantised_{mode}/v1"
    with faulty(url, fault) if fault else nullcontext(url) as asked:
        check = ask(asked, tmp_path, "transformers", python=warm_python, known=QUANTISED).checks[-1]
    assert check.verdict is Verdict.FAIL, check
    assert check.figures["judged_by"] == "fp8"
    assert re.search(cause, check.cause), check


def test_the_shipped_demo_vectors_are_what_transformers_computes(warm_python: Path, demo_model: Path) -> None:
    """The file in the package is the output of its command, to float32."""
    shipped = load(DEMO_SET)
    again = transformers_reference(warm_python, demo_model, list(shipped.vectors), dtypes=("float32",))
    for text, vector in again.sets["float32"].vectors.items():
        assert vector == pytest.approx(shipped.vectors[text], abs=1e-5)


def test_a_reference_script_that_cannot_run_is_a_skip_with_its_reason(demo_endpoint: Endpoint, tmp_path: Path) -> None:
    """No torch in that python: the comparison is skipped and says why, the rest is judged."""
    report = ask(demo_endpoint.base_url, tmp_path, "transformers", python=Path(sys.executable))
    assert report.checks[-1].verdict is Verdict.SKIP
    assert "torch" in report.checks[-1].cause


def test_saved_sets_hold_a_later_deployment(demo_endpoint: Endpoint, fp32_endpoint: Endpoint, tmp_path: Path) -> None:
    """A set saved from one deployment accepts another that computes the same, and refuses one that does not."""
    kept = verify(
        Request(demo_endpoint.base_url, Options(), tmp_path / "w.json", only=frozenset({"norm"}), keep_vectors=True)
    )[1]
    assert kept is not None
    assert ask(fp32_endpoint.base_url, tmp_path, "saved_reference", reference=kept, dtype="bfloat16").passed
    with faulty(demo_endpoint.base_url, faults.lower_cases) as url:
        assert "saved_reference" in wrong(ask(url, tmp_path, "saved_reference", reference=kept))


def test_the_command_prints_an_envelope_and_exits_by_the_verdict(
    demo_endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 0 and a report for a right endpoint, exit 1 with the table in the envelope for a wrong one."""
    from qwen3emb_launch.cli.app import run

    page = tmp_path / "report.md"
    assert run(["verify", "--base-url", demo_endpoint.base_url, "--json", "--report", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["passed"] is True
    assert "| unit length | pass |" in page.read_text(encoding="utf-8")
    with faulty(demo_endpoint.base_url, faults.unnormalised) as url:
        assert run(["verify", "--base-url", url, "--json", "--report", str(tmp_path / "report.json")]) == 1
    envelope = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == envelope
    assert envelope["error"]["code"] == "verification_failed"
    assert "no L2 normalisation" in envelope["error"]["message"]
    assert envelope["result"]["passed"] is False


def test_diff_tells_same_from_other(
    demo_endpoint: Endpoint, fp32_endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bfloat16 and float32 of one checkpoint may share an index, an endpoint without the instruction may not."""
    from qwen3emb_launch.cli.app import run

    saved = tmp_path / "saved.json"
    assert run(["verify", "--base-url", demo_endpoint.base_url, "--save-reference", str(saved), "--json"]) == 0
    capsys.readouterr()
    assert run(["diff", demo_endpoint.base_url, fp32_endpoint.base_url, "--json"]) == 0
    same = json.loads(capsys.readouterr().out)["result"]
    assert same["may_share_index"] is True
    assert same["fingerprint_differences"] == {"dtype": {"a": "bfloat16", "b": "float32"}}
    with faulty(demo_endpoint.base_url, faults.strips_instruction) as url:
        assert run(["diff", str(saved), url, "--json"]) == 1
    other = json.loads(capsys.readouterr().out)["result"]
    assert other["verdict"] == "other"
    assert other["furthest"].startswith("Instruct:")


def test_the_notebook_runs(demo_endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/verify.ipynb runs from top to bottom against the real engine, and is kept without outputs."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("BASE_URL", demo_endpoint.base_url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    page = HERE.parent / "docs" / "verify.ipynb"
    notebook = nbformat.read(page, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "keep outputs out of the repository"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert "passed" in str(notebook.cells[-1].outputs[-1])
