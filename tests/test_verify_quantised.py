"""What the transformers comparison holds a quantised endpoint to, on vectors made to measure and on a recorded run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from small_endpoint import SmallEndpoint, serving

from qwen3emb_launch.vectors import distance
from qwen3emb_launch.verify import runner
from qwen3emb_launch.verify.reference import ReferenceSet, Transformers
from qwen3emb_launch.verify.report import Check, Report, Verdict
from qwen3emb_launch.verify.runner import Later, Request, verify
from qwen3emb_launch.verify.session import Options
from qwen3emb_launch.verify.texts import REFERENCE
from qwen3emb_launch.verify.tolerance import FP8_DISTANCE, Precision
from qwen3emb_launch.verify.yardstick import CAP, bounds, number_format, yardstick

BF16 = Precision("bfloat16", "as told", 36)
FP8 = replace(BF16, quantised="fp8")
OWN_ERROR = 0.00059  # of the recorded run's checkpoint in bfloat16

# One H100, 2026-11-22, the 4B's shape with random weights, SGLang 0.5.16 with --quantization fp8, transformers 5.12.1
# with torch 2.11.0+cu130, by benchmarks/verify_precision.py. A text a line, in the order of REFERENCE: 1 - cosine of
# transformers' own fp8 from its float32, of the endpoint from the former, of the endpoint from the latter.
RECORDED = (
    (0.05915, 0.02612, 0.06007),
    (0.05857, 0.03134, 0.05477),
    (0.06051, 0.02542, 0.06185),
    (0.06856, 0.03583, 0.06548),
    (0.04506, 0.02065, 0.04837),
    (0.04549, 0.02183, 0.04467),
    (0.03137, 0.01647, 0.03048),
    (0.04901, 0.01928, 0.04855),
    (0.06031, 0.02397, 0.05752),
    (0.03907, 0.01741, 0.04076),
    (0.04940, 0.01925, 0.04866),
    (0.04394, 0.02061, 0.04397),
    (0.03670, 0.01930, 0.03543),
    (0.03490, 0.01808, 0.03609),
    (0.03290, 0.01598, 0.03318),
    (0.04885, 0.02417, 0.04459),
    (0.03985, 0.02126, 0.04057),
    (0.03533, 0.01851, 0.03446),
    (0.03249, 0.01783, 0.03203),
    (0.05862, 0.02389, 0.05913),
    (0.06045, 0.02745, 0.05757),
    (0.05293, 0.01930, 0.05224),
)
COSTS = {text: row[0] for text, row in zip(REFERENCE, RECORDED, strict=True)}
Vector = tuple[float, ...]


def basis(seed: int, count: int = 6) -> Sequence[np.ndarray]:
    """So many directions at right angles, other ones for another seed."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((64, count)))[0].T


def as_set(dtype: str, vectors: Sequence[Vector]) -> ReferenceSet:
    return ReferenceSet("transformers 5, torch 2, cpu", dtype, dict(zip(REFERENCE, vectors, strict=True)))


def at(angles: Sequence[np.ndarray], emulated: float, exact: float, cost: float) -> Vector:
    """The unit vector that lies so far from both of transformers', `cost` apart from each other."""
    along = 1 - exact
    across = ((1 - emulated) - (1 - cost) * along) / math.sqrt(1 - (1 - cost) ** 2)
    rest = math.sqrt(max(0.0, 1 - along**2 - across**2))
    return tuple((along * angles[0] + across * angles[1] + rest * angles[2]).tolist())


