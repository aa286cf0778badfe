"""Evaluations side by side, with intervals from the answers that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import held_out_row, make_run, write_lines

from rnow.disk.folder import RunFolder
from rnow.report.evaluation import evaluation_charts, evaluation_table, held_out_answers
from rnow.training.intervals import difference_interval, mean_interval


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "run")


def row_of(table: Any, metric: str) -> Any:
    return next(row for row in table["rows"] if row["metric"] == metric)


def test_intervals_are_those_of_rnow_eval(run: RunFolder) -> None:
    table = evaluation_table(run, 1.0)
    assert table is not None
    assert [column["name"] for column in table["columns"]] == ["before", "after"]  # pyright: ignore
    found = row_of(table, "pass@1")
    before, after = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    for cell, values in zip(found["cells"], (before, after), strict=True):
        expected = mean_interval(values)
        assert cell["mean"] == expected.mean
        assert cell["low"] == pytest.approx(expected.low, rel=1e-4)
        assert cell["high"] == pytest.approx(expected.high, rel=1e-4)
    difference = difference_interval(dict(enumerate(before)), dict(enumerate(after)))  # pyright: ignore
    assert found["difference"]["mean"] == 0.5
    assert found["difference"]["low"] == pytest.approx(difference.low, rel=1e-4)
    assert table["prompts"] == 4
    assert [row["metric"] for row in table["rows"]] == ["pass@1", "reward/mean"]  # pyright: ignore
    assert row_of(table, "reward/mean")["cells"][1] == {"mean": 0.75}


def test_answers_that_do_not_bear_the_number_out_give_no_interval(run: RunFolder) -> None:
    rows = [held_out_row("after", 4, at, reward=True) for at in range(4)]
    write_lines(run.answers / "after.jsonl", rows)
    found = row_of(evaluation_table(run, 1.0), "pass@1")
    assert found["cells"][1] == {"mean": 0.75}
    assert found["difference"] is None
    assert "low" in found["cells"][0]


def test_an_answer_whose_only_reward_failed_did_not_pass(run: RunFolder) -> None:
    lost: Any = {"rewards": {"accuracy": 0.0}, "reward_errors": {"accuracy": "KeyError"}}
    rows = [held_out_row("after", 4, at, reward=at < 3) for at in range(3)]
    write_lines(
        run.answers / "after.jsonl", [*rows, held_out_row("after", 4, 3, reward=False, **lost)]
    )
    found = row_of(evaluation_table(run, 0.0), "pass@1")
    assert found["cells"][1]["mean"] == 0.75
    assert "low" in found["cells"][1]


@pytest.mark.parametrize("text", ["", "{", '{"step": 4}\n', "[]\n"])
def test_answers_that_are_lost_or_cut_give_no_interval(run: RunFolder, text: str) -> None:
    (run.answers / "after.jsonl").write_text(text)
    found = row_of(evaluation_table(run, 1.0), "pass@1")
    assert found["cells"][1] == {"mean": 0.75}


def test_other_settings_are_marked(run: RunFolder) -> None:
    rows = [
        {"name": "before", "step": 0, "pass@1": 0.25, "settings": "old"},
        {"name": "after", "step": 4, "pass@1": 0.75, "settings": "new"},
    ]
    write_lines(run.evaluations, rows)
    table: Any = evaluation_table(run, 1.0)
    assert [column["other"] for column in table["columns"]] == [True, False]


def test_no_evaluation_no_table(tmp_path: Path) -> None:
    assert evaluation_table(RunFolder(tmp_path), 1.0) is None
    assert evaluation_charts(RunFolder(tmp_path)) == []
    assert held_out_answers(RunFolder(tmp_path)) == []


def test_rows_of_a_run_that_learns_from_rows(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [
        {"name": "before", "step": 0, "loss": 2.5, "tokens/total": 10.0},
        {"name": "after", "step": 9, "loss": 0.5, "tokens/total": 10.0},
    ]
    write_lines(folder.evaluations, rows)
    table: Any = evaluation_table(folder, 1.0)
    assert table["rows"] == [
        {"metric": "loss", "cells": [{"mean": 2.5}, {"mean": 0.5}], "difference": None}
    ]
    assert table["prompts"] == 0


def test_what_was_evaluated_again_and_again_is_a_curve(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    rows = [{"name": "every", "step": step, "pass@1": step / 10, "x": 1.0} for step in (2, 4, 6)]
    write_lines(folder.evaluations, rows)
    assert evaluation_charts(folder) == [
        {
            "title": "Evaluation every: pass",
            "unit": "share",
            "about": "",
            "x": [2, 4, 6],
            "series": [{"label": "pass@1", "values": [0.2, 0.4, 0.6]}],
        }
    ]


def test_held_out_answers_that_changed_come_first(run: RunFolder) -> None:
    rows = [held_out_row("after", 4, at, reward=at == 0) for at in range(4)]
    rows[0]["answer"] = [{"role": "assistant", "content": "before 1"}]
    write_lines(run.answers / "after.jsonl", rows)
    found: Any = held_out_answers(run)
    assert [entry["id"] for entry in found] == ["held/1", "held/2", "held/3", "held/0"]
    assert found[0]["answers"] == {
        "before": {"text": "before 0", "reward": 0.0},
        "after": {"text": "after 0", "reward": 0.0},
    }
    assert found[0]["messages"] == [["user", "held out 1"]]


def test_held_out_answers_are_bounded_and_harmless(run: RunFolder) -> None:
    rows = [
        held_out_row(
            "after", 4, at, reward=True, answer=[{"role": "assistant", "content": "\x1b\u202e" * 9000}]
        )
        for at in range(100)
    ]  # fmt: skip
    write_lines(run.answers / "after.jsonl", rows)
    found: Any = held_out_answers(run)
    assert 1 < len(found) <= 40
    text = found[0]["answers"]["after"]["text"]
    assert "\x1b" not in text
    assert "\u202e" not in text
