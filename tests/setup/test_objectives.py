"""Whole runs under each objective: they learn, say what they minimise, and go on where they were stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import Killed, Project, Watcher, die

from rnow.config import Config
from rnow.config.estimator import kl_estimator
from rnow.config.teachers import control_of
from rnow.errors import ConfigError, RnowError
from rnow.plan.choices import reads_hidden_states
from rnow.setup.build import run

MakeModel = Callable[..., Path]
STEPS = {"trainer": {"num_epochs": 3, "save_step": 2, "learning_rate": 2e-2}, "seed": 3}

OBJECTIVES: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "auto": ({}, "reverse KL over the whole vocabulary", set()),
    "sampled": ({"kl_estimator": "sampled"}, "ppo, kl_penalty_coef 0.1", {"teacher_kl/k3"}),
    "optimal baseline": (
        {"kl_baseline": "optimal"},
        "ppo, kl_penalty_coef 0.1, optimal baseline",
        {"kl_baseline"},
    ),
    "discount": ({"kl_discount": 0.5}, "ppo, kl_penalty_coef 0.1, kl_discount 0.5", set()),
    "exact forward": (
        {"kl_estimator": "exact", "divergence": "forward"},
        "forward KL over the whole vocabulary",
        set(),
    ),
    "exact jsd": ({"divergence": "jsd"}, "jsd over the whole vocabulary", set()),
    "topk": (
        {"kl_estimator": "topk", "teacher_top_k": 40},
        "reverse KL over the teacher's 40 likeliest tokens",
        {"topk_outside_fraction"},
    ),
    "topk forward": (
        {"kl_estimator": "topk", "divergence": "forward", "teacher_top_k": 1000},
        "forward KL over the teacher's 100 likeliest tokens, a lower bound",
        set(),
    ),
    "gae": (
        {"adv_estimator": "gae", "reward_coef": 0.1, "kl_estimator": "sampled"},
        "ppo, kl_penalty_coef 0.1, gae with lambda 0.95",
        {"value/mean", "value/loss"},
    ),
    "with rewards": (
        {"kl_estimator": "exact", "reward_coef": 0.1},
        "reverse KL over the whole vocabulary, and rewards by ppo",
        {"advantage/std", "reward/mean"},
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


class Header(Watcher):
    """Keeps the lines that are shown when training begins."""

    def start(self, lines: Any) -> None:
        self.header = list(lines)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_learns_and_goes_on_where_it_was_stopped(
    name: str, project: Project, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    algorithm, described, metrics = OBJECTIVES[name]
    shown = Header()
    run(project.config(algorithm=algorithm, **STEPS), folder=project.folder, display=shown)
    assert any(line.startswith(f"objective: {described}") for line in shown.header), shown.header
    rows = project.numbers
    assert metrics <= rows[0].keys()
    kls = [row["teacher_kl"] for row in rows]
    if name != "discount":  # whose sum of what follows is mostly noise with six tokens an answer
        assert sum(kls[-4:]) < 0.8 * sum(kls[:4]), "the same 16 prompts, first and last epoch"

    again = Project(tmp_path / "again", tiny_model_dir)
    config = again.config(algorithm=algorithm, **STEPS)
    with pytest.raises(Killed):
        run(config, folder=again.folder, display=Watcher().at("update", 4, die))
    run(config, folder=again.folder)
    assert again.numbers == rows
    name = "adapter/adapter_model.safetensors"
    assert (again.run_dir / name).read_bytes() == (project.run_dir / name).read_bytes()


def test_teacher_kl_means_the_same_under_every_estimator(project: Project) -> None:
    """At step 1 nothing was trained: each estimates the KL of one and the same student on the same tokens."""
    found = {}
    for name in ("sampled", "exact", "topk"):
        config = project.config(
            algorithm={"kl_estimator": name},
            data={"batch_size": 16, "group_size": 8},
            trainer={"max_steps": 1, "learning_rate": 1e-4},
            model={"name": name},
        )
        project.name = name
        run(config, folder=project.folder)
        found[name] = project.numbers[0]["teacher_kl"]
    assert found["topk"] == pytest.approx(found["exact"], rel=0.05)
    assert found["sampled"] == pytest.approx(found["exact"], rel=0.25)


def test_transcripts_hold_the_teachers_word_and_the_kl_of_each_token(project: Project) -> None:
    """Hidden states are all that `exact` asks for; what is written of the teacher is what `sampled` writes, and the KL of a token is
    that of the whole distribution there."""
    from tests.rollouts import read_transcripts

    lines = {}
    for name in ("sampled", "exact"):
        project.name = name
        config = project.config(
            algorithm={"kl_estimator": name}, trainer={"max_steps": 1}, model={"name": name}
        )
        run(config, folder=project.folder)
        lines[name] = read_transcripts(project.run_dir / "transcripts", 1)
    tokens = [token["kl"] for line in lines["exact"] for token in line["tokens"]]
    assert min(tokens) >= 0
    assert sum(tokens) / len(tokens) == pytest.approx(project.numbers[0]["teacher_kl"], rel=2**-16)
    for mine, theirs in zip(lines["exact"], lines["sampled"], strict=True):
        for one, other in zip(mine["tokens"], theirs["tokens"], strict=True):
            assert one["id"] == other["id"]
            assert one["teacher_logprob"] == pytest.approx(other["teacher_logprob"], abs=1e-5)


# ---- the horizon ----------------------------------------------------------------------------------------------------


def test_training_stops_at_the_horizon_and_evaluations_do_not(project: Project) -> None:
    config = project.config(
        algorithm={"kl_horizon": 2},
        data={"val_split": 0.25},
        evaluation={"num_samples": 1},
        trainer={"max_steps": 2},
    )
    watcher = Watcher()
    run(config, folder=project.folder, display=watcher)
    for row in project.numbers:
        assert row["completions/mean_length"] <= 2
        assert row["completions/truncated_fraction"] == 0
        assert "reward/mean" not in row, "a cut answer cannot be judged"
    after = project.evaluations[-1]
    assert after["completions/mean_length"] > 3
    assert "reward/mean" in after
    assert any("rewards are not computed while training" in note for note in watcher.notes)


def test_a_horizon_with_tools_is_refused(project: Project) -> None:
    (project.folder / "tools.py").write_text(
        "from rnow.core import tool\n\n@tool\ndef look(word: str) -> str:\n    '''Look.'''\n    return word\n"
    )
    with pytest.raises(ConfigError, match="kl_horizon cannot go with tools"):
        run(project.config(algorithm={"kl_horizon": 2}), folder=project.folder)


# ---- controls -------------------------------------------------------------------------------------------------------


def test_a_control_says_so_and_hears_another_word(project: Project) -> None:
    """A random teacher's distribution hardly depends on the context, so that shuffling it takes little away here."""
    options = STEPS | {"data": {"val_split": 0.25}, "evaluation": {"num_samples": 2}}
    before, after, first = {}, {}, {}
    for control in (None, "shuffled", "none"):
        name = project.name = str(control)
        shown = Header()
        config = project.config(teacher={"control": control}, model={"name": name}, **options)
        summary = run(config, folder=project.folder, display=shown)
        assert summary.values["control"] == control
        header = [line for line in shown.header if line.startswith("control: ")]
        warnings = [note for note in shown.notes if "this run is a control" in note]
        assert len(header) == len(warnings) == (control is not None)
        assert all(name.upper() in line for line in header)
        assert all(f"teacher.control: {control}" in line for line in warnings)
        before[control], after[control] = (
            summary.evaluation[when]["teacher_kl"] for when in ("before", "after")
        )
        first[control] = project.numbers[0]
    assert len(set(before.values())) == 1, "evaluations hear the teacher"
    assert after[None] < 0.8 * before[None] < after["none"]
    assert len({row["sampler_trainer_kl"] for row in first.values()}) == 1, "the same tokens"
    assert len({row["teacher_kl"] for row in first.values()}) == 3


