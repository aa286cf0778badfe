"""benchmarks/two_stages.py: which checkpoint stands for a mark, and what becomes of the figures."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.benchmarks.scripts import load_benchmark
from tests.cli.test_evaluate import REPORT

from rnow.setup.eval_report import EvalReport

ARMS = ("sft", "distill", "both")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_benchmark("two_stages")


def rows() -> list[dict[str, Any]]:
    plan = {"what": "plan", "marks": [100, 200], "seeds": 2, "titles": {arm: arm for arm in ARMS}}
    alone = [{"what": "student", "accuracy": 0.4}, {"what": "teacher", "accuracy": 0.9}]
    runs = [
        {"what": "run", "arm": arm, "seed": seed, "mark": mark, "accuracy": 0.5 + 0.1 * seed}
        for arm in ARMS
        for seed in (0, 1)
        for mark in (100, 200)
        if (arm, mark) != ("both", 100)
    ]
    return [plan, *alone, *runs]


def test_a_mark_is_met_by_the_nearest_step_with_a_checkpoint(
    script: ModuleType, tmp_path: Path
) -> None:
    lines = [{"step": step, "tokens/completion": 30.0} for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = script.tokens_by_step(tmp_path)
    assert counts == [30, 60, 90, 120, 150, 180]
    assert [script.at_mark(counts, mark) for mark in (1, 85, 95, 1000)] == [2, 2, 4, 6]


def test_steps_go_by_the_length_of_the_teachers_answers(script: ModuleType, tmp_path: Path) -> None:
    answer = {"turns": 3, "spent": {"completion_tokens": 40}}
    scored = {"reward": 1.0}
    text = "".join(json.dumps(line) + "\n" for line in (answer, scored, answer))
    (tmp_path / "train.answers.jsonl").write_text(text)
    steps = script.steps_for(tmp_path, 6400)
    assert steps % 2 == 0, "checkpoints are two steps apart"
    assert 6400 * 1.2 < steps * 40 * script.ROWS < 6400 * 1.5


def test_it_reads_what_rnow_eval_prints(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = EvalReport(rows=REPORT.rows[:1], prompts=REPORT.prompts, count=REPORT.count)
    monkeypatch.setattr(script, "rnow", lambda *words: json.dumps(one.to_dict()))
    assert script.judge(Path(), "student") == pytest.approx(3 / 16)


def test_the_table_and_the_plot(script: ModuleType, tmp_path: Path) -> None:
    results = {"rows": rows(), "machine": {"cpu": "a cpu", "torch": "1", "date": "today"}}
    lines = script.table(results).splitlines()
    assert lines[2] == "| sft | 0.550 (0.500 to 0.600) | 0.550 (0.500 to 0.600) |"
    assert lines[4] == "| both |  | 0.550 (0.500 to 0.600) |"
    assert "0.400, the teacher: 0.900" in lines[-1]
    pytest.importorskip("matplotlib")
    script.plot(rows(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_page_has_a_place_for_it_and_the_settings_of_the_benchmark(script: ModuleType) -> None:
    page = script.DOCS.read_text()
    assert page.count(script.BEGIN) == page.count(script.END) == 1
    for setting in script.ON_POLICY:
        assert setting in page, setting