class Run:
    """transformers' vectors and an endpoint's, as far apart as recorded, in directions of their own."""

    def __init__(self, rows: Sequence[tuple[float, float, float]] = RECORDED) -> None:
        turned = [basis(i) for i in range(len(rows))]
        self.sets = {
            "float32": as_set("float32", [tuple(b[0].tolist()) for b in turned]),
            "bfloat16": as_set("bfloat16", [at(b, 0.0, OWN_ERROR, OWN_ERROR) for b in turned]),
            "fp8": as_set("fp8", [at(b, 0.0, c, c) for b, (c, _, _) in zip(turned, rows, strict=True)]),
        }
        self.seen = {t: at(b, near, far, cost) for t, b, (cost, near, far) in zip(REFERENCE, turned, rows, strict=True)}
        self.aside = {t: b[3] for t, b in zip(REFERENCE, turned, strict=True)}

    def fault(self, text: str, size: float) -> None:
        """Turn a text's vector away by 1 - cosine `size`, in a direction that it has nothing of."""
        turned = (1 - size) * np.array(self.seen[text]) + math.sqrt(1 - (1 - size) ** 2) * self.aside[text]
        self.seen[text] = tuple(turned.tolist())


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Run], Check]:
    """The transformers check of an endpoint that answers the run's vectors."""

    def ask(run: Run) -> Check:
        def script(*_: object, **more: object) -> Transformers:
            return Transformers({} if more["alternatives"] else run.sets, {}, {}, True, {})

        monkeypatch.setattr(runner, "transformers_reference", script)
        endpoint = SmallEndpoint()
        endpoint.vectors = {t: list(v) for t, v in run.seen.items()}
        known = {"quantization": "fp8", "dtype": "bfloat16", "dtype_origin": "as told", "layers": 36}
        with serving(endpoint) as url:
            report, _ = verify(
                Request(
                    url, Options("full"), tmp_path / "w.json", known=known, python=Path("python"), folder=tmp_path,
                    only=frozenset({"transformers"}),
                )
            )  # fmt: skip
        return report.checks[-1]

    return ask


def test_the_recorded_run_is_right_and_warned_of(judged: Callable[[Run], Check]) -> None:
    """The H100's fp8 engine agrees with transformers' fp8; what fp8 costs that checkpoint is said, with the way on."""
    check = judged(Run())
    assert check.verdict is Verdict.WARN
    assert "computed right" in check.cause
    assert "truncated" not in check.cause
    assert "0.069 at most, 0.047 on average" in check.cause
    assert "qwen3emb diff" in check.cause
    assert "serve bfloat16" in check.cause
    assert "to float32 0.9345 and 0.9532, as transformers' own fp8 0.9314 and 0.9526" in check.seen
    assert check.expected.startswith("1 - cosine ≤ 5.0e-02 to 7.1e-02, by text, to transformers 5")
    assert check.expected.endswith("(fp8)")
    figures = check.figures
    assert figures["judged_by"] == "fp8"
    assert figures["min_cosine_to_fp8"] == pytest.approx(0.96417, abs=1e-5)
    assert figures["mean_cosine_to_fp8"] == pytest.approx(0.97800, abs=1e-5)
    assert figures["min_cosine"] == pytest.approx(0.93452, abs=1e-5)
    assert figures["mean_cosine"] == pytest.approx(0.95317, abs=1e-5)
    assert figures["fp8_reference_min_cosine"] == pytest.approx(0.93144, abs=1e-5)
    assert figures["fp8_reference_mean_cosine"] == pytest.approx(0.95257, abs=1e-5)
    assert figures["allowed"] == pytest.approx(0.06856 + BF16.distance)


def test_right_engines_stay_well_under_their_bounds() -> None:
    """Recorded on the H100: half of the bound at most, and half of what fp8 costs the text."""
    allowed = bounds(number_format(BF16, OWN_ERROR), COSTS)
    near = {text: row[1] for text, row in zip(REFERENCE, RECORDED, strict=True)}
    assert max(near[t] / allowed[t] for t in REFERENCE) == pytest.approx(0.51, abs=0.005)
    assert max(near[t] / COSTS[t] for t in REFERENCE) == pytest.approx(0.55, abs=0.005)
    assert min(near[t] / COSTS[t] for t in REFERENCE) == pytest.approx(0.36, abs=0.005)
    assert (min(allowed.values()), max(allowed.values())) == pytest.approx((0.0504, 0.0715), abs=5e-5)


