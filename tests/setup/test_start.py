"""Runs that go on from an adapter: of an earlier run, by its name or its folder, or one that PEFT wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models.test_adapter import edit, edit_tensors, peft_folder
from tests.setup.projects import Killed, Project, Watcher, die

from rnow.errors import EXIT_BAD_INPUT, ConfigError, InputError, ModelError
from rnow.policy.student import LoraPolicy
from rnow.setup.build import check, run

MakeModel = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
EVALUATED: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"teacher": False, "num_samples": 1},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A project whose run ``sft`` is finished."""
    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("first") / "project", tiny_model_dir)
    project.name = "sft"
    trainer = {"max_steps": 2, "save_step": 1, "learning_rate": 0.05}
    run(project.config(model={"name": "sft"}, trainer=trainer, **EVALUATED), folder=project.folder)
    return project


def copy_of(first: Project, folder: Path) -> Project:
    """A copy of a project, in which a second stage is run as ``second``."""
    copy = Project.__new__(Project)
    copy.__dict__ |= first.__dict__
    copy.folder, copy.name = folder, "second"
    shutil.copytree(first.folder, copy.folder)
    return copy


@pytest.fixture
def project(first: Project, tmp_path: Path) -> Project:
    return copy_of(first, tmp_path / "project")


@pytest.fixture(scope="module")
def whole(first: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Another copy, whose second stage nothing interrupted."""
    copy = copy_of(first, tmp_path_factory.mktemp("whole") / "project")
    train(copy, second(copy, adapter="sft"))
    return copy


def second(project: Project, name: str = "second", **model: Any) -> dict[str, Any]:
    """Values of a second stage: rank and scale are not said."""
    values = project.values(trainer={"max_steps": 2, "save_step": 1}, **EVALUATED)
    del values["model"]["qlora_rank"]
    values["model"] |= {"name": name, **model}
    return values


def train(project: Project, values: dict[str, Any], **options: Any) -> Watcher:
    watcher = options.pop("watcher", None) or Watcher()
    run(type(project.config())(**values), folder=project.folder, display=watcher, **options)
    return watcher


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def test_it_begins_where_the_first_run_ended_with_a_fresh_optimizer(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, torch.Tensor]] = []
    load = LoraPolicy.load_adapter

    def watched(self: LoraPolicy, tensors: Any) -> None:
        load(self, tensors)
        begun.append({name: tensor.clone() for name, tensor in self.adapter().tensors.items()})

    monkeypatch.setattr(LoraPolicy, "load_adapter", watched)
    watcher = train(project, second(project, adapter="sft"))
    ended = weights(project.folder / "runs/sft/adapter")
    assert all(torch.equal(begun[0][name], tensor) for name, tensor in ended.items())
    assert "starts from: sft (rank 4), with a fresh optimizer" in watcher.started
    of_first, of_second = (
        {row["name"]: row for row in evaluations(project, name)} for name in ("sft", "second")
    )
    ignored = ("name", "step", "settings")
    assert without(of_second["before"], *ignored) == without(of_first["after"], *ignored)
    state = json.loads((project.run_dir / "checkpoints/step-000001/state.json").read_text())
    assert state["updates"] == 1
    kept = (project.run_dir / "config.yml").read_text()
    assert "adapter: sft" in kept
    assert "qlora_rank: 4" in kept
    assert "qlora_alpha: 8" in kept


def evaluations(project: Project, name: str) -> list[dict[str, Any]]:
    text = (project.folder / "runs" / name / "evaluations.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def test_a_folder_a_name_and_a_student_that_is_an_adapter_are_one_start(
    project: Project, whole: Project
) -> None:
    expected = whole.numbers
    for name, model in {
        "by-folder": {"adapter": "runs/sft/adapter"},
        "by-checkpoint": {"adapter": str(project.folder / "runs/sft/checkpoints/step-000002")},
        "as-student": {"path": "runs/sft"},
    }.items():
        project.name = name
        train(project, second(project, name, **model))
        assert project.numbers == expected, name
    project.name = "other-checkpoint"
    train(project, second(project, project.name, adapter="runs/sft/checkpoints/step-000001"))
    assert project.numbers != expected


def test_stopped_and_continued_it_is_the_same_run(project: Project, whole: Project) -> None:
    for stage, nth in (("teacher", 2), ("update", 1)):
        watcher = Watcher().at(stage, nth, die)
        with pytest.raises(Killed):
            train(project, second(project, adapter="sft"), watcher=watcher)
    # The same weights elsewhere are the same start.
    shutil.copytree(project.folder / "runs/sft/adapter", project.folder / "start")
    watcher = train(project, second(project, adapter="start"))
    assert any("model.adapter: sft -> start" in note for note in watcher.notes)
    assert project.numbers == whole.numbers
    mine, adapter = (weights(of.run_dir / "adapter") for of in (project, whole))
    assert all(torch.equal(mine[name], tensor) for name, tensor in adapter.items())


def test_other_weights_to_start_from_refuse_a_resume(project: Project) -> None:
    values = second(project, adapter="sft")
    with pytest.raises(Killed):
        train(project, values, watcher=Watcher().at("update", 2, die))
    start = project.folder / "runs/sft/adapter"
    edit_tensors(start, lambda tensors: next(iter(tensors.values())).add_(1))
    for changed in (values, second(project)):
        with pytest.raises(ConfigError, match="cannot be continued") as caught:
            train(project, changed)
        assert any("adapter that the run starts from" in line for line in caught.value.details)


def test_an_adapter_of_peft_is_trained_on(project: Project) -> None:
    start = peft_folder(project.folder / "peft", project.student)
    train(project, second(project, adapter="peft"))
    trained, began = weights(project.run_dir / "adapter"), weights(start)
    assert trained.keys() == began.keys(), "the layers are the adapter's"
    assert any(not torch.equal(trained[name], began[name]) for name in began)
    config = json.loads((project.run_dir / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5, 0.0)


def test_in_rl_the_reference_is_the_student_as_the_run_began(project: Project) -> None:
    values = second(project, adapter="sft") | {"dataset_type": "rl"}
    del values["teacher"]
    watcher = train(project, values)
    first, then = (row["teacher_kl"] for row in project.metrics)
    assert abs(first) < 1e-5
    assert abs(then) > 1e-5, "it moved since"
    assert any("the adapter it starts from holds" in line for line in watcher.started)


def test_the_teacher_self_is_the_base_without_the_adapter(project: Project) -> None:
    told = {"system_prompt": "be brief"}
    train(project, second(project, adapter="sft") | {"teacher": {"path": "self", **told}})
    project.name = "by-path"
    # The base by its path, loaded as a model of its own.
    apart = {"path": str(project.student), "device": "cpu", "trust_remote_code": True, **told}
    train(project, second(project, "by-path", adapter="sft") | {"teacher": apart})
    self_kl, apart_kl = (
        json.loads((project.folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()[0])[
            "teacher_kl"
        ]
        for name in ("second", "by-path")
    )
    assert self_kl == pytest.approx(apart_kl, abs=1e-5)


@pytest.mark.parametrize(
    ("model", "words", "fix"),
    [
        ({"qlora_rank": 16}, "qlora_rank is 16, and the adapter", "set model.qlora_rank: 4, or remove"),
        ({"qlora_alpha": 3}, "qlora_alpha is 3, and the adapter", "set model.qlora_alpha: 8, or remove"),
        ({"lora_targets": ["q_proj"]}, "other layers than those", "remove model.lora_targets"),
        ({"path": "runs/sft"}, "and model.adapter another one", "remove model.adapter"),
    ],
)  # fmt: skip
def test_what_contradicts_the_adapter_is_refused(
    project: Project, model: dict[str, Any], words: str, fix: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        train(project, second(project, adapter="sft", **model))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert fix in (caught.value.fix or "")
    assert not project.run_dir.exists()


@pytest.mark.parametrize(
    ("key", "named", "fix"),
    [
        ("adapter", "runs/stf", "rnow run model.adapter=runs/sft"),
        ("adapter", "sftt", "rnow run model.adapter=runs/sft"),
        ("path", "runs/sftt", "rnow run -m runs/sft"),
        (
            "adapter",
            "org/name",
            "hf download org/name --local-dir adapter, then model.adapter: adapter",
        ),
    ],
)
def test_a_run_that_is_not_there_is_suggested(
    project: Project, key: str, named: str, fix: str
) -> None:
    with pytest.raises(ModelError, match=f"no adapter and no run '{named}'") as caught:
        train(project, second(project, **{key: named}))
    assert (caught.value.fix, caught.value.where) == (fix, f"model.{key}")


@pytest.mark.parametrize("key", ["adapter", "path"])
def test_a_run_that_has_no_checkpoint_yet_is_not_taken_for_one_that_is_missing(
    project: Project, key: str
) -> None:
    (project.folder / "runs" / "begun").mkdir()
    with pytest.raises(ModelError, match="there is no adapter in 'runs/begun'") as caught:
        train(project, second(project, **{key: "runs/begun"}))
    assert "first checkpoint" in (caught.value.why or "")


def test_a_base_that_was_moved_is_told_of(project: Project) -> None:
    edit(project.folder / "runs/sft/adapter", base_model_name_or_path="/nowhere/student")
    with pytest.raises(ModelError, match="is not where it was: /nowhere/student") as caught:
        train(project, second(project, path="runs/sft"))
    assert "and model.adapter: runs/sft" in (caught.value.fix or "")


def test_a_whole_model_is_no_adapter(project: Project) -> None:
    (project.folder / "whole").symlink_to(project.student)
    with pytest.raises(ModelError, match="'whole' is a whole model, not an adapter") as caught:
        train(project, second(project, adapter="whole"))
    assert "set model.path: whole" in (caught.value.fix or "")


def cut_short(adapter: Path) -> None:
    file = adapter / WEIGHTS
    file.write_bytes(file.read_bytes()[:-10])


def a_layer_less(adapter: Path) -> None:
    edit_tensors(adapter, lambda tensors: tensors.pop(next(iter(tensors))))


@pytest.mark.parametrize(
    ("damage", "words"), [(cut_short, "cannot be read"), (a_layer_less, "does not fit")]
)
def test_a_damaged_adapter_is_refused_before_a_model_is_loaded(
    project: Project, damage: Callable[[Path], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.setup.models.load_causal_lm", pytest.fail)
    damage(project.folder / "runs/sft/adapter")
    config = type(project.config())(**second(project, adapter="sft"))
    for refused in (check, run):
        with pytest.raises(ModelError, match=words) as caught:
            refused(config, folder=project.folder)
        assert caught.value.where == "model.adapter"
    assert not project.run_dir.exists()


def test_a_swapped_base_is_refused(project: Project, tiny_model_dir: MakeModel) -> None:
    """Of the same shapes, so that only what the run knew of its base tells."""
    other = tiny_model_dir(seed=5, num_hidden_layers=1, vocab_size=128)
    with pytest.raises(ModelError, match="was trained on another model") as caught:
        train(project, second(project, adapter="sft", path=str(other)))
    assert f"set model.path: {project.student}" in (caught.value.fix or "")


@pytest.mark.parametrize("key", ["path", "adapter"])
def test_the_plan_names_it(project: Project, key: str) -> None:
    plan = check(type(project.config())(**second(project, **{key: "runs/sft"})), project.folder)
    assert plan.starts_from == "runs/sft (rank 4)"
    assert plan.to_dict()["starts_from"] == "runs/sft (rank 4)"
    assert plan.models["student"].path == str(project.student)
    new = check(project.config(model={"name": "new"}), project.folder)
    assert new.starts_from is None
    assert new.trainable_parameters == plan.trainable_parameters
