"""``rnow test`` of a student that a run trained."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tests.setup.projects import Project

from rnow.errors import EXIT_BAD_INPUT, InputError, ModelError
from rnow.policy.student import LoraPolicy
from rnow.sampling import transformers
from rnow.setup.build import run
from rnow.setup.rehearse import rehearse

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A project with a finished run."""
    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("trained") / "project", tiny_model_dir)
    config = project.config(
        trainer={"max_steps": 2, "learning_rate": 0.3, "save_step": 1},
        data={"val_split": 0.25},
        evaluation={"teacher": False},
    )
    run(config, folder=project.folder)
    return project


def answers(project: Project, path: str, **sections: Any) -> tuple[list[str], str]:
    """Every completion of two prompts, and what was printed."""
    console = Console(file=io.StringIO(), width=400)
    config = project.config(**sections)
    model = config.model.model_copy(update={"path": path, "qlora_rank": 8})
    config = config.model_copy(update={"model": model})
    rehearse(config, folder=project.folder, limit=2, console=console)
    rows = [
        json.loads(file.read_text())["completion"]
        for file in sorted((project.folder / "rollouts").rglob("*.json"))
    ]
    return rows, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_run_its_adapter_and_its_last_checkpoint_are_one_student(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, torch.Tensor]] = []
    load = LoraPolicy.load_adapter

    def watched(self: LoraPolicy, tensors: Any) -> None:
        load(self, tensors)
        loaded.append({name: tensor.clone() for name, tensor in self.adapter().tensors.items()})

    monkeypatch.setattr(LoraPolicy, "load_adapter", watched)
    untrained, _ = answers(project, str(project.student))
    assert loaded == []
    trained, output = answers(project, "runs/tiny")
    assert trained != untrained
    assert f"with {project.run_dir / 'adapter'}" in output
    kept = load_file(project.run_dir / "adapter/adapter_model.safetensors")
    assert loaded[0].keys() == kept.keys()
    assert all(torch.equal(loaded[0][name], kept[name]) for name in kept)
    last = str(project.run_dir / "checkpoints/step-000002")
    for path in ("tiny", str(project.run_dir), "runs/tiny/adapter", last):
        assert answers(project, path)[0] == trained, path
    first, _ = answers(project, "runs/tiny/checkpoints/step-000001")
    assert first != trained


def test_where_the_adapter_is_not_merged_it_answers_the_same(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, _ = answers(project, "runs/tiny")
    monkeypatch.setattr(transformers, "sampling_mode", lambda lm: "shared")
    assert answers(project, "runs/tiny")[0] == trained


def test_a_run_under_way_is_tried_as_of_its_newest_checkpoint(project: Project) -> None:
    copy = project.folder / "runs" / "going"
    shutil.copytree(project.run_dir, copy)
    shutil.rmtree(copy / "adapter")
    (copy / "checkpoints" / ".tmp-3-1").mkdir()
    _, output = answers(project, "runs/going")
    assert f"with {copy / 'checkpoints' / 'step-000002'}" in output
    assert (copy / "checkpoints" / ".tmp-3-1").is_dir(), "another process may be writing it"
    shutil.rmtree(copy)


def other_kind(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))


def cut_short(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def no_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def another_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 2}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (other_kind, "is not one that rnow wrote"),
        (cut_short, "cannot be read"),
        (no_weights, "cannot be read"),
        (no_json, "cannot be read"),
        (another_base, "does not fit its base"),
    ],
)
def test_what_cannot_be_tried_is_refused_with_its_place(
    project: Project, damage: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(project.run_dir / "adapter", adapter)
    damage(adapter)
    with pytest.raises(ModelError, match=words) as caught:
        answers(project, str(adapter))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.where == "model.path"


def test_a_run_that_is_not_there_is_no_model_of_the_hub(
    project: Project, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    with pytest.raises(InputError, match="there is no run 'runs/tinny'") as caught:
        answers(project, "runs/tinny")
    assert caught.value.fix == "rnow test -m runs/tiny"
    with pytest.raises(InputError, match="there is no run 'runs/NAME'") as caught:
        answers(Project(tmp_path / "new", tiny_model_dir), "runs/NAME")
    assert caught.value.fix == "train one first: rnow run"


def test_a_second_stage_is_tried_with_the_adapter_that_it_starts_from(project: Project) -> None:
    trained, _ = answers(project, "runs/tiny")
    base = project.config(model={"path": str(project.student), "adapter": "tiny"})
    console = Console(file=io.StringIO(), width=400)
    rehearse(base, folder=project.folder, limit=2, console=console)
    rows = sorted((project.folder / "rollouts").rglob("*.json"))
    assert [json.loads(file.read_text())["completion"] for file in rows] == trained
    # A run that is named on the command line is tried itself, whatever the project would start from.
    other = {"adapter": "runs/tiny/checkpoints/step-000001"}
    assert answers(project, "runs/tiny", model=other)[0] == trained
