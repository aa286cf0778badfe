"""Curves of a run of any length: thinned, without empty charts."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from rnow.report.curves import CHARTS, build_charts, other_metrics, read_curves


def rows(count: int, **values: Any) -> list[dict[str, Any]]:
    return [{"step": step, "x": float(step), **values} for step in range(1, count + 1)]


def test_a_short_run_is_kept_step_by_step() -> None:
    found = read_curves(rows(5))
    assert list(found.steps) == [1, 2, 3, 4, 5]
    assert found.width == 1
    assert list(found.values["x"]) == [1, 2, 3, 4, 5]
    assert found.sums["x"] == 15
    assert found.largest["x"] == 5
    assert found.last_step == 5


@pytest.mark.parametrize("count", [9, 64, 100, 1001])
def test_a_long_run_is_means_of_as_many_steps_and_bounded(count: int) -> None:
    found = read_curves(rows(count), most=8)
    assert 4 <= len(found.steps) <= 8
    assert found.steps[-1] == count
    edges = [0, *found.steps]
    for start, end, value in zip(edges[:-1], edges[1:], found.values["x"], strict=True):
        assert end - start <= found.width
        assert value == pytest.approx((start + 1 + end) / 2, rel=1e-4)
    assert [end - start for start, end in pairwise(edges[:-1])] == [found.width] * (
        len(found.steps) - 1
    )
    assert found.count == count
    assert found.sums["x"] == count * (count + 1) / 2


def test_what_is_no_number_is_a_gap_and_is_counted() -> None:
    given = [{"step": 1, "x": 1.0}, {"step": 2, "x": None}, {"step": 3}, {"step": 4, "x": 3.0}]
    found = read_curves(given)
    assert list(found.values["x"]) == [1.0, None, None, 3.0]
    assert found.missing == {"x": 1}
    assert found.ends("x") == (1.0, 3.0)
    assert found.ends("y") is None
    assert list(read_curves(given, most=2).values["x"]) == [1.0, 3.0]


def test_the_ends_are_means_of_a_tenth() -> None:
    assert read_curves(rows(40)).ends("x") == (2.5, 38.5)


def test_no_run_no_curves() -> None:
    found = read_curves([])
    assert found.last_step == 0
    assert build_charts(found) == []
    assert other_metrics(found, []) == {}


def test_charts_have_what_the_run_has() -> None:
    given = [
        {
            "step": step,
            "teacher_kl": 1.0 / step,
            "teacher_kl/math": 2.0 / step,
            "teacher_kl/code": 0.5 / step,
            "teacher_kl/k3": 1.0,
            "tools/failure_fraction": 0.0,
            "advantage/std": float(step),
            "lr": 0.1,
        }
        for step in (1, 2, 3)
    ]
    curves = read_curves(given)
    charts = build_charts(curves)
    assert [chart["title"] for chart in charts] == ["KL to the teacher"]
    labels = [series["label"] for series in charts[0]["series"]]  # pyright: ignore
    assert labels == ["teacher_kl", "teacher_kl/math", "teacher_kl/code"]
    # What never changes is no curve.
    assert list(other_metrics(curves, charts)) == ["advantage/std"]


def test_one_dataset_is_not_drawn_twice() -> None:
    given = [{"step": s, "teacher_kl": 1.0 / s, "teacher_kl/dataset_0": 1.0 / s} for s in (1, 2)]
    (chart,) = build_charts(read_curves(given))
    assert len(chart["series"]) == 1  # pyright: ignore


def test_no_metric_is_drawn_twice() -> None:
    there = [
        "teacher_kl", "teacher_kl/math", "teacher_kl/k3", "loss", "loss/math", "reward/mean", "reward/accuracy",
        "reward/failure_fraction", "reward/equal_groups_fraction", "reward_failures/accuracy", "tools/failure_fraction",
        "tools/calls_per_rollout", "tools/calls_per_rollout/math", "rollouts/turns", "rollouts/failed_fraction",
        "time/step", "time/rollout", "kl_clamp_fraction",
    ]  # fmt: skip
    drawn = [name for chart in CHARTS for name in chart.of(there)]
    assert sorted(drawn) == sorted(set(there) - {"teacher_kl/k3"})


def test_numbers_are_short() -> None:
    found = read_curves([{"step": 1, "x": math.pi * 1e-6}])
    assert found.values["x"][0] == 3.1416e-06
