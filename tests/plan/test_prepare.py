"""Settings that exclude each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.setup.projects import REWARDS, Project

from rnow.config import Config
from rnow.config.notices import find_notices
from rnow.errors import ConfigError, InputError
from rnow.plan import prepare as prepare_module
from rnow.plan.prepare import Prepared, prepare
from rnow.tools.build import ListedTools


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "dataset_type": "distill",
        "model": {"path": "student", "device": "cpu"},
        "teacher": {"path": "teacher", "device": "cpu"},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return Config(**values)


@pytest.mark.parametrize("section", ["sampler", "teacher"])
def test_a_url_is_a_vllm_server(tmp_path: Any, section: str) -> None:
    wrong = config(**{section: {"url": "http://h:1", "backend": "transformers"}})
    with pytest.raises(ConfigError, match=f"{section}.url names a server"):
        prepare(wrong, tmp_path, weights=False)


def test_a_served_teacher_is_not_tempered(tmp_path: Any) -> None:
    wrong = config(teacher={"url": "http://h:1"}, rollout={"temperature": 0.7})
    with pytest.raises(ConfigError, match=r"temperature 0\.7"):
        prepare(wrong, tmp_path, weights=False)


def prepared(project: Project, **sections: Any) -> Prepared:
    return prepare(project.config(**sections), project.folder, weights=False)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


def test_user_code_that_nothing_calls_is_named(project: Project) -> None:
    assert prepared(project).warnings == ()
    (project.folder / "tools.py").write_text("def add(a: int) -> int:\n    return a\n")
    (project.folder / "rewards.py").write_text(REWARDS.replace("@reward", ""))
    rows = [{"messages": [{"role": "user", "content": f"row {n}"}]} for n in range(4)]
    project.write_rows(rows)
    tools, rewards = prepared(project).warnings
    assert tools.startswith("tools.py has no function marked @tool")
    assert rewards.startswith("rewards.py has no function marked @reward")
    # With the tools switched off by hand there is nothing to say of them.
    assert prepared(project, teacher={"agentic": False}).warnings == (rewards,)


def test_an_agent_without_a_tool_is_refused(project: Project) -> None:
    (project.folder / "tools.py").write_text("def add(a: int) -> int:\n    return a\n")
    with pytest.raises(InputError, match="but there are no tools"):
        prepared(project, teacher={"agentic": True})


def test_a_run_is_not_named_after_a_secret(project: Project) -> None:
    (project.folder / ".env").write_text("API_KEY=sk-Zx91qTopSecretValue77\n")
    with pytest.raises(ConfigError, match="named after a secret") as caught:
        prepared(project, model={"name": "run-sk-Zx91qTopSecretValue77"})
    assert "Zx91q" not in caught.value.render()
    assert prepared(project, model={"name": "run"}).run_name == "run"


def test_rewards_that_no_row_names_are_told_of(project: Project) -> None:
    project.write_rows([{"messages": [{"role": "user", "content": f"row {n}"}]} for n in range(4)])
    (told,) = prepared(project).warnings
    assert told.startswith("no row names a reward, so none of rewards.py is run (short)")
    assert told.endswith('give rows "rewards": ["short"]')


def test_servers_of_rows_with_images_are_said_to_be_here(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}], "docker": "python:3.11"}
    project.write_rows([row | {"rewards": ["short"]}] * 4)
    monkeypatch.setattr(prepare_module, "check_sandbox", lambda *arguments: [])
    listed = ListedTools(schemas={}, functions=[])
    monkeypatch.setattr(prepare_module, "list_tools", lambda *arguments: listed)
    (told,) = prepared(project, rollout={"mcp_url": "localhost:8931"}).notices
    assert "not from inside their containers" in told
    assert prepared(project).notices == ()


def test_evals_without_held_out_prompts_are_refused_without_a_warning_besides(
    project: Project,
) -> None:
    config = project.config(evals=[{"step": 1}])
    assert find_notices(config) == []
    with pytest.raises(ConfigError, match="no prompts are held out"):
        prepare(config, project.folder, weights=False)
