"""Evaluations of runs side by side: intervals over prompts, and differences of the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
from tests.comparing.folders import PROMPTS, evaluate, keep_eval, make_run

from rnow.comparing.evaluations import difference, read_measured
from rnow.training.intervals import difference_interval, mean_interval

PASSED = (0, 1, 4, 4, 2, 3, 4, 0)


def test_a_pass_rate_has_the_interval_of_its_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    evaluate(run, "after", 20, PASSED)
    found = read_measured(run)
    assert list(found) == ["after: pass@1", "after: teacher_kl"]
    one = found["after: pass@1"]
    assert one.value == pytest.approx(fmean(PASSED) / 4)
    assert one.interval == mean_interval([passed / 4 for passed in PASSED])
    assert found["after: teacher_kl"].interval is None


def test_answers_of_another_step_are_not_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    evaluate(run, "after", 20, PASSED)
    row = {"name": "after", "step": 40, "pass@1": 0.75}
    with run.evaluations.open("a") as file:
        file.write(json.dumps(row) + "\n")
    one = read_measured(run)["after: pass@1"]
    assert (one.value, one.step, one.interval) == (0.75, 40, None)


def test_an_answer_whose_reward_failed_has_not_passed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", config={"evaluation": {"success_reward": 0.0}})
    evaluate(run, "after", 20, (4, 4))
    path = run.answers / "after.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"reward": 0.0, "reward_errors": {"right": "raised"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.evaluations.write_text(json.dumps({"name": "after", "step": 20, "pass@1": 0.875}) + "\n")
    assert [*read_measured(run)["after: pass@1"].by_prompt.values()] == [0.75, 1.0]


def test_before_after_and_teacher_come_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    for name in ("often", "teacher", "after", "before"):
        evaluate(run, name, 20, PASSED)
    names = [name.partition(":")[0] for name in read_measured(run)]
    assert list(dict.fromkeys(names)) == ["before", "after", "teacher", "often"]


def test_a_difference_is_of_the_same_prompts(tmp_path: Path) -> None:
    first, other, elsewhere = (make_run(tmp_path / name) for name in ("one", "two", "three"))
    better = tuple(min(4, passed + 1) for passed in PASSED)
    evaluate(first, "after", 20, PASSED)
    evaluate(other, "after", 20, better)
    evaluate(elsewhere, "after", 20, better, said="What is")
    a, b, c = (read_measured(run)["after: pass@1"] for run in (first, other, elsewhere))
    by_prompt = [dict(zip(PROMPTS, (x / 4 for x in row), strict=True)) for row in (PASSED, better)]
    assert difference(a, b) == difference_interval(*by_prompt)
    assert difference(a, c) is None


def test_what_rnow_eval_kept(tmp_path: Path) -> None:
    first, other = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    keep_eval(first, 10, {"a": 0, "b": 4})
    keep_eval(first, 20, {"a": 1, "b": 4})
    keep_eval(other, 20, {"a": 2, "b": 4})
    keep_eval(other, 20, {"a": 2, "c": 4}, prompts="q")
    (other.path / "evals" / "step-000030-cut.json").write_text('{"measured": {"prom')
    one, two = read_measured(first), read_measured(other)
    shared = [name for name in one if name in two]
    assert [name.partition(": ")[2] for name in shared] == ["pass@1 at 0.6", "pass@4 at 0.6"]
    assert len(two) == 4
    a, b = one[shared[0]], two[shared[0]]
    assert (a.value, a.step, b.value) == (0.625, 20, 0.75)
    found = difference(a, b)
    assert found is not None
    assert found.mean == pytest.approx(0.125)
    assert one[shared[1]].value == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "[]\n",
        '{"step": 20}\n',
        "{",
        '{"step": 20, "prompt_id": [], "messages": [], "reward": "x"}\n',
    ],
)
def test_damaged_answers_cost_the_interval_only(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "one")
    evaluate(run, "after", 20, PASSED)
    (run.answers / "after.jsonl").write_text(text)
    one = read_measured(run)["after: pass@1"]
    assert (one.value, one.interval) == (pytest.approx(fmean(PASSED) / 4), None)
