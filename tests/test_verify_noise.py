"""Float8 noise: what `verify` lets pass of a checkpoint that amplifies it, and what not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import moved
from small_endpoint import SmallEndpoint, hashed, serving

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.verify import noise
from qwen3emb_launch.verify.noise import FP8_NOISE, Again, explains
from qwen3emb_launch.verify.reference import DEMO_SET, load
from qwen3emb_launch.verify.report import Report, Verdict
from qwen3emb_launch.verify.runner import Request, verify
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.texts import BASE
from qwen3emb_launch.verify.tolerance import FP8_DISTANCE, Precision

FP8 = Precision("bfloat16", "as told", 36, "fp8")
SEEN = 0.037  # one H200, 2026-11-30, the 8B's shape with random weights
SHARING = {"batch", "base64", "steady", "openai", "large_batch", "cross_talk", "healthy", "long_batch"}


class Noisy(SmallEndpoint):
    """Alone a text has its vector twice, then and in a batch one that lies `far` away, as float8 may have it."""

    def __init__(self, far: float) -> None:
        super().__init__()
        self.far = far
        self.asked: Counter[str] = Counter()

    def embed(self, body: Any) -> tuple[int, Any]:
        status, answer = super().embed(body)
        if status != 200:
            return status, answer
        given = body["input"]
        several = isinstance(given, list) and len(given) > 1
        self.asked[str(given)] += 1
        if several or (self.asked[str(given)] > 2 and not body.get("dimensions")):
            for item in answer["data"]:
                item["embedding"] = moved(item["embedding"], self.far)
        return status, answer


def asked(endpoint: SmallEndpoint, folder: Path, *only: str, **known: Any) -> Report:
    known = {"quantization": "fp8", "dtype": "bfloat16", "layers": 36, **known}
    level = "full" if not only else "quick"
    options = Options(level, openai_client=True, max_latency=1e6)
    with serving(endpoint) as url:
        return verify(Request(url, options, folder / "w.json", known=known, only=frozenset(only)))[0]


def verdicts(report: Report) -> dict[str, Verdict]:
    return {c.id: c.verdict for c in report.checks if c.id in SHARING}


@pytest.mark.parametrize(
    ("precision", "known", "apart", "noisy"),
    [
        (FP8, False, [Again(0.037, 0.9), Again(0.021, 0.5)], True),
        (FP8, False, [Again(FP8_NOISE, 0.9)], True),
        (FP8, False, [Again(FP8_NOISE + 1e-6, 0.9)], False),
        (FP8, False, [Again(0.021, 0.9), Again(0.2, 0.9)], False),  # one of them is something else
        (FP8, False, [Again(0.03, 0.001)], False),  # another text's vector, of a text that lies near
        (FP8, True, [Again(0.021, 0.9)], False),
        (replace(FP8, quantised=None), False, [Again(0.021, 0.9)], False),
        (replace(FP8, quantised="awq"), False, [Again(0.021, 0.9)], False),
        (FP8, False, [Again(math.nan, 0.9)], False),
    ],
)  # fmt: skip
def test_what_noise_explains(precision: Precision, known: bool, apart: list[Again], noisy: bool) -> None:
    """Of fp8 and an unknown checkpoint alone, to four times the limit, and nothing that is nearer to another text."""
    assert explains(precision, known, apart) is noisy


def test_the_bound_stands_between_what_was_seen_and_what_faults_do() -> None:
    """Twice the largest noise seen, under the 0.1 from which on transformers' own fp8 proves nothing."""
    assert 2 * SEEN < FP8_NOISE < 0.1
    assert FP8_DISTANCE < SEEN


def test_a_checkpoint_that_amplifies_passes_with_warnings(tmp_path: Path) -> None:
    """All checks that hold a text to its own vector agree, and each says what it is and what to do."""
    endpoint = Noisy(SEEN)
    report = asked(endpoint, tmp_path)
    assert report.passed, [(c.title, c.seen, c.cause) for c in report.failures]
    found = verdicts(report)
    assert {name for name, verdict in found.items() if verdict is Verdict.WARN} >= {"batch", "steady", "healthy"}
    assert found["large_batch"] is found["long_batch"] is found["openai"] is Verdict.WARN
    for check in report.checks:
        if noise.FIGURE in check.figures:
            assert check.figures[noise.FIGURE] == pytest.approx(SEEN)
            assert "one text alone and in a batch gets vectors 1 - cosine 0.037 apart" in check.cause
            assert "serve bfloat16, or accept it; `verify --level full`" in check.cause
    assert len(noise.warnings(report.checks)) == 1


@pytest.mark.parametrize("far", [0.2, 1.0])
def test_more_than_noise_fails_as_before(tmp_path: Path, far: float) -> None:
    """A vector that far is another one, whatever rounds it."""
    report = asked(Noisy(far), tmp_path, "batch", "steady", "openai")
    assert verdicts(report) == dict.fromkeys(("batch", "steady", "openai"), Verdict.FAIL)
    assert noise.warnings(report.checks) == []


def test_official_checkpoints_and_bfloat16_keep_their_limit(tmp_path: Path) -> None:
    """Trained weights are steady: there 0.037 is a fault, in float8 as in bfloat16."""
    official = Noisy(SEEN)
    official.model["id"], official.width = CATALOG["0.6b"].hub_id, CATALOG["0.6b"].shape.hidden_size
    for endpoint, more in (
        (official, {}),
        (Noisy(SEEN), {"quantization": None}),
        (Noisy(SEEN), {"quantization": "awq"}),
    ):
        report = asked(endpoint, tmp_path, "batch", "steady", "openai", **more)
        assert verdicts(report) == dict.fromkeys(("batch", "steady", "openai"), Verdict.FAIL)


def test_the_demo_keeps_its_limit_where_its_vectors_tell_it(tmp_path: Path) -> None:
    """Two layers amplify nothing."""
    demo = load(DEMO_SET)
    endpoint = Noisy(SEEN)
    endpoint.width = demo.width
    endpoint.vectors = {text: list(demo.vectors[text]) for text in BASE}
    assert verdicts(asked(endpoint, tmp_path, "batch")) == {"batch": Verdict.FAIL}


def test_a_vector_cut_to_fewer_dims_is_no_noise(tmp_path: Path) -> None:
    """Right in all it has, and too short: where nobody asked for fewer dims that is another fault."""

    class Cutting(Noisy):
        def embed(self, body: Any) -> tuple[int, Any]:
            status, answer = super().embed(body)
            if self.asked[str(body["input"])] > 2:
                for item in answer["data"]:
                    item["embedding"] = item["embedding"][:32]
            return status, answer

    found = verdicts(asked(Cutting(0.0), tmp_path, "batch", "steady"))
    assert found == {"batch": Verdict.PASS, "steady": Verdict.FAIL}


def test_swapped_texts_are_a_fault_however_near_they_lie(tmp_path: Path) -> None:
    """Two texts 0.03 apart change places in a batch: within the bound, and each the other's."""

    class Swapping(SmallEndpoint):
        def embed(self, body: Any) -> tuple[int, Any]:
            status, answer = super().embed(body)
            if status == 200 and len(answer["data"]) > 4:
                first, second = answer["data"][0], answer["data"][2]
                first["embedding"], second["embedding"] = second["embedding"], first["embedding"]
            return status, answer

    endpoint = Swapping()
    endpoint.vectors = {BASE[2]: moved(hashed(BASE[0]), 0.03)}
    report = asked(endpoint, tmp_path, "batch")
    assert verdicts(report) == {"batch": Verdict.FAIL}
    assert "the batch's order is swapped" in report.failures[0].cause
