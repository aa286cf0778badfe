"""Where student and teacher disagree, summed over steps: by token and by place, against plain loops."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import rollout_row, write_transcript

from rnow.disk.transcript_rows import read_columns, steps_of
from rnow.report import statistics
from rnow.report.statistics import Disagreement, StepTokens, spread

COLUMNS = ("token_ids", "tokens", "kl", "entropy")


def tokens_of(folder: Path, step: int, rows: list[dict[str, Any]]) -> StepTokens:
    write_transcript(folder, step, rows)
    return StepTokens.of(read_columns(steps_of(folder)[step], COLUMNS))


def gather(folder: Path, *steps: list[dict[str, Any]]) -> Disagreement:
    found = Disagreement()
    for number, rows in enumerate(steps, 1):
        found.add(tokens_of(folder, number, rows), late=number > len(steps) / 2)
    return found


def test_tokens_keep_their_place_and_what_is_unknown_stays_so(tmp_path: Path) -> None:
    rows = [
        rollout_row(1, 0, tokens="ab", kl=[0.5, 2.0]),
        rollout_row(1, 1, tokens="c", kl=None, entropy=None),
        rollout_row(1, 2, tokens=""),
        rollout_row(1, 3, tokens="dea", kl=[1.0, math.nan, math.inf]),
    ]
    found = tokens_of(tmp_path, 1, rows)
    assert found.lengths.tolist() == [2, 1, 0, 3]
    assert found.places.tolist() == [0, 1, 0, 0, 1, 2]
    assert found.kl.tolist()[:2] == [0.5, 2.0]
    assert math.isnan(found.kl[2])
    assert found.worst() == [2.0, None, None, 1.0]
    assert math.isnan(found.entropy[2])
    assert found.entropy[3] == 0.75


def test_tokens_by_their_mean_kl(tmp_path: Path) -> None:
    early = [rollout_row(1, at, tokens="ab", kl=[4.0, 0.25]) for at in range(10)]
    late = [rollout_row(2, at, tokens="ab", kl=[1.0, 0.25]) for at in range(10)]
    rare = rollout_row(2, 11, tokens="z", kl=[9.0])
    better = rollout_row(2, 12, tokens="yyyyyy", kl=[-0.5] * 6)
    a, b = gather(tmp_path, early, [*late, rare, better]).tokens()
    assert (a["text"], a["count"], a["mean"], a["early"], a["late"]) == ("a", 20, 2.5, 4.0, 1.0)
    assert (b["text"], b["mean"]) == ("b", 0.25)
    # Of all KL above 0: 50 + 5 + 9 (z is rare, and is not listed; y is likelier for the teacher).
    assert a["share"] == pytest.approx(50 / 64, rel=1e-4)


def test_in_a_short_run_rare_tokens_are_listed(tmp_path: Path) -> None:
    found = gather(tmp_path, [rollout_row(1, 0, tokens="ab", kl=[4.0, 0.25])]).tokens()
    assert [row["text"] for row in found] == ["a", "b"]
    assert found[0]["late"] == 4.0
    assert found[0]["early"] is None


def test_kl_and_entropy_by_place(tmp_path: Path) -> None:
    early = [rollout_row(1, 0, tokens="abc", kl=[1.0, 2.0, 3.0])]
    late = [
        rollout_row(2, 0, tokens="ab", kl=[0.5, 0.0]),
        rollout_row(2, 1, tokens="a", kl=[1.5], entropy=[0.25]),
    ]
    kl, entropy = gather(tmp_path, early, late).charts()
    assert kl["x"] == [1, 2, 3]
    assert kl["series"] == [
        {"label": "first half of the steps", "values": [1.0, 2.0, 3.0]},
        {"label": "second half", "values": [1.0, 0.0, None]},
    ]
    assert entropy["series"][1]["values"] == [0.5, 0.75, None]  # pyright: ignore


def test_what_few_answers_reach_is_left_out(tmp_path: Path) -> None:
    rows = [rollout_row(1, at, tokens="ab", kl=[1.0, 2.0]) for at in range(5)]
    chart = gather(tmp_path, [*rows, rollout_row(1, 5, tokens="abc", kl=[1.0, 2.0, 90.0])]).charts()
    assert chart[0]["series"] == [{"label": "second half", "values": [1.0, 2.0, None]}]


def test_long_answers_are_cut_into_stretches(tmp_path: Path) -> None:
    row = rollout_row(1, 0, tokens="a" * 1000, kl=[float(at) for at in range(1000)])
    chart = gather(tmp_path, [row]).charts()[0]
    xs: Any = chart["x"]
    (series,) = chart["series"]  # pyright: ignore
    assert len(xs) == statistics.PLACES == len(series["values"])
    # The KL of a token is its place.
    assert series["values"] == pytest.approx([x - 1 for x in xs], rel=1e-4)


def test_a_run_without_a_teacher_has_no_such_chart(tmp_path: Path) -> None:
    found = gather(tmp_path, [rollout_row(1, 0, kl=None, entropy=None)])
    assert found.tokens() == []
    assert found.charts() == []


def test_text_of_tokens_is_harmless(tmp_path: Path) -> None:
    row = rollout_row(1, 0, tokens=["\x1b[31m\u202e"], kl=[1.0])
    assert gather(tmp_path, [row]).tokens()[0]["text"] == "\\x1b[31m\\u202e"


@pytest.mark.parametrize(("there", "count"), [(5, 40), (120, 40), (2000, 40), (41, 40), (3, 1)])
def test_steps_are_spread_with_both_ends(there: int, count: int) -> None:
    found = spread(range(1, there + 1), count)
    assert found == sorted(set(found))
    assert len(found) == min(there, count)
    assert found[0] == 1
    if count > 1:
        assert found[-1] == there
        gaps = [b - a for a, b in pairwise(found)]
        assert max(gaps) - min(gaps) <= 1
