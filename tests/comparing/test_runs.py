"""Courses and differing settings of several runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tests.comparing.folders import make_run

from rnow.comparing.runs import (
    Course,
    better_end,
    chosen_metrics,
    course,
    differing_contents,
    differing_settings,
    read_run,
    read_runs,
    thinned,
)


def test_a_course_begins_and_ends_as_in_the_summary(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "one", steps=20, metrics={"reward/mean": float}))
    found = course(run.rows, "teacher_kl")
    assert found is not None
    assert found.first == pytest.approx((1 + 1 / 2) / 2)
    assert found.last == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert found.best == (20, 1 / 20)
    reward = course(run.rows, "reward/mean")
    assert reward is not None
    assert reward.best == (20, 20.0)
    assert course(run.rows, "loss") is None


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    gaps = {"entropy": lambda step: math.nan if step % 2 else step}
    run = read_run(make_run(tmp_path / "one", steps=4, metrics=gaps))
    found = course(run.rows, "entropy")
    assert found is not None
    assert (list(found.steps), list(found.values), found.best) == ([2, 4], [2, 4], None)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("teacher_kl/math", "low"),
        ("loss", "low"),
        ("reward/mean", "high"),
        ("reward/failure_fraction", "low"),
        ("reward_failures/short", "low"),
        ("rollouts/failed_fraction", "low"),
        ("throughput/completion_tokens_per_s", "high"),
        ("time/step", "low"),
        ("entropy", None),
        ("lr", None),
    ],
)
def test_which_end_is_better(name: str, end: str | None) -> None:
    assert better_end(name) == end


def test_the_metrics_of_any_run_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    runs = read_runs(
        [
            make_run(tmp_path / "one", metrics={"reward/mean": float, "lr": float}),
            make_run(
                tmp_path / "other", metrics={"teacher_kl/math": float, "gone": lambda _: math.nan}
            ),
        ]
    )
    assert chosen_metrics(runs) == ["teacher_kl", "teacher_kl/math", "reward/mean"]
    assert chosen_metrics(runs, ["lr", "teacher_kl*"]) == ["lr", "teacher_kl", "teacher_kl/math"]
    assert chosen_metrics(runs, ["gone"]) == []


def test_settings_that_differ(tmp_path: Path) -> None:
    one = {
        "model": {"path": "a", "name": "x"},
        "trainer": {"learning_rate": 1e-4, "max_steps": None},
    }
    other = {
        "model": {"path": "a", "name": "y"},
        "trainer": {"learning_rate": 1e-3, "max_steps": 9},
    }
    runs = read_runs(
        [
            make_run(tmp_path / "one", config=one, facts={"dataset_hash": "1", "tools_hash": None}),
            make_run(tmp_path / "other", config=other, facts={"dataset_hash": "2"}),
        ]
    )
    assert differing_settings(runs) == {
        "trainer.learning_rate": [1e-4, 1e-3],
        "trainer.max_steps": [None, 9],
    }
    assert differing_contents(runs) == ["the training data"]


def test_two_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / project / "runs" / "one") for project in ("a", "b")]
    assert [run.label for run in read_runs(folders)] == [str(one.path) for one in folders]


def test_a_course_is_drawn_over_the_steps_of_the_longest_run() -> None:
    found = Course(steps=(1, 2, 3, 4), values=(4.0, 2.0, 1.0, 3.0), first=4, last=3, best=None)
    assert thinned(found, end=4, count=4) == [4.0, 2.0, 1.0, 3.0]
    assert thinned(found, end=4, count=2) == [3.0, 2.0]
    drawn = thinned(found, end=8, count=4)
    assert drawn[:2] == [3.0, 2.0]
    assert all(map(math.isnan, drawn[2:]))


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", steps=3)
    run.facts.write_text('{"config": ')
    run.metrics.write_text('{"step": 1, "teacher_kl": 0.5}\n{"step": 2, "teach')
    found = read_run(run)
    assert (found.steps, found.settings, found.measured) == (1, {}, {})
