"""Vector arithmetic: distances that keep their digits, slices, OpenAI's base64."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3emb_launch import vectors

numbers = st.floats(-1, 1, width=32, allow_subnormal=False)
some = st.lists(numbers, min_size=1, max_size=64).filter(lambda v: vectors.norm(v) > 1e-3)


@given(st.lists(numbers, max_size=64))
def test_base64_round_trip(values: list[float]) -> None:
    """What is encoded comes back bit by bit."""
    assert vectors.from_base64(vectors.to_base64(values)) == values


@pytest.mark.parametrize("text", ["AAA", "AAAAAAA=", "not base64!", "AAAAAAE="])
def test_broken_base64_is_a_value_error(text: str) -> None:
    """Wrong alphabet, padding or a length that is no whole number of float32."""
    with pytest.raises(ValueError, match=r"base64|float32"):
        vectors.from_base64(text)


@given(some, st.floats(0.01, 100))
def test_distance_ignores_length(values: list[float], factor: float) -> None:
    """Distance compares directions: 0 for a multiple, 2 for the opposite."""
    assert vectors.distance(values, [factor * x for x in values]) < 1e-12
    assert vectors.distance(values, [-x for x in values]) == pytest.approx(2)


def test_distance_keeps_small_differences() -> None:
    """1e-5 apart is 5e-11, far above the rounding of the sums."""
    assert vectors.distance([1.0, 0.0], [1.0, 1e-5]) == pytest.approx(5e-11, rel=1e-4)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([0.0], [1.0]), ([math.inf], [1.0])])
def test_what_cannot_be_compared_is_as_far_as_can_be(a: list[float], b: list[float]) -> None:
    """Other widths, NaN, infinities and zero vectors have no direction in common with anything."""
    assert vectors.distance(a, b) == 2.0


@given(some, st.data())
def test_a_slice_has_length_one(values: list[float], data: st.DataObject) -> None:
    """Cut and renormalised, unless nothing is left in the cut."""
    dims = data.draw(st.integers(1, len(values)))
    cut = vectors.sliced(values, dims)
    assert len(cut) == dims
    assert vectors.norm(cut) == pytest.approx(1) or not any(cut)


def test_largest_difference_of_unlike_vectors_is_infinite() -> None:
    """Other widths and NaN are no small difference."""
    assert vectors.largest_difference([1.0], [1.0, 2.0]) == math.inf
    assert vectors.largest_difference([math.nan], [1.0]) == math.inf
    assert vectors.largest_difference([1.0, 2.0], [1.5, 2.0]) == 0.5


def test_dot_of_unlike_vectors_is_an_error() -> None:
    """Silently dropping the rest of the longer one would be a wrong score."""
    with pytest.raises(ValueError, match="2 and 1 dims"):
        vectors.dot([1.0, 2.0], [1.0])
