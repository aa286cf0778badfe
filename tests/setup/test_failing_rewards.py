"""Runs whose rewards fail: those that teach end, those that only track are told of once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import REWARDS, Project, Watcher

from rnow.errors import EXIT_FAILED, RnowError
from rnow.setup.build import run

MakeModel = Callable[..., Path]
BROKEN = """
from rnow.core import reward

@reward
def short(args, messages):
    return len(messages) / args.metadata["length"]
"""
LINE = "reward \"short\" fails: KeyError: 'length' (rewards.py:6), in "


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    project = Project(tmp_path / "project", tiny_model_dir)
    (project.folder / "rewards.py").write_text(BROKEN)
    return project


def told(watcher: Watcher) -> list[str]:
    return [note for note in watcher.notes if LINE in note]


def test_where_rewards_teach_the_run_ends_before_it_trains_on_nothing(project: Project) -> None:
    watcher = Watcher()
    values = project.values(dataset_type="rl", trainer={"max_steps": 2})
    del values["teacher"]
    config: Any = type(project.config())(**values)
    with pytest.raises(RnowError, match="in step 1 every reward") as caught:
        run(config, folder=project.folder, display=watcher)
    assert caught.value.exit_code == EXIT_FAILED
    first, *trace = caught.value.details
    assert first == f"{LINE}8 of 8 rollouts"
    assert trace[0].strip().startswith("Traceback")
    assert any('args.metadata["length"]' in line for line in trace)
    assert trace[-1].strip() == "KeyError: 'length'"
    assert len(told(watcher)) == 1
    assert (project.run_dir / "checkpoints" / "step-000000").is_dir(), "the state is saved"
    (project.folder / "rewards.py").write_text(REWARDS)
    watcher = Watcher()
    assert run(config, folder=project.folder, display=watcher).values["steps"] == 2
    assert any("continuing after step 0" in note for note in watcher.notes)
    assert [row["reward_failures/short"] for row in project.metrics] == [0.0, 0.0]


def test_one_reward_of_two_that_always_fails_ends_the_run(project: Project) -> None:
    (project.folder / "rewards.py").write_text(
        f"{REWARDS}\n@reward\ndef broken(args, messages):\n    return 1 / 0\n"
    )
    rows = (project.folder / "train.jsonl").read_text()
    (project.folder / "train.jsonl").write_text(rows.replace('["short"]', '["short", "broken"]'))
    values = project.values(dataset_type="rl", trainer={"max_steps": 2})
    del values["teacher"]
    with pytest.raises(RnowError, match='in step 1 the reward "broken" failed on every') as caught:
        run(type(project.config())(**values), folder=project.folder)
    assert "ZeroDivisionError" in caught.value.details[-1]
    kept = project.run_dir / "metrics.jsonl"
    assert not kept.is_file() or not kept.read_text(), "nothing was trained on its zeros"


def test_a_fresh_run_that_ends_so_is_continued_by_its_name(project: Project) -> None:
    values = project.values(dataset_type="rl", trainer={"max_steps": 2})
    del values["teacher"]
    with pytest.raises(RnowError, match="every reward") as caught:
        run(type(project.config())(**values), folder=project.folder, fresh=True)
    assert "-n tiny instead of --fresh" in (caught.value.fix or "")


def test_where_they_only_track_it_goes_on_and_is_told_once(project: Project) -> None:
    watcher = Watcher()
    config = project.config(trainer={"max_steps": 2}, data={"val_split": 0.25})
    assert run(config, folder=project.folder, display=watcher).values["steps"] == 2
    assert told(watcher) == [f"warning: {LINE}16 of 16 rollouts of an evaluation"]
    assert [row["reward_failures/short"] for row in project.metrics] == [1.0, 1.0]
