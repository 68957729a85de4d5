"""Percentiles, ratios with intervals, trends and objectives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.statistics import Slo, parse_slo, percentile, ratio, trend


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 99, 5.0), ([1, 2, 3, 4, 5], 50, 3), ([5, 1], 50, 3), ([1, 2], 0, 1), ([1, 2], 100, 2)],
)
def test_percentile_is_linear_between_neighbours(values, percent, expected) -> None:
    """Order does not matter, ends are the extremes."""
    assert percentile(values, percent) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_stays_within_the_values(values, percent) -> None:
    """No percentile lies outside what was seen."""
    assert min(values) - 1e-6 <= percentile(values, percent) <= max(values) + 1e-6


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_ratio_interval_holds_the_truth_nineteen_times_in_twenty(rounds: int) -> None:
    """Over many experiments of a few noisy rounds the true ratio 1.2 lies inside about 95% of the intervals."""
    source = random.Random(7)
    inside = 0
    for number in range(120):
        drift = [1 + 0.3 * source.random() for _ in range(rounds)]
        a = [100 * d * source.gauss(1, 0.03) for d in drift]
        b = [120 * d * source.gauss(1, 0.03) for d in drift]
        found = ratio(a, b, seed=number)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 1.2 <= found.high
    assert 108 <= inside <= 120


def test_ratio_of_two_rounds_has_no_interval() -> None:
    """Two rounds are no basis for an interval, and decide nothing."""
    found = ratio([1.0, 1.0], [2.0, 2.0])
    assert (found.value, found.low, found.high, found.decided) == (pytest.approx(2.0), None, None, False)


def test_ratio_refuses_what_cannot_be_paired() -> None:
    """Unequal or non-positive rounds are errors, not figures."""
    with pytest.raises(ValueError, match="paired"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        ratio([1.0, 0.0], [1.0, 2.0])


def test_trend_sees_a_leak_and_ignores_noise() -> None:
    """A slow steady rise under noise is seen with its slope; noise alone, even with outliers, is no trend."""
    source = random.Random(3)
    x = [i / 10 for i in range(100)]
    leak = trend(x, [50 + 2 * v + source.gauss(0, 1) for v in x])
    flat = trend(x, [50 + source.gauss(0, 1) + (500 if i in (7, 60) else 0) for i, _ in enumerate(x)])
    assert leak is not None
    assert leak.rises
    assert leak.slope == pytest.approx(2, abs=0.2)
    assert flat is not None
    assert not flat.rises
    assert not flat.falls
    assert trend(x[:9], x[:9]) is None


def test_trend_of_days_of_windows_takes_a_second_at_most() -> None:
    """4,320 windows of a minute make nine million pairs; it thins them."""
    x = list(range(4320))
    found = trend(x, [float(-v) for v in x])
    assert found is not None
    assert found.falls
    assert found.slope == pytest.approx(-1)


@pytest.mark.parametrize(
    ("text", "limits", "errors"),
    [
        ("p95=100ms", {95: 0.1}, None),
        ("P50<=20ms, p99.9=1s", {50: 0.02, 99.9: 1.0}, None),
        ("p95=500us,errors=0.1%", {95: 0.0005}, 0.001),
    ],
)
def test_objectives_are_read_and_written_back(text, limits, errors) -> None:
    """The text form survives a round trip."""
    slo = parse_slo(text)
    assert slo.limits == pytest.approx(limits)
    assert slo.errors == errors
    assert parse_slo(str(slo)) == slo


@pytest.mark.parametrize("text", ["", "p95", "p95=100", "p0=1ms", "p100=1ms", "p95=0ms", "q95=1ms", "errors=200%"])
def test_a_bad_objective_is_named(text) -> None:
    """What cannot be read is an input error with an example."""
    with pytest.raises(InvalidInputError) as caught:
        parse_slo(text)
    assert caught.value.code == "bad_slo"
    assert "p95=100ms" in caught.value.hint


def test_misses_say_what_was_seen() -> None:
    """Each objective not met is a phrase with both numbers; an unknown percentile is a miss."""
    slo = Slo({50: 0.01, 95: 0.1}, 0.01)
    assert slo.misses({50: 0.005, 95: 0.05}, 0.0) == []
    assert slo.misses({50: 0.02}, 0.05) == ["p50 20 ms > 10 ms", "p95 unknown, limit 100 ms", "errors 5.000% > 1.000%"]
    assert slo.strictest == 0.1