def test_a_run_cannot_become_a_control_half_way(project: Project) -> None:
    with pytest.raises(Killed):
        run(
            project.config(**STEPS),
            folder=project.folder,
            display=Watcher().at("update", 4, die),
        )
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        run(project.config(teacher={"control": "shuffled"}, **STEPS), folder=project.folder)
    assert caught.value.details == ("teacher.control: None -> shuffled",)


def test_a_control_is_of_the_whole_run_and_said_once(project: Project) -> None:
    def other(control: str | None) -> dict[str, Any]:
        return {"other": {"path": str(project.teacher), "device": "cpu", "control": control}}

    config = project.config(teachers=other("none"))
    assert control_of(config) == "none"
    assert kl_estimator(config) == "sampled"
    with pytest.raises(ConfigError, match="another control") as caught:
        project.config(teacher={"control": "shuffled"}, teachers=other("none"))
    assert "teachers.other.control" in str(caught.value)
    assert control_of(project.config(teacher={"control": "none"}, teachers=other(None))) == "none"
    with pytest.raises(ConfigError, match="kl_estimator exact needs") as caught:
        project.config(algorithm={"kl_estimator": "exact"}, teachers=other("none"))
    assert "teachers.other.control" in str(caught.value)


def test_a_shuffled_control_needs_two_prompts(project: Project) -> None:
    with pytest.raises(ConfigError, match="which still teaches"):
        project.config(teacher={"control": "shuffled"}, data={"batch_size": 1})


