"""Runs without a teacher: groups whose rewards are all equal, and what is left of a step without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollouts import read_transcripts
from tests.setup.projects import Killed, Project, Watcher, die

from rnow.config import Config
from rnow.errors import ConfigError, RnowError
from rnow.setup.build import run

MakeModel = Callable[..., Path]
SAME_FOR_SOME = '''
from rnow.core import reward, get_response

@reward
def short(args, messages):
    """Differs between answers to every other prompt only."""
    row = int(messages[-2]["content"].split()[-1])
    return sum(map(ord, get_response(messages))) % 7 if row % 2 else 1.0
'''
CONSTANT = "from rnow.core import reward\n\n@reward\ndef short(args, messages):\n    return 0.7\n"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def project_in(folder: Path, make_model: MakeModel) -> Project:
    project = Project(folder, make_model)
    (project.folder / "rewards.py").write_text(SAME_FOR_SOME)
    return project


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return project_in(tmp_path / "project", tiny_model_dir)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel
) -> dict[bool | str, Project]:
    """A run by its ``drop_equal_groups``, which nothing interrupts."""
    torch.set_num_threads(1)
    found: dict[bool | str, Project] = {}
    for drop in ("auto", False):
        project = project_in(tmp_path_factory.mktemp("runs") / "project", tiny_model_dir)
        run(config(project, drop_equal_groups=drop), folder=project.folder)
        found[drop] = project
    return found


def config(project: Project, **algorithm: Any) -> Config:
    settings = {"kl_penalty_coef": 0, **algorithm}
    trainer = {"max_steps": 3, "save_step": 1}
    return project.config(dataset_type="rl", teacher=None, algorithm=settings, trainer=trainer)


def trained(project: Project, step: int) -> dict[str, bool]:
    """Prompt -> whether its rollouts were trained on."""
    found: dict[str, bool] = {}
    for row in read_transcripts(project.run_dir / "transcripts", step):
        found[row["prompt_id"]] = row["advantage"] is not None
    return found


def test_groups_with_equal_rewards_are_left_out_and_counted(
    runs: dict[bool | str, Project],
) -> None:
    project = runs["auto"]
    for row in project.metrics:
        used = trained(project, row["step"])
        assert row["reward/equal_groups_fraction"] == 1 - sum(used.values()) / len(used)
        for prompt, was in used.items():
            assert not was or int(prompt.rpartition("/")[2]) % 2, "those of even rows are equal"
    assert any(0 < row["reward/equal_groups_fraction"] < 1 for row in project.metrics)


def test_kept_by_request_and_where_the_student_is_held_near_its_start(
    runs: dict[bool | str, Project], project: Project
) -> None:
    run(config(project, kl_penalty_coef=0.01), folder=project.folder)
    for kept in (project, runs[False]):
        assert all(all(trained(kept, row["step"]).values()) for row in kept.metrics)
        assert any(row["reward/equal_groups_fraction"] for row in kept.metrics)


def test_dropping_them_changes_the_scale_of_the_gradient_and_not_its_direction(
    runs: dict[bool | str, Project],
) -> None:
    """Their advantages are 0: what goes is their share of the tokens that the loss is divided by."""
    norms = {}
    for drop, project in runs.items():
        (first, *_), used = project.metrics, trained(project, 1)
        rows = read_transcripts(project.run_dir / "transcripts", 1)
        tokens = sum(row["completion_tokens"] for row in rows if used[row["prompt_id"]])
        norms[drop] = first["grad_norm"] * tokens
    assert norms["auto"] == pytest.approx(norms[False], rel=1e-4)


def test_a_step_without_any_signal_does_no_update_and_says_so(project: Project) -> None:
    (project.folder / "rewards.py").write_text(CONSTANT)
    watcher = Watcher()
    made = config(project)
    with pytest.raises(RnowError, match="nothing was trained") as caught:
        run(made, folder=project.folder, display=watcher)
    assert "same reward" in (caught.value.why or "")
    assert [row["skipped_updates"] for row in project.metrics] == [1.0, 2.0, 3.0]
    assert [row["reward/equal_groups_fraction"] for row in project.metrics] == [1.0, 1.0, 1.0]
    told = [note for note in watcher.notes if note.startswith("no update in step")]
    assert told[0] == "no update in step 1: all rollouts of each group have the same reward"


def test_killed_and_continued_it_is_the_same_run(
    runs: dict[bool | str, Project], project: Project
) -> None:
    made = config(project)
    for stage in ("reward", "update"):
        with pytest.raises(Killed):
            run(made, folder=project.folder, display=Watcher().at(stage, 2, die))
    run(made, folder=project.folder)
    assert project.numbers == runs["auto"].numbers


def test_continued_it_counts_on_the_steps_without_an_update(project: Project) -> None:
    (project.folder / "rewards.py").write_text(CONSTANT)
    made = config(project)
    with pytest.raises(Killed):
        run(made, folder=project.folder, display=Watcher().at("update", 3, die))
    with pytest.raises(RnowError, match="nothing was trained"):
        run(made, folder=project.folder)
    assert [row["skipped_updates"] for row in project.metrics] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adv_estimator": "reinforce"}, "with adv_estimator reinforce a group with equal rewards"),
        ({"adv_estimator": "gae"}, "with adv_estimator gae a group"),
    ],
)
def test_where_equal_rewards_say_something_dropping_is_refused(
    project: Project, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(project, drop_equal_groups=True, **changes)
    with pytest.raises(ConfigError, match="leave out what the teacher says"):
        project.config(algorithm={"drop_equal_groups": True, "reward_coef": 1.0})
