"""`verify` and `diff` without an engine: a small endpoint with vectors from hashes, and the pure parts."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest
from instructions import counted
from small_endpoint import WIDTH, SmallEndpoint, hashed, serving

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.verify import texts, tolerance
from qwen3emb_launch.verify.diff import compare_sets, spearman
from qwen3emb_launch.verify.fingerprint import differences, with_id
from qwen3emb_launch.verify.identity import catalog_of, from_plan
from qwen3emb_launch.verify.probes_reference import CAUSES, diagnose
from qwen3emb_launch.verify.reference import DEMO_SET, ReferenceSet, load, save
from qwen3emb_launch.verify.report import Check, Report, Verdict, markdown
from qwen3emb_launch.verify.runner import Request, open_session, verify
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.tolerance import Precision
from qwen3emb_launch.verify.yardstick import number_format
from qwen3emb_launch.weights import weights_sample, weights_sha256


@pytest.fixture
def endpoint() -> SmallEndpoint:
    return SmallEndpoint()


@pytest.fixture
def url(endpoint: SmallEndpoint) -> Iterator[str]:
    with serving(endpoint) as address:
        yield address


def report_of(url: str, folder: Path, /, *only: str, **more: Any) -> Report:
    options = more.pop("options", Options())
    return verify(Request(url, options, folder / "w.json", only=frozenset(only), **more))[0]


def envelope(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_an_endpoint_of_another_make_passes_quick(url: str, tmp_path: Path) -> None:
    """Nothing but the OpenAI interface is needed; ranking without a known model is no failure."""
    report = report_of(url, tmp_path)
    assert report.passed, [(c.title, c.cause) for c in report.failures]
    assert not report.fingerprint["complete"]
    assert report.fingerprint["id"].endswith("?")


def golden_vectors(scores: tuple[tuple[float, float], tuple[float, float]], width: int) -> dict[str, list[float]]:
    """Vectors whose inner products are these scores."""
    (a, b), (c, d) = scores

    def padded(*head: float) -> list[float]:
        return [*head, *[0.0] * (width - len(head))]

    first, second = texts.INSTRUCTED
    one, two = texts.DOCUMENTS
    return {
        first: padded(1.0),
        second: padded(0.0, 1.0),
        one: padded(a, c, math.sqrt(1 - a * a - c * c)),
        two: padded(b, d, 0.0, math.sqrt(1 - b * b - d * d)),
    }


def test_the_demo_is_known_by_its_vectors_and_by_nothing_less(
    endpoint: SmallEndpoint, url: str, tmp_path: Path
) -> None:
    """Random weights rank at random, which is not judged; a model that only shares the name and the width is."""
    demo = load(DEMO_SET)
    endpoint.model["id"], endpoint.width = "demo", demo.width

    def ranked(vectors: dict[str, list[float]]) -> Verdict:
        endpoint.vectors = vectors
        (check,) = [c for c in report_of(url, tmp_path, "ranking").checks if c.id == "ranking"]
        return check.verdict

    right = {text: list(demo.vectors[text]) for text in texts.BASE}
    assert ranked(right) is Verdict.SKIP
    turned = {t: [-v[1], v[0], *v[2:]] for t, v in right.items()}  # which `demo_reference` sees
    assert ranked(turned) is Verdict.SKIP
    exchanged = {**right, texts.EMOJI: right[texts.MIXED], texts.MIXED: right[texts.EMOJI]}
    assert ranked(exchanged) is Verdict.WARN
    golden = golden_vectors(texts.GOLDEN["4b"], demo.width)
    (one, two), (first, second) = texts.DOCUMENTS, (golden[t] for t in texts.DOCUMENTS)
    assert ranked({**golden, one: second, two: first}) is Verdict.WARN
    endpoint.model["id"] = CATALOG["4b"].hub_id
    assert ranked(right) is Verdict.FAIL


@pytest.mark.parametrize("key", list(CATALOG))
def test_golden_scores_are_required_of_the_official_models(
    endpoint: SmallEndpoint, url: str, tmp_path: Path, key: str
) -> None:
    """The published scores pass; 0.02 off fails and says that these are not the model's vectors."""
    endpoint.model["id"] = CATALOG[key].hub_id
    right = texts.GOLDEN[key]
    endpoint.width = width = CATALOG[key].shape.hidden_size
    endpoint.vectors = golden_vectors(right, width)
    report = report_of(url, tmp_path, "golden", "ranking", "width")
    assert report.passed, [(c.title, c.cause) for c in report.failures]
    off = ((right[0][0] - 0.02, right[0][1]), right[1])
    endpoint.vectors = golden_vectors(off, width)
    failed = report_of(url, tmp_path, "golden").failures
    assert [c.id for c in failed] == ["golden"]
    assert "EOS" in failed[0].cause