# ---- what cannot go together ----------------------------------------------------------------------------------------

SERVED = {"url": "http://127.0.0.1:1"}
IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"kl_estimator": "exact"}, SERVED, "hidden states and head"),
    ({"kl_estimator": "exact"}, {"backend": "vllm"}, "hidden states and head"),
    ({"divergence": "jsd"}, SERVED, "jsd needs the teacher's whole distribution"),
    ({"divergence": "jsd", "kl_estimator": "topk"}, {}, "jsd needs the teacher's whole"),
    ({"divergence": "forward", "kl_estimator": "sampled"}, {}, "forward needs those"),
    ({"kl_estimator": "topk", "kl_penalty_coef": 0, "reward_coef": 1}, {}, "has nothing to do"),
    ({"kl_estimator": "exact", "kl_baseline": "optimal"}, {}, "belongs to kl_estimator: sampled"),
    ({"kl_estimator": "topk", "kl_discount": 0.5}, {}, "belongs to kl_estimator: sampled"),
    ({"kl_horizon": 5, "reward_coef": 1}, {}, "cuts the answers that rewards"),
    ({"divergence": "forward", "kl_discount": 0.5}, {}, "forward needs those"),
    ({"kl_estimator": "exact"}, {"control": "none"}, "kl_estimator exact needs the teacher's"),
    ({"kl_estimator": "topk"}, {"control": "none"}, "kl_estimator topk needs the teacher's"),
    ({"kl_baseline": "optimal"}, {"control": "none"}, "kl_baseline optimal needs the teacher's"),
    ({"divergence": "jsd"}, {"control": "none"}, "jsd needs the teacher's whole distribution"),
    ({"kl_penalty_coef": 0, "reward_coef": 1}, {"control": "shuffled"}, "nothing is learned from"),
]


@pytest.mark.parametrize(("algorithm", "teacher", "words"), IMPOSSIBLE)
def test_what_cannot_go_together_is_refused_with_the_config(
    project: Project, algorithm: dict[str, Any], teacher: dict[str, Any], words: str
) -> None:
    with pytest.raises(RnowError, match=words) as caught:
        project.config(algorithm=algorithm, teacher=teacher)
    assert caught.value.exit_code == 2
    assert caught.value.fix or caught.value.details


CHOICES: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [
    ({}, {}, "exact", True),
    ({}, SERVED, "topk", False),
    ({"kl_baseline": "optimal"}, {}, "sampled", True),
    ({"kl_baseline": "optimal"}, SERVED, "sampled", False),
    ({"kl_discount": 0.5}, {}, "sampled", False),
    ({"kl_penalty_coef": 0, "reward_coef": 1}, {}, "sampled", False),
    ({"kl_estimator": "topk"}, {}, "topk", False),
    ({}, {"control": "none"}, "sampled", False),
    ({}, {"control": "shuffled"}, "exact", True),
]


@pytest.mark.parametrize(("algorithm", "teacher", "estimator", "hidden"), CHOICES)
def test_what_auto_means(
    project: Project, algorithm: Any, teacher: Any, estimator: str, hidden: bool
) -> None:
    config = project.config(algorithm=algorithm, teacher=teacher)
    assert kl_estimator(config) == estimator
    assert reads_hidden_states(config) is hidden


@pytest.mark.parametrize("divergence", ["forward", "jsd"])
def test_a_divergence_that_auto_in_rl_would_not_compute_is_refused(divergence: str) -> None:
    with pytest.raises(RnowError, match=r"forward needs those|jsd needs the teacher") as caught:
        Config(dataset_type="rl", model={"path": "s"}, algorithm={"divergence": divergence})
    assert "algorithm.divergence" in (caught.value.where or "")


def test_auto_in_rl_is_sampled() -> None:
    config = Config(dataset_type="rl", model={"path": "s"}, data={"group_size": 2})
    assert kl_estimator(config) == "sampled"