@pytest.mark.parametrize("text", range(len(REFERENCE)))
def test_the_smallest_known_fault_in_one_text_is_seen(judged: Callable[[Run], Check], text: int) -> None:
    """1 - cosine of 0.05 beside the rounding of a checkpoint that fp8 costs as much fails, whichever text it hits."""
    run = Run()
    run.fault(REFERENCE[text], 0.05)
    check = judged(run)
    assert check.verdict is Verdict.FAIL
    assert check.seen.startswith("1 of 22 texts differ")
    assert check.figures["judged_by"] == "fp8"


@pytest.mark.parametrize("size", [0.05, 0.2, 1.0])
def test_a_fault_of_all_texts_is_seen_whatever_its_size(judged: Callable[[Run], Check], size: float) -> None:
    """Wrong pooling and a lost EOS move every text, by 0.05 to 1."""
    run = Run()
    for text in REFERENCE:
        run.fault(text, size)
    check = judged(run)
    assert check.verdict is Verdict.FAIL
    assert check.seen.startswith("22 of 22 texts differ")


def test_a_coarser_quantisation_is_called_that(judged: Callable[[Run], Check]) -> None:
    """Twice the distance between two implementations, in all texts alike: one scale a tensor does that."""
    check = judged(Run([(0.06, 0.09, 0.1)] * len(REFERENCE)))
    assert check.verdict is Verdict.FAIL
    assert "coarser number format" in check.cause


def test_weights_that_are_not_quantised_after_all_lose_nothing(judged: Callable[[Run], Check]) -> None:
    """An endpoint that says fp8 and answers what bfloat16 does is right, and nothing is warned of."""
    check = judged(Run([(cost, cost, 4e-4) for cost, _, _ in RECORDED]))
    assert check.verdict is Verdict.PASS
    assert check.figures["judged_by"] == "float32"
    assert check.figures["allowed"] == BF16.distance


def test_what_fp8_ruins_is_not_judged_unless_it_is_wrong(judged: Callable[[Run], Check]) -> None:
    """Where fp8 costs 0.1 on average a fault could hide, so agreement proves nothing; a large fault still fails."""
    ruined = [(0.12, 0.06, 0.13)] * len(REFERENCE)
    check = judged(Run(ruined))
    assert check.verdict is Verdict.SKIP
    assert "nothing is proven" in check.cause
    assert check.figures["fp8_reference_mean_cosine"] == pytest.approx(0.88)
    run = Run(ruined)
    run.fault(REFERENCE[3], 0.3)
    assert judged(run).verdict is Verdict.FAIL


def test_float8_is_judged_by_what_it_costs_as_long_as_faults_show_beside_it() -> None:
    """Twice the emulated error beside the number format's own from float32, up to the cap; above it, the emulation."""
    for cost, badly in ((2e-3, False), (0.0234, False), (0.0236, True), (0.07, True)):
        run = Run([(cost, cost / 2, cost)] * len(REFERENCE))
        stick = yardstick(FP8, run.sets, REFERENCE)
        assert stick is not None
        assert stick.quantises_badly is badly
        assert stick.reference is run.sets["fp8" if badly else "float32"]
        assert list(stick.allowed.values()) == pytest.approx(
            [BF16.distance + (1 if badly else 2) * cost] * len(REFERENCE)
        )
        assert badly or max(stick.allowed.values()) <= CAP


def test_a_text_that_loses_little_by_luck_is_allowed_what_others_lose() -> None:
    """What quantising costs the text, and never less than it costs on average."""
    allowed = bounds(1e-3, {"lucky": 0.01, "usual": 0.03, "hard": 0.05})
    assert allowed == pytest.approx({"lucky": 0.031, "usual": 0.031, "hard": 0.051})


def test_other_quantisations_stay_estimated_and_unquantised_ones_apart() -> None:
    """What is not emulated is allowed the estimate; an emulation is no excuse where nothing is quantised."""
    sets = Run().sets
    without = {name: found for name, found in sets.items() if name != "fp8"}
    for precision, given, allowed in (
        (replace(BF16, quantised="awq"), without, FP8_DISTANCE),
        (BF16, sets, BF16.distance),
    ):
        stick = yardstick(precision, given, REFERENCE)
        assert stick is not None
        assert not stick.quantises_badly
        assert set(stick.allowed.values()) == {allowed}


