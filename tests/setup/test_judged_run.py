"""A run that learns from a judge: waits while it is down, and ends for now rather than train on what it did not say."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.judges import VARIABLES, Answer, Judge, completion, judge_server
from tests.setup.projects import Project, Watcher

from rnow.errors import EXIT_TEMPORARY, TemporaryError
from rnow.rewards import outage
from rnow.setup import usercode
from rnow.setup.build import run
from rnow.setup.eval_report import EvalReport
from rnow.setup.evaluate import Asked, evaluate

MakeModel = Callable[..., Path]
KEY = "sk-judge-of-nobody-4711"
JUDGED = """
from rnow.core import get_response, llm_judge, reward

@reward(timeout=5)
async def style(args, messages):
    return llm_judge(get_response(messages), secrets=args.secrets)

@reward
def short(args, messages):
    return min(1.0, len(get_response(messages)) / 8)
"""
DOWN = Answer(status=503, body=f"no room for {KEY}", headers={"Retry-After": "3600"})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(outage, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(outage, "LONGEST_PAUSE", 0.05)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judge_server() as judge:
        yield judge


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel, judge: Judge) -> Project:
    project = Project(tmp_path / "project", tiny_model_dir)
    (project.folder / "rewards.py").write_text(JUDGED)
    (project.folder / ".env").write_text(f"OPENAI_API_KEY={KEY}\nLLM_JUDGE_API_URL={judge.url}\n")
    words = [{"role": "user", "content": f"word {row}"} for row in range(8)]
    project.write_rows([{"messages": [word], "rewards": ["style", "short"]} for word in words])
    return project


def rl(project: Project, **sections: Any) -> Any:
    values = project.values(dataset_type="rl", trainer={"max_steps": 2}, **sections)
    del values["teacher"]
    return type(project.config())(**values)


def by_length(request: dict[str, Any]) -> Answer:
    said = request["messages"][1]["content"]
    return completion(f'{{"score": {len(said) % 2}}}')


def test_it_waits_for_a_judge_that_comes_back(project: Project, judge: Judge) -> None:
    """Of its first ten requests five are refused: every rollout has its score in the end."""

    def answer(request: dict[str, Any]) -> Answer:
        count = len(judge.requests)
        return DOWN if count <= 10 and count % 2 else by_length(request)

    judge.answer = answer
    watcher = Watcher()
    run(rl(project), folder=project.folder, display=watcher)
    assert [row["reward/failure_fraction"] for row in project.metrics] == [0.0, 0.0]
    waits = [note for note in watcher.notes if "waiting up to" in note]
    assert waits
    assert 'the judge of reward "style"' in waits[0]
    assert KEY not in "".join(watcher.notes)
    for file in project.run_dir.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_one_that_stays_away_ends_the_run_for_now_and_it_continues(
    project: Project, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_PATIENCE", 0.2)
    monkeypatch.setattr(usercode, "JUDGE_PATIENCE", 0.2)
    scored = 8 + 4  # the first step, and half of the second

    def answer(request: dict[str, Any]) -> Answer:
        return DOWN if len(judge.requests) > scored else by_length(request)

    judge.answer = answer
    with pytest.raises(TemporaryError, match='judge of reward "style"') as caught:
        run(rl(project), folder=project.folder)
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert KEY not in caught.value.render()
    assert "answered 503: no room for" in (caught.value.why or "")
    assert len(project.metrics) == 1, "the second step was not trained on"
    judge.answer = by_length
    watcher = Watcher()
    assert run(rl(project), folder=project.folder, display=watcher).values["steps"] == 2
    assert any("continuing after step 1" in note for note in watcher.notes)
    assert [row["reward/failure_fraction"] for row in project.metrics] == [0.0, 0.0]


def of_the_file(project: Project) -> EvalReport:
    """Evaluated on its own rows, two answers each."""
    asked = Asked(temperatures={1: 1.0}, samples=2, prompts=project.folder / "train.jsonl")
    silent = Console(file=io.StringIO())
    return evaluate(
        project.config(), ["student"], folder=project.folder, asked=asked, console=silent
    )


def test_an_evaluation_waits_for_its_judge_and_keeps_nothing_without_it(
    project: Project, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rewards only track in this project; here they are all that is measured."""

    def answer(request: dict[str, Any]) -> Answer:
        count = len(judge.requests)
        return DOWN if count <= 10 and count % 2 else by_length(request)

    judge.answer = answer
    (row,) = of_the_file(project).rows
    assert row.failed == 0.0
    row.kept.unlink()
    judge.answer = lambda request: DOWN
    monkeypatch.setattr(outage, "FIRST_PATIENCE", 0.2)
    with pytest.raises(TemporaryError, match='judge of reward "style"') as caught:
        of_the_file(project)
    assert KEY not in caught.value.render()
    assert not row.kept.exists()
    # One that says nothing usable of some answers is not waited for, and told of.
    judge.answer = lambda r: completion("hm") if len(judge.requests) % 4 == 0 else by_length(r)
    (row,) = of_the_file(project).rows
    assert row.failed == 0.25


def test_where_rewards_only_track_it_is_told_of_and_the_run_goes_on(
    project: Project, judge: Judge
) -> None:
    judge.answers = [DOWN]
    watcher = Watcher()
    run(project.config(trainer={"max_steps": 2}), folder=project.folder, display=watcher)
    assert [row["reward_failures/style"] for row in project.metrics] == [1.0, 1.0]
    assert [row["reward_failures/short"] for row in project.metrics] == [0.0, 0.0]
    told = [note for note in watcher.notes if 'reward "style" fails: JudgeUnavailable' in note]
    assert len(told) == 1
    assert KEY not in "".join(watcher.notes)


def test_answers_that_are_no_scores_are_compared_with_none(project: Project, judge: Judge) -> None:
    """A judge that says nothing usable of some rollouts: those have no advantage, instead of that of a score of 0."""

    def answer(request: dict[str, Any]) -> Answer:
        return completion("I like it") if len(judge.requests) % 4 == 0 else by_length(request)

    judge.answer = answer
    watcher = Watcher()
    run(rl(project), folder=project.folder, display=watcher)
    assert [row["reward_failures/style"] for row in project.metrics] == [0.25, 0.25]
    assert any("the judge gave no score: 'I like it'" in note for note in watcher.notes)
