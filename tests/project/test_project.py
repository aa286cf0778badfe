"""A whole folder as a Project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rnow.config import Config
from rnow.errors import DataError, InputError
from rnow.project.project import load_project

ROW = {"messages": [{"role": "user", "content": "Hi"}]}


def config(**sections: Any) -> Config:
    fields: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
    }
    return Config(**(fields | sections))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text((json.dumps(ROW | {"rewards": ["f"]}) + "\n") * 10)
    (tmp_path / "rewards.py").write_text(
        "from rnow.core import reward\n@reward\ndef f(args, messages): return 1.0\n"
    )
    (tmp_path / ".env").write_text("API_KEY=sk-secret\n")
    return tmp_path


def test_the_parts_of_a_folder(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    project = load_project(folder, config(data={"val_split": 0.2}))
    assert project.folder == folder
    assert len(project.dataset.prompts) == 8
    assert len(project.dataset.held_out) == 2
    assert list(project.rewards) == ["f"]
    assert project.secrets == {"API_KEY": "sk-secret"}
    assert not project.agentic
    assert project.dataset.warnings == ()
    assert "sk-secret" not in repr(project)
    assert {path.name for path in folder.iterdir()} == before


def test_seed_and_shuffle_come_from_the_config(folder: Path) -> None:
    one = load_project(folder, config(data={"val_split": 0.5}, seed=1))
    two = load_project(folder, config(data={"val_split": 0.5, "shuffle": False}, seed=2))
    assert [p.id for p in one.dataset.held_out] != [p.id for p in two.dataset.held_out]
    assert (one.dataset.shuffle, two.dataset.shuffle) == (True, False)
    assert one.dataset.content_hash == two.dataset.content_hash


def test_names_of_rewards_are_checked(folder: Path) -> None:
    (folder / "rewards.py").unlink()
    with pytest.raises(DataError, match="10 faults"):
        load_project(folder, config())


def test_several_files(folder: Path) -> None:
    (folder / "more.jsonl").write_text(json.dumps(ROW))
    data = {"train_file": ["train.jsonl", {"path": "more.jsonl", "name": "extra"}]}
    project = load_project(folder, config(data=data))
    assert {prompt.dataset for prompt in project.dataset.prompts} == {"dataset_0", "extra"}


OFF = {"path": "teacher", "agentic": False}


def test_tools_make_it_agentic_unless_switched_off(folder: Path) -> None:
    (folder / "tools.py").write_text("raise RuntimeError('not imported here')\n")
    assert load_project(folder, config()).agentic
    assert not load_project(folder, config(teacher=OFF)).agentic
    (folder / "tools.py").unlink()
    assert load_project(folder, config(rollout={"mcp_url": "localhost:1"})).agentic


def test_names_of_tools_are_checked_where_they_count(folder: Path) -> None:
    (folder / "tools.py").write_text("")
    (folder / "train.jsonl").write_text(json.dumps(ROW | {"tools": ["search"]}))
    project = load_project(folder, config(), tools=["search", "fetch"])
    assert project.dataset.prompts[0].tools == ("search",)
    with pytest.raises(DataError, match="1 fault"):
        load_project(folder, config(), tools=["fetch"])
    load_project(folder, config(teacher=OFF))
    (folder / "tools.py").unlink()
    with pytest.raises(DataError, match="1 fault"):
        load_project(folder, config())


def test_agentic_without_tools_is_an_error(folder: Path) -> None:
    with pytest.raises(InputError, match="no tools") as caught:
        load_project(folder, config(teacher={"path": "teacher", "agentic": True}))
    assert caught.value.where == "teacher.agentic"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        load_project(tmp_path / "absent", config())
