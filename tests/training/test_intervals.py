"""Intervals over prompts: what they cover, and how much pairing wins."""

from __future__ import annotations

import math
import random
from statistics import NormalDist, fmean, stdev

import pytest

from rnow.training.intervals import difference_interval, mean_interval, seeds_interval


def test_it_is_about_that_of_the_normal_approximation() -> None:
    draw = random.Random(5)
    values = [draw.random() for _ in range(400)]
    found = mean_interval(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(fmean(values))
    assert found.low == pytest.approx(found.mean - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.1 * half)
    assert mean_interval(values) == found, "the same numbers each time"


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(1)
    covered = 0
    for _ in range(100):
        found = mean_interval([float(draw.random() < 0.4) for _ in range(60)])
        covered += found.low <= 0.4 <= found.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize("count", [1, 10, 100])
def test_equal_values_are_not_certain(count: int) -> None:
    """Twenty right answers of twenty say nothing about the twenty-first."""
    right, wrong = mean_interval([1.0] * count), mean_interval([0.0] * count)
    assert (right.mean, right.high) == (1.0, 1.0)
    assert (wrong.mean, wrong.low) == (0.0, 0.0)
    # Clopper-Pearson: the rate at which so many in a row are still seen once in forty times.
    assert right.low**count == pytest.approx(0.025)
    assert wrong.high == pytest.approx(1 - right.low)
    same = difference_interval(
        {str(i): 0.5 for i in range(count)}, {str(i): 0.5 for i in range(count)}
    )
    assert (same.low, same.high) == pytest.approx((right.low - 1, 1 - right.low))


def test_differences_that_are_equal_but_for_rounding_are_not_certain() -> None:
    """Each prompt has one more right answer of six."""
    before = {str(count): count / 6 for count in range(5)}
    after = {str(count): (count + 1) / 6 for count in range(5)}
    assert len({after[key] - before[key] for key in before}) > 1
    found = difference_interval(before, after)
    share = 1 - 0.025 ** (1 / 5)
    assert found.mean == pytest.approx(1 / 6)
    assert found.low == pytest.approx(1 / 6 - share * (1 / 6 + 1))
    assert found.high == pytest.approx(1 / 6 + share * (1 - 1 / 6))


def test_pairing_leaves_what_differs() -> None:
    draw = random.Random(2)
    before = {str(i): draw.random() * 0.9 for i in range(100)}
    after = {key: value + 0.05 + 0.01 * draw.random() for key, value in before.items()}
    paired = difference_interval(before, after)
    assert paired.mean == pytest.approx(fmean(after.values()) - fmean(before.values()))
    assert 0.05 < paired.low < paired.high < 0.06
    alone = mean_interval([*before.values()])
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)
    back = difference_interval(after, before)
    assert back.mean == pytest.approx(-paired.mean)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not the same prompts"):
        difference_interval({"a": 1.0}, {"b": 1.0})
    with pytest.raises(ValueError, match="no prompt"):
        mean_interval([])


@pytest.mark.parametrize(
    ("count", "quantile"),
    [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (11, 2.228), (31, 2.042)],
)
def test_few_seeds_are_wide(count: int, quantile: float) -> None:
    """Against the table of every textbook: mean +- t s / sqrt(n)."""
    draw = random.Random(count)
    values = [draw.gauss(3.0, 2.0) for _ in range(count)]
    found = seeds_interval(values)
    half = quantile * stdev(values) / math.sqrt(count)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (fmean(values), fmean(values) - half, fmean(values) + half), rel=1e-3
    )


def test_three_seeds_cover_as_often_as_they_say() -> None:
    draw = random.Random(3)
    found = [seeds_interval([draw.gauss(1.0, 0.1) for _ in range(3)]) for _ in range(2000)]
    covered = sum(one.low <= 1.0 <= one.high for one in found) / len(found)
    assert 0.935 < covered < 0.965


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(ValueError, match="one seed"):
        seeds_interval([1.0])