def test_bfloat16_takes_the_place_of_float32_where_memory_is_short() -> None:
    """With twice the number format's distance; without either there is nothing to hold an endpoint to."""
    sets = {name: found for name, found in Run().sets.items() if name != "float32"}
    stick = yardstick(BF16, sets, REFERENCE)
    assert stick is not None
    assert stick.exact is sets["bfloat16"]
    assert set(stick.allowed.values()) == {2 * BF16.distance}
    badly = yardstick(FP8, sets, REFERENCE)
    assert badly is not None
    assert badly.quantises_badly
    assert yardstick(FP8, {"fp8": sets["fp8"]}, REFERENCE) is None


def test_the_run_is_as_far_apart_as_recorded() -> None:
    """The vectors made to measure have the recorded distances."""
    run = Run()
    for text, (cost, near, far) in zip(REFERENCE, RECORDED, strict=True):
        assert distance(run.sets["fp8"].vectors[text], run.sets["float32"].vectors[text]) == pytest.approx(cost)
        assert distance(run.seen[text], run.sets["fp8"].vectors[text]) == pytest.approx(near)
        assert distance(run.seen[text], run.sets["float32"].vectors[text]) == pytest.approx(far)


def test_a_reference_that_is_known_already_is_not_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who has it gives it; the checkpoint's own script is not run."""
    run = Run()
    monkeypatch.setattr(runner, "transformers_reference", None)
    endpoint = SmallEndpoint()
    endpoint.vectors = {t: list(v) for t, v in run.sets["bfloat16"].vectors.items()}
    given = Transformers(run.sets, {}, {}, True, {})
    with serving(endpoint) as url:
        report, _ = verify(
            Request(
                url, Options("full"), tmp_path / "w.json", python=Path("python"), folder=tmp_path, computed=given,
                known={"layers": 36}, only=frozenset({"transformers"}),
            )
        )  # fmt: skip
    assert report.checks[-1].verdict is Verdict.PASS
    assert report.checks[-1].figures["judged_by"] == "float32"


def test_the_checkpoint_is_hashed_beside_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The full level reads every byte while the reference script runs, not after it, and not before the probes."""
    hashing = Event()
    early: list[str] = []

    def sha256(*_: object, **more: object) -> str:
        hashing.set()
        return "0" * 64

    def script(*_: object, **more: object) -> Transformers:
        assert hashing.wait(20), "hashed after the reference only"
        return Transformers({}, {}, {"float32": "no memory"}, True, {})

    monkeypatch.setattr(runner, "weights_sha256", sha256)
    monkeypatch.setattr(runner, "transformers_reference", script)
    with serving(SmallEndpoint()) as url:
        request = Request(url, Options("full"), tmp_path / "w.json", python=Path("python"), folder=tmp_path)
        report, _ = verify(request, lambda title: early.append(title) if not hashing.is_set() else None)
    assert early[-1] == "transformers' vectors"
    assert len(early) > 20
    assert report.fingerprint["parts"]["weights_sha256"] == "0" * 64


def test_checks_tell_what_they_took(tmp_path: Path) -> None:
    """Requests add up to the report's, and no check takes longer than all of it."""
    with serving(SmallEndpoint()) as url:
        report: Report = verify(Request(url, Options(), tmp_path / "w.json"))[0]
    assert sum(c.requests for c in report.checks) == report.requests
    assert 0 < sum(c.seconds for c in report.checks) <= report.seconds


def test_a_later_value_is_computed_once_and_its_error_is_raised_where_it_is_asked() -> None:
    """Begun or not, it is there when asked for; what failed in its thread fails where it is wanted."""
    calls: list[int] = []
    later = Later(lambda: str(calls.append(1)))
    assert not calls
    later.begin()
    assert later.value() == later.value() == "None"
    assert calls == [1]

    def fail() -> str:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        Later(fail).value()
