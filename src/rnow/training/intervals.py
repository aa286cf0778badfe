"""Pass@k, how sure a mean over prompts or over seeds is, and a difference of two means over the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

CONFIDENCE = 0.95
RESAMPLES, CHUNKS = 10_000, 100
ROUNDING = 1e-9
"""Values closer than this are equal: 2/3 - 1/2 and 1/2 - 1/3 are not the same number to a computer."""
HOW = "95% intervals: percentile bootstrap over prompts; differences are of the same prompts"
OVER_SEEDS = "95% intervals over seeds: Student's t; differences are of the same seeds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over prompts, and the interval around it: the prompts are taken for a sample of all that might have been asked."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, from c right ones among n: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_interval(values: Sequence[float], *, least: float = 0.0, most: float = 1.0) -> Interval:
    """The mean of one value per prompt with its percentile bootstrap interval (Efron 1979), always the same one.

    Where all values are equal, resampling shows no spread. The interval then is what the share of other values may be in
    general: at most 1 - 0.025^(1/n) (Clopper and Pearson 1934, for n equal ones), each anything in [``least``, ``most``].

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no prompt")
    mean, tail = fmean(values), (1 - CONFIDENCE) / 2
    if max(values) - min(values) < ROUNDING:
        others = 1 - tail ** (1 / len(values))
        return Interval(
            mean=mean, low=mean - others * (mean - least), high=mean + others * (most - mean)
        )
    low, high = np.quantile(_resampled(np.asarray(values)), [tail, 1 - tail])
    return Interval(mean=mean, low=float(low), high=float(high))


def _resampled(values: np.ndarray) -> np.ndarray:
    """Means of ``RESAMPLES`` draws of as many values, with replacement."""
    # RandomState: its numbers are promised to stay.
    draw, size = np.random.RandomState(0), (RESAMPLES // CHUNKS, len(values))
    chunks = [values[draw.randint(len(values), size=size)].mean(axis=1) for _ in range(CHUNKS)]
    return np.concatenate(chunks)


def difference_interval(before: Mapping[str, float], after: Mapping[str, float]) -> Interval:
    """How much larger the values of ``after`` are than those of ``before``, in [0, 1] each, prompt by prompt: what makes one
    prompt harder than another is in both, and cancels.

    Raises:
        ValueError: they are not of the same prompts.
    """
    if before.keys() != after.keys():
        raise ValueError("not the same prompts")
    return mean_interval([after[key] - before[key] for key in before], least=-1.0)


def seeds_interval(values: Sequence[float]) -> Interval:
    """The mean of one value per seed with Student's t interval: mean +- t s / sqrt(n). Of a few values the bootstrap would never leave
    their range, in which the truth lies in 75% of all triples, not in 95%.

    Raises:
        ValueError: fewer than two values say nothing of how much seeds differ.
    """
    if len(values) < 2:
        raise ValueError("one seed")
    mean = fmean(values)
    half = _t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def _t_quantile(freedom: int) -> float:
    """t such that ``CONFIDENCE`` of Student's distribution lies within [-t, t]."""
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _t_within(t: float, freedom: int) -> float:
    """How much of Student's distribution lies within [-t, t] (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