def test_the_hub_cache_tells_which_model_is_served(tmp_path: Path) -> None:
    """A snapshot's path names the official model; a folder that only sounds like it does not."""
    snapshot = "/home/u/.cache/huggingface/hub/models--Qwen--Qwen3-Embedding-8B/snapshots/0123"
    assert catalog_of(snapshot) is CATALOG["8b"]
    assert catalog_of("/models/Qwen3-Embedding-8B") is None


def test_a_model_of_another_width_is_not_the_named_one(endpoint: SmallEndpoint, url: str, tmp_path: Path) -> None:
    """64 dims under the name of the 0.6B."""
    endpoint.model["id"] = "Qwen/Qwen3-Embedding-0.6B"
    assert "not Qwen/Qwen3-Embedding-0.6B" in report_of(url, tmp_path, "width").failures[0].cause


def test_an_endpoint_that_is_down_exits_5(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens: a network error with the address, not a failed check."""
    assert run(["verify", "--base-url", "http://127.0.0.1:9/v1", "--json"]) == 5
    assert envelope(capsys)["error"]["code"] == "endpoint_unreachable"


def test_a_wrong_key_exits_5_with_the_option_to_give_it(
    endpoint: SmallEndpoint, url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """401 is said as such; the right key from a file is taken; no key is ever printed."""
    endpoint.key = "sesame"
    assert run(["verify", "--base-url", url, "--json"]) == 5
    assert "--api-key-file" in envelope(capsys)["error"]["hint"]
    file = tmp_path / "key"
    file.write_text("sesame\n", encoding="utf-8")
    assert run(["verify", "--base-url", url, "--json", "--only", "norm", "--api-key-file", str(file)]) == 0
    assert "sesame" not in "".join(capsys.readouterr())


def test_a_key_in_the_command_line_is_warned_of(
    endpoint: SmallEndpoint, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everyone on the machine sees it in the process list."""
    assert run(["verify", "--base-url", url, "--only", "norm", "--api-key", "x"]) == 0
    assert "process list" in capsys.readouterr().err


def test_a_missing_v1_is_found_with_a_warning(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The address without /v1 works, and is said to be incomplete."""
    assert run(["verify", "--base-url", url.removesuffix("/v1"), "--only", "norm", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["result"]["endpoint"] == url
    assert "/v1" in said.err


def test_a_checkpoint_tells_what_the_endpoint_does_not(url: str, tmp_path: Path) -> None:
    """Depth and number format come from --checkpoint, and so do the tolerances."""
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 28, "dtype": "float32"}', encoding="utf-8")
    assert report_of(url, tmp_path, "norm").precision == "bfloat16 (assumed), 36 layers"
    assert report_of(url, tmp_path, "norm", folder=tmp_path).precision == "float32 (the checkpoint's), 28 layers"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_limit_of_ten_texts_is_no_fault(endpoint: SmallEndpoint, url: str, tmp_path: Path, status: int) -> None:
    """As hosted APIs have it: the same texts are asked in parts, and the check says so. Of SGLang it is one."""
    right = endpoint.embed

    def limited(body: Any) -> tuple[int, Any]:
        if isinstance(body, dict) and isinstance(body.get("input"), list) and len(body["input"]) > 10:
            return status, {"error": {"message": "at most 10 texts"}}
        return right(body)

    endpoint.embed = limited  # type: ignore[method-assign]
    report = report_of(url, tmp_path, options=Options("full"))
    assert report.passed, [(c.title, c.cause) for c in report.failures]
    by_id = {c.id: c for c in report.checks}
    assert "requests of 10" in by_id["batch"].seen
    assert by_id["large_batch"].verdict is Verdict.WARN
    endpoint.model["owned_by"] = "sglang"
    assert {c.id for c in report_of(url, tmp_path, "batch", "faithful").failures} == {"batch", "faithful"}


def test_a_letter_of_many_tokens_is_warned_of(endpoint: SmallEndpoint, url: str, tmp_path: Path) -> None:
    """A prefix before every text shows in the count of the shortest one."""
    right = endpoint.embed

    def framed(body: Any) -> tuple[int, Any]:
        status, answer = right(body)
        if status == 200:
            for kind in ("prompt_tokens", "total_tokens"):
                answer["usage"][kind] += 9 * len(answer["data"])
        return status, answer

    endpoint.embed = framed  # type: ignore[method-assign]
    check = report_of(url, tmp_path, "usage").checks[-1]
    assert check.verdict is Verdict.WARN
    assert "a prefix or an instruction is added" in check.cause


def test_a_length_that_is_only_claimed_is_named(endpoint: SmallEndpoint, url: str, tmp_path: Path) -> None:
    """An endpoint that takes less than it says fails `limit` with that cause, and is not called unreliable for it."""
    right = endpoint.embed

    def short(body: Any) -> tuple[int, Any]:
        if isinstance(body, dict) and isinstance(body.get("input"), str) and len(body["input"]) > 700:
            return 400, {"error": {"message": "longer than the context"}}
        return right(body)

    endpoint.embed = short  # type: ignore[method-assign]
    endpoint.model["max_model_len"] = 1000
    report = report_of(url, tmp_path, "limit", "reliable")
    (failure,) = report.failures
    assert failure.id == "limit"
    assert "less is taken than the endpoint says" in failure.cause


def test_an_answer_of_another_model_is_a_warning_of_a_foreign_endpoint(
    endpoint: SmallEndpoint, url: str, tmp_path: Path
) -> None:
    """Hosted APIs call a model by several names: one unlike what was asked is told; `--strict` requires it."""
    endpoint.model["id"] = "Qwen/Qwen3-Embedding-4B"
    right, name = endpoint.embed, "qwen3-embedding-4b-2507"

    def named(body: Any) -> tuple[int, Any]:
        status, answer = right(body)
        return status, {**answer, "model": name}

    endpoint.embed = named  # type: ignore[method-assign]
    assert report_of(url, tmp_path, "model_name").checks[-1].verdict is Verdict.PASS
    name = "text-embedding-3-small"
    check = report_of(url, tmp_path, "model_name").checks[-1]
    assert check.verdict is Verdict.WARN
    assert "another model" in check.cause
    assert report_of(url, tmp_path, "model_name", options=Options(strict=True)).failures


def test_a_path_is_no_other_model_where_nobody_told_it(endpoint: SmallEndpoint, url: str, tmp_path: Path) -> None:
    """SGLang answers its model's path, which only its own information routes tell; a proxy may hide those."""
    endpoint.model |= {"id": "embeddings", "owned_by": "sglang"}
    right = endpoint.embed
    endpoint.embed = lambda body: (lambda s, a: (s, {**a, "model": "/models/Q4B"}))(*right(body))  # type: ignore[method-assign]
    assert report_of(url, tmp_path, "model_name").checks[-1].verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["--base-url", "ftp://somewhere/v1"], 2, "bad_url"),
        (["--base-url", "nonsense"], 2, "bad_url"),
        (["--base-url", "http://[::1"], 2, "bad_url"),
        (["--base-url", "http://127.0.0.1:x/v1"], 2, "bad_url"),
        (["demo", "--base-url", "http://127.0.0.1:9/v1"], 2, "usage"),
        (["--base-url", "http://127.0.0.1:9/v1", "--dtype", "int4"], 2, "bad_dtype"),
        (["--base-url", "http://127.0.0.1:9/v1", "--report", "r.txt"], 2, "bad_report"),
        (["--base-url", "http://127.0.0.1:9/v1", "--report", "/no/such/folder/r.md"], 3, "unwritable"),
        (["--base-url", "http://127.0.0.1:9/v1", "--save-reference", "/no/such/folder/s.json"], 3, "unwritable"),
        (["--base-url", "http://user:sesame@127.0.0.1:9/v1"], 2, "bad_url"),
        (["--base-url", "http://127.0.0.1:9/v1", "--api-key", "two\nlines sesame"], 2, "bad_key"),
        (["--base-url", "http://127.0.0.1:9/v1", "--api-key", "sésame"], 2, "bad_key"),
        (["--base-url", "http://127.0.0.1:9/v1", "--reference", "/no/such/file.json"], 2, "bad_reference"),
        (["--base-url", "http://127.0.0.1:9/v1", "--checkpoint", "/no/such/folder"], 2, "not_a_model"),
        (["--base-url", "http://127.0.0.1:9/v1", "--engine-python", "/no/such/python"], 2, "bad_python"),
        (["--base-url", "http://127.0.0.1:9/v1", "--api-key-file", "/no/such/key"], 2, "bad_key_file"),
        (["--base-url", "http://127.0.0.1:9/v1", "--max-latency", "-1"], 2, "usage"),
        (["no-such-instance"], 2, "unknown_instance"),
        ([], 3, "not_running"),
    ],
)
def test_bad_input_is_refused_before_anything_is_asked(
    arguments: list[str], status: int, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its own code and exit status, and without a word of a secret."""
    assert run(["verify", *arguments, "--json"]) == status
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["code"] == code
    assert not re.search("s[eé]same", "".join(said))


def test_an_unknown_check_is_named_with_the_nearest(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--only dim` is no check; dims is."""
    assert run(["verify", "--base-url", url, "--only", "dim", "--json"]) == 2
    assert "dims" in envelope(capsys)["error"]["hint"]


def test_a_failing_endpoint_leaves_no_reference(
    endpoint: SmallEndpoint, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors that fail are not saved for later deployments to be held to."""
    endpoint.vectors = {t: [1.0] * WIDTH for t in texts.BASE}
    saved = tmp_path / "saved.json"
    assert run(["verify", "--base-url", url, "--only", "distinct", "--save-reference", str(saved)]) == 1
    assert "not written" in capsys.readouterr().err
    assert not saved.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"schema": 2, "vectors": []}',
        '{"schema": 1, "vectors": [], "origin": ""}',
        '{"schema": 1, "vectors": [{"text": "x", "vector": "AACAPw=="}], "origin": "", "dtype": "float32", "model": ""'
        ', "fingerprint": [], "at": ""}',
    ],
)
def test_what_is_no_reference_set_is_refused(content: str, tmp_path: Path) -> None:
    """Empty, foreign, newer, without vectors."""
    file = tmp_path / "set.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(Exception, match="no reference set"):
        load(file)


def test_a_reference_set_survives_its_file(tmp_path: Path) -> None:
    """float32 values come back as they were."""
    reference = ReferenceSet("here", "float32", {"a": (0.5, -0.25), "ü": (1.0, 0.0)}, "m", {"id": "x"}, "now")
    save(reference, tmp_path / "set.json")
    again = load(tmp_path / "set.json")
    assert (again.vectors, again.dtype, again.fingerprint) == (reference.vectors, "float32", {"id": "x"})


# -- tolerances ---------------------------------------------------------------------------------------------------


def test_tolerances_follow_the_number_format() -> None:
    """The documented figures: 36 layers and two, bfloat16 and float32, float8 weights."""
    bf16 = tolerance.Precision("bfloat16", "as told", 36)
    assert bf16.distance == pytest.approx(2.9e-3, rel=0.02)
    assert tolerance.Precision("bfloat16", "as told", 2).distance == pytest.approx(1.6e-4, rel=0.02)
    assert tolerance.Precision("float32", "as told", 36).distance == 1e-5
    assert tolerance.Precision("bfloat16", "as told", 36, "fp8").distance == 0.02
    assert bf16.norm == pytest.approx(0.005)
    assert bf16.component(0.1) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("given", "name"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("auto", None), (None, None), ("float", "float32")],
)
def test_number_formats_by_any_name(given: str | None, name: str | None) -> None:
    """As engines, configs and people write them."""
    assert tolerance.canonical_dtype(given) == name


def test_a_checkpoint_that_amplifies_rounding_widens_the_tolerance_within_bounds() -> None:
    """Four times its own bfloat16 error, 0.01 at most, and nothing for a float32 endpoint."""
    bf16 = tolerance.Precision("bfloat16", "as told", 2)
    assert number_format(bf16, None) == bf16.distance
    assert number_format(bf16, 1e-3) == pytest.approx(4e-3)
    assert number_format(bf16, 0.5) == 0.01
    assert number_format(tolerance.Precision("float32", "as told", 2), 1e-3) == 1e-5


def test_every_cause_has_a_wrong_way_behind_it() -> None:
    """The causes name what the reference script computes, and nothing else."""
    script = (Path(__file__).resolve().parents[1] / "qwen3emb_launch/engine_scripts/reference.py").read_text("utf-8")
    for name in CAUSES:
        assert f'"{name}"' in script or f'f"{name}_' in script, name


def test_a_diagnosis_needs_half_of_the_texts() -> None:
    """One text that happens to match names nothing; all of them do."""
    wrong = ["a", "b", "c", "d"]
    right = {t: tuple(hashed(t)) for t in wrong}
    mean = {t: tuple(hashed(f"mean {t}")) for t in wrong}
    seen = {**right, "a": mean["a"]}
    assert diagnose(seen, wrong, 1e-4, {"mean_pooling": mean}) == ""
    assert diagnose(mean, wrong, 1e-4, {"mean_pooling": mean}) == CAUSES["mean_pooling"]


# -- fingerprints ------------------------------------------------------------------------------------------------


def test_the_fingerprint_hangs_on_weights_not_on_how_they_came() -> None:
    """With the weights known, revision and full hash add nothing to the id; another dtype is another fingerprint."""
    parts = {"weights_sample": "w", "model_revision": None, "weights_sha256": None, "dtype": "bfloat16", "dims": 8}
    plain = with_id(parts)
    assert plain["complete"]
    assert with_id({**parts, "model_revision": "abc", "weights_sha256": "f"})["id"] == plain["id"]
    other = with_id({**parts, "dtype": "float32"})
    assert other["id"] != plain["id"]
    assert differences(plain, other) == {"dtype": ("bfloat16", "float32")}


def test_full_hashes_count_as_a_difference_where_both_are_known() -> None:
    """A quick run's fingerprint beside a full one's differs in nothing; two full ones of other bytes do."""
    parts = {"weights_sample": "w", "weights_sha256": None}
    one, two = with_id({**parts, "weights_sha256": "1"}), with_id({**parts, "weights_sha256": "2"})
    assert differences(with_id(parts), one) == {}
    assert differences(one, two) == {"weights_sha256": ("1", "2")}


def test_an_unknown_part_makes_the_fingerprint_incomplete() -> None:
    """Unknown is not equal to unknown, be it a number format or the whole checkpoint."""
    found = with_id({"weights_sample": "w", "model_revision": None, "dtype": None})
    assert not found["complete"]
    assert found["id"].endswith("?")
    assert not with_id({"weights_sample": None, "model_revision": None, "dtype": "bfloat16"})["complete"]


def safetensors(file: Path, tensors: dict[str, bytes]) -> None:
    """A file of one-dimensional bfloat16 tensors."""
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [len(data) // 2], "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(tensors.values()))


def test_the_weights_sample_tells_checkpoints_apart_not_their_files(tmp_path: Path) -> None:
    """Two files or one, in any order: the same. A changed number of a small tensor, or a trained large one: another."""
    large = random.Random(1).randbytes(100_000)
    tensors = {"a": large, "b": b"\1\2" * 100, "c": b"\3\4" * 7}
    one, two, other, trained = (tmp_path / name for name in ("one", "two", "other", "trained"))
    for folder in (one, two, other, trained):
        folder.mkdir()
    safetensors(one / "model.safetensors", tensors)
    safetensors(two / "model-1.safetensors", {"c": tensors["c"], "b": tensors["b"]})
    safetensors(two / "model-2.safetensors", {"a": large})
    safetensors(other / "model.safetensors", {**tensors, "c": b"\3\4" * 6 + b"\3\5"})
    safetensors(trained / "model.safetensors", {**tensors, "a": large[:-2] + b"\0\0"})
    sample = weights_sample(one)
    assert sample is not None
    assert weights_sample(two) == sample
    assert len({sample, weights_sample(other), weights_sample(trained)}) == 3


@pytest.mark.parametrize("content", [b"", b"one", b"\xff" * 20, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_weights_that_cannot_be_read_have_no_sample(content: bytes, tmp_path: Path) -> None:
    """Unknown, not an error and not a hash of nothing."""
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_sample(tmp_path) is None
    assert weights_sample(tmp_path / "nothing") is None


def test_quick_does_not_read_a_large_checkpoint(url: str, tmp_path: Path) -> None:
    """The full hash takes seconds a gigabyte: quick tells it only where it is remembered, full reads it."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    safetensors(tmp_path / "model.safetensors", {"a": b"\1\2" * 9})
    memory = tmp_path / "w.json"
    quick = verify(Request(url, Options(), memory, folder=tmp_path))[0].fingerprint
    assert quick["parts"]["weights_sample"] is not None
    assert quick["parts"]["weights_sha256"] is None
    full = verify(Request(url, Options("full"), memory, folder=tmp_path))[0].fingerprint
    assert full["parts"]["weights_sha256"] is not None
    assert full["id"] == quick["id"]
    again = verify(Request(url, Options(), memory, folder=tmp_path))[0].fingerprint
    assert again["parts"] == full["parts"]


def test_weights_are_hashed_once_and_again_when_they_change(tmp_path: Path) -> None:
    """The memory is keyed by path, size and time; a hub blob's name is taken as its hash unread."""
    folder, memory = tmp_path / "model", tmp_path / "cache" / "weights.json"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(b"one")
    first = weights_sha256(folder, memory)
    assert first == hashlib.sha256(b"one").hexdigest()
    remembered = json.loads(memory.read_text("utf-8"))
    memory.write_text(json.dumps(dict.fromkeys(remembered, "kept")), encoding="utf-8")
    assert weights_sha256(folder, memory) == "kept"
    file.write_bytes(b"other")
    assert weights_sha256(folder, memory) == hashlib.sha256(b"other").hexdigest()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"not that hash")
    file.unlink()
    file.symlink_to(blob)
    assert weights_sha256(folder, memory) == "ab" * 32
    assert weights_sha256(tmp_path / "nothing", memory) is None


@pytest.mark.parametrize(("owner", "quantised"), [("qwen3emb", "fp8"), ("test", None)])
def test_a_gateways_own_word_on_precision_counts(
    endpoint: SmallEndpoint, url: str, tmp_path: Path, owner: str, quantised: str | None
) -> None:
    """Ours is believed; another server's list may mean anything by such words. The user's own word wins."""

    def precision(**more: Any) -> Precision:
        session = open_session(Request(url, Options(), tmp_path / "w.json", **more))
        session.contact.close()
        return session.precision

    endpoint.model |= {"owned_by": owner, "dtype": "float16", "quantization": "fp8"}
    found = precision()
    assert (found.dtype, found.quantised) == (("float16", "fp8") if quantised else ("bfloat16", None))
    assert found.origin == ("the gateway says" if quantised else "assumed")
    told = precision(dtype="float32")
    assert (told.dtype, told.origin, told.quantised) == ("float32", "as told", quantised)
    endpoint.model |= {"dtype": 16, "quantization": None}
    assert precision().origin == "assumed"


@pytest.mark.parametrize(("width", "instructions"), [(2560, 4.5e6), (4096, 6e6)])
def test_quick_takes_little_of_a_processor(
    endpoint: SmallEndpoint, url: str, tmp_path: Path, monkeypatch, width: int, instructions: float
) -> None:
    """At the width of the 4B and of the 8B: so many requests, texts, instructions of the interpreter, and each answer
    read once, by orjson. Uncounted, its 3.1 and 4.2 million instructions take 0.12 and 0.19 s of a core here."""
    endpoint.width = width
    request = Request(url, Options(max_latency=10_000), tmp_path / "w.json")
    verify(request)  # the endpoint's hashes, the libraries
    texts_asked: list[int] = []
    answered: list[int] = []
    read: Counter[str] = Counter()
    answer = endpoint.embed

    def embed(body: Any) -> tuple[int, Any]:
        given = body.get("input") if isinstance(body, dict) else None
        texts_asked.append(len(given) if isinstance(given, list) else 1)
        status, value = answer(body)
        answered.append(len(orjson.dumps(value)))
        return status, value

    def reading(module: ModuleType) -> Callable[..., Any]:
        real = module.loads

        def loads(data: Any, *more: Any, **words: Any) -> Any:
            read[module.__name__] += len(data)
            return real(data, *more, **words)

        return loads

    monkeypatch.setattr(endpoint, "embed", embed)
    monkeypatch.setattr(orjson, "loads", reading(orjson))
    monkeypatch.setattr(json, "loads", reading(json))
    with counted(lambda thread: "process_request" not in thread) as done:
        report, _ = verify(request)
    assert report.passed
    assert 20 < len(texts_asked) <= 70
    assert sum(texts_asked) <= 140
    assert 0 < sum(done.values()) < instructions
    assert sum(answered) <= read["orjson"] < 1.1 * sum(answered)
    assert read["json"] < 0.1 * sum(answered)  # requests, by the endpoint here, and what is known of the demo model


def test_a_plan_tells_what_it_knows_and_nothing_else() -> None:
    """Missing parts of plan.json stay unknown instead of becoming wrong."""
    plan = {
        "context_length": 8192,
        "model": {"path": "/m", "revision": "abc", "shape": {"layers": 2, "dtype": "bfloat16"}},
        "engine": {"version": "0.5.15.post1", "flavour": "cpu"},
        "settings": [{"key": "dtype", "value": "auto"}, {"key": "quantization", "value": "fp8"}],
    }
    told = from_plan(plan)
    assert (told["dtype"], told["device"], told["layers"], told["quantization"]) == ("bfloat16", "cpu", 2, "fp8")
    assert set(from_plan({})) == {"engine"}
    unquantised = from_plan({"settings": [{"key": "quantization", "value": "none"}]})
    assert "quantization" not in unquantised


# -- diff --------------------------------------------------------------------------------------------------------


def as_set(change: float, name: str, width: int = WIDTH) -> ReferenceSet:
    """All texts' hash vectors, moved by so much in a direction of their own."""
    vectors = {
        t: tuple(x + change * y for x, y in zip(hashed(t, width), hashed(f"~{t}", width), strict=True))
        for t in texts.ALL
    }
    return ReferenceSet(name, "bfloat16", vectors, fingerprint=with_id({"dtype": "bfloat16"}))


@pytest.mark.parametrize(("change", "verdict"), [(0.0, "same"), (0.01, "same"), (0.1, "close"), (1.0, "other")])
def test_diff_judges_by_distance_and_by_what_searches_find(change: float, verdict: str) -> None:
    """Rounding is the same index, a coarser format a close one, another model another one."""
    found = compare_sets(as_set(0.0, "a"), as_set(change, "b"), allowed=3e-3)
    assert found.verdict == verdict, found
    assert found.may_share == (verdict != "other")


def test_diff_of_two_lengths_never_shares() -> None:
    """One direction is one cosine, but an index by inner product ranks the longer side first."""
    short = as_set(0.0, "a")
    long = ReferenceSet("b", "bfloat16", {t: tuple(7.3 * x for x in v) for t, v in short.vectors.items()})
    found = compare_sets(short, long, allowed=3e-3)
    assert not found.may_share
    assert "length 1.000 and 7.300" in found.reason


def test_diff_of_two_widths_never_shares() -> None:
    """One index has one width."""
    found = compare_sets(as_set(0.0, "a"), as_set(0.0, "b", 32), allowed=3e-3)
    assert (found.verdict, found.cosine) == ("other", {})


def test_diff_without_a_common_text_or_with_nan_never_shares() -> None:
    """Nothing was compared, so nothing is claimed."""
    empty = ReferenceSet("b", "bfloat16", {"something else": (1.0, 0.0)})
    assert not compare_sets(as_set(0.0, "a"), empty, allowed=1e-3).may_share
    bad = as_set(0.0, "b")
    broken = ReferenceSet("b", "bfloat16", {**bad.vectors, texts.ALL[0]: (math.nan,) * WIDTH})
    assert "NaN" in compare_sets(as_set(0.0, "a"), broken, allowed=1e-3).reason


def test_spearman_of_equal_and_opposite_orders() -> None:
    """1 and -1."""
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1


def test_diff_of_a_saved_set_and_an_endpoint(
    endpoint: SmallEndpoint, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file is as good a side as an endpoint; exit 1 when the two may not share."""
    saved = tmp_path / "saved.json"
    assert run(["verify", "--base-url", url, "--only", "norm", "--save-reference", str(saved), "--json"]) == 0
    capsys.readouterr()
    assert run(["diff", str(saved), url, "--json"]) == 0
    assert envelope(capsys)["result"]["verdict"] == "same"
    endpoint.vectors = {t: hashed(f"other {t}") for t in texts.ALL}
    assert run(["diff", str(saved), url]) == 1
    said = capsys.readouterr()
    assert "may NOT share" in said.out
    assert "qwen3emb" not in said.out


def test_diff_with_a_side_that_is_down_exits_5(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which address did not answer is said."""
    assert run(["diff", url, "http://127.0.0.1:9/v1", "--json"]) == 5
    assert "127.0.0.1:9" in envelope(capsys)["error"]["message"]


# -- the report --------------------------------------------------------------------------------------------------


def test_the_report_fails_only_by_required_checks() -> None:
    """Warnings and skips pass; the Markdown page shows causes and keeps its table whole."""
    checks = (
        Check("a", "a|b", True, Verdict.PASS, "x", "y"),
        Check("c", "c", False, Verdict.WARN, "x", "y", "a cause"),
        Check("d", "d", True, Verdict.SKIP, "", "", "a reason"),
    )
    common: dict[str, Any] = {
        "endpoint": "e", "model": "m", "level": "quick", "fingerprint": {"id": "i", "parts": {"dims": None}},
        "width": 8, "precision": "p", "seconds": 1.0, "requests": 3, "tool": "t", "at": "now",
    }  # fmt: skip
    good = Report(checks=checks, **common)
    assert good.passed
    assert good.summary == "1 passed, 1 warning, 1 skipped in 1.0 s (3 requests)"
    page = markdown(good)
    assert "a\\|b" in page
    assert "| dims | unknown |" in page
    bad = Report(checks=(*checks, Check("e", "e", True, Verdict.FAIL, "x", "y")), **common)
    assert not bad.passed
    assert bad.to_dict()["passed"] is False
