"""A list of students: one config for each, with a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.config import Config, fill_name, load_config
from rnow.errors import ConfigError

HEAD = "dataset_type: rl\n"


def names(folder: Path, text: str, *overrides: str) -> list[tuple[str, str]]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(HEAD + text)
    loaded = load_config(folder, overrides)
    return [
        (config.model.path, fill_name(config.model.name or "", config)) for config in loaded.configs
    ]


def test_each_student_gets_a_run_of_its_own(tmp_path: Path) -> None:
    project = tmp_path / "sweep"
    listed = "model:\n  path: [Qwen/Qwen3-8B, runs/sft/]\n"
    assert names(project, listed) == [
        ("Qwen/Qwen3-8B", "sweep-Qwen3-8B"),
        ("runs/sft/", "sweep-sft"),
    ]
    assert names(project, f"project_name: mine\n{listed}")[1] == ("runs/sft/", "mine-sft")
    found = names(project, listed, "model.name=lr-{trainer.learning_rate}")
    assert found[0] == ("Qwen/Qwen3-8B", "lr-0.0001-Qwen3-8B")
    found = names(project, listed, "model.name=on {model.path}")
    assert found[0] == ("Qwen/Qwen3-8B", "on Qwen/Qwen3-8B")


def test_two_that_end_alike_are_told_apart_whatever_their_order(tmp_path: Path) -> None:
    found = names(tmp_path / "p", "model:\n  path: [a/m, b/m, c]\n")
    assert [name for _, name in found] == ["p-a/m", "p-b/m", "p-c"]
    found = names(tmp_path / "p", "model:\n  path: ['{x}']\n", "model.path=['{x}', c]")
    assert found[0] == ("{x}", "p--x-")


def test_a_list_on_the_command_line_and_one_student_again(tmp_path: Path) -> None:
    found = names(tmp_path / "p", "model:\n  path: a\n", "model.path=[b, c]")
    assert [path for path, _ in found] == ["b", "c"]
    found = names(tmp_path / "p", "model:\n  path: [a, b]\n", "model.path=c")
    assert found == [("c", "")]


def test_where_there_can_be_one_student_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(f"{HEAD}model:\n  path: [a, b]\n")
    for refused in (lambda: load_config(tmp_path).config, lambda: Config.from_file(tmp_path)):
        with pytest.raises(ConfigError, match="lists 2 students") as caught:
            refused()
        assert "-m a" in (caught.value.fix or "")


def test_a_fault_of_one_student_is_placed(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(f"{HEAD}model:\n  path: [a, 3]\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert "config.yml:3" in (caught.value.where or "")
