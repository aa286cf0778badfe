"""A whole run with a teacher on a server that somebody else runs: its key, its answers, its evaluation, its death."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving.scripted import ScriptedServer, html, slow, status
from tests.setup.projects import Project, Watcher

from rnow.errors import InputError, ModelError, TemporaryError
from rnow.setup import build
from rnow.setup.build import run
from rnow.teacher.served import API_KEY_VARIABLE

KEY = "k3y-of-the-teacher"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(key=KEY) as started:
        yield started


@pytest.fixture
def project(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Project:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    made = Project(tmp_path / "project", tiny_model_dir, rewards=False)
    (made.folder / ".env").write_text(f"{API_KEY_VARIABLE}={KEY}\n")
    return made


def config_of(project: Project, server: ScriptedServer, **sections: Any) -> Any:
    values: dict[str, Any] = {
        "teacher": {"url": server.url},
        "rollout": {"max_context_window": 60},
        "trainer": {"max_steps": 2},
    }
    return project.config(**(values | sections))


def test_the_key_of_the_projects_env_file(project: Project, server: ScriptedServer) -> None:
    display = Watcher()
    run(config_of(project, server), folder=project.folder, display=display)
    assert "asking the teacher's server" in display.stages
    assert not [name for name in display.stages if name.startswith("starting")]
    assert len(project.numbers) == 2
    for row in project.numbers:
        # The scripted teacher gives every token -4.2 to -7.0, the untrained student about -4.6.
        assert -0.5 < row["teacher_kl"] < 3
    judged = [body for body in server.asked("/v1/completions") if "prompt_logprobs" in body]
    assert len(judged) >= 2 * 4 * 2
    for text in (path.read_text() for path in project.run_dir.rglob("*.json*")):
        assert KEY not in text


@pytest.mark.parametrize(
    ("protocol", "estimator"), [("sglang", "topk"), ("openai", "topk"), ("openai-text", "sampled")]
)
def test_a_server_of_another_kind(project: Project, protocol: str, estimator: str) -> None:
    """Found by asking; it judges, and does not answer the held-out prompts."""
    sections = {
        "data": {"val_split": 0.25},
        "evaluation": {"num_samples": 2, "max_prompts": 3, "teacher": True},
        "trainer": {"max_steps": 1},
        "algorithm": {"kl_estimator": estimator},
    }
    display = Watcher()
    with ScriptedServer(key=KEY, protocol=protocol) as server:
        run(config_of(project, server, **sections), folder=project.folder, display=display)
    (row,) = project.numbers
    assert -0.5 < row["teacher_kl"] < 3
    assert [row["name"] for row in project.evaluations] == ["before", "after"]
    assert any(note.startswith("the teacher's server: asked by") for note in display.notes)


def test_the_teacher_answers_the_held_out_prompts(project: Project, server: ScriptedServer) -> None:
    sections = {
        "data": {"val_split": 0.25},
        "evaluation": {"num_samples": 2, "max_prompts": 3, "teacher": True},
    }
    run(config_of(project, server, **sections), folder=project.folder)
    names = [row["name"] for row in project.evaluations]
    assert names == ["before", "teacher", "after"]
    answered = [body for body in server.asked("/v1/completions") if body.get("logit_bias")]
    assert len(answered) == 3 * 2
    assert len({body["seed"] for body in answered}) == 3 * 2
    assert {tuple(body["logit_bias"]) for body in answered} == {("100", "101", "102", "103")}


def test_a_teacher_that_goes_ends_the_run_with_its_state_saved(
    project: Project, server: ScriptedServer
) -> None:
    def gone() -> None:
        server.always = status(403)

    display = Watcher().at("teacher", 2, gone)
    with pytest.raises(TemporaryError) as caught:
        run(config_of(project, server), folder=project.folder, display=display)
    assert caught.value.exit_code == 75
    assert [path.name for path in sorted((project.run_dir / "checkpoints").iterdir())] == [
        "step-000001"
    ]
    server.always = None
    run(config_of(project, server), folder=project.folder)
    assert [row["step"] for row in project.metrics] == [1, 2]


def test_a_teacher_that_hangs_before_the_first_step_is_given_up_sooner(
    project: Project, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHECK_SECONDS", 0.5)

    def hang() -> None:
        server.always = slow(20.0)

    display = Watcher().at("checking the models against each other", 1, hang)
    began = time.monotonic()
    with pytest.raises(ModelError) as caught:
        run(config_of(project, server), folder=project.folder, display=display)
    assert time.monotonic() - began < 15
    assert caught.value.exit_code == 2
    assert caught.value.where == "teacher.url"


def test_a_teacher_that_fails_before_the_first_step_is_a_fault_of_the_input(
    project: Project, server: ScriptedServer
) -> None:
    def spoil() -> None:
        server.always = html

    display = Watcher().at("checking the models against each other", 1, spoil)
    with pytest.raises(ModelError, match="answers wrongly") as caught:
        run(config_of(project, server), folder=project.folder, display=display)
    assert caught.value.exit_code == 2
    assert caught.value.where == "teacher.url"
    assert caught.value.fix
    assert not project.run_dir.parent.exists()


def test_an_address_that_is_none_is_named_with_its_key(
    project: Project, server: ScriptedServer
) -> None:
    config = config_of(project, server, teacher={"url": "big-machine:8000"})
    with pytest.raises(InputError, match="not an http") as caught:
        run(config, folder=project.folder, display=Watcher())
    assert "teacher.url" in str(caught.value.where)
