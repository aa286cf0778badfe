"""Whole runs whose teacher is told more than the student."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.agents import AgentProject, call, script_student
from tests.setup.projects import WORDS, Project, Watcher
from transformers import AutoTokenizer

from rnow.config import Config
from rnow.errors import InputError
from rnow.setup import models
from rnow.setup.build import check, run
from rnow.teacher import privileged

MakeModel = Callable[..., Path]

MARK = "qzxv"
"""Planted in all that the teacher alone is told."""
SPYING = """
from rnow.core import reward

@reward
def right(args, messages):
    print(vars(args) if hasattr(args, "__dict__") else args, messages)
    return 0.0
"""
SPYING_TOOL = '''
from rnow.core import tool

@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    import gc
    print([text for text in gc.get_objects() if isinstance(text, (str, dict)) and "zxv" in str(text)[:500]])
    return a + b
'''


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


def write_told(project: Project, **told: Any) -> None:
    project.write_rows(
        [
            {
                "messages": [{"role": "user", "content": f"{word} {row}"}],
                "rewards": ["short"],
                **{key: value(word) for key, value in told.items()},
            }
            for row, word in enumerate(WORDS)
        ]
    )


def one_step(project: Project, name: str, **sections: Any) -> list[dict[str, Any]]:
    project.name = name
    trainer = {"max_steps": 2}
    config = project.config(model={"name": name}, trainer=trainer, **sections)
    run(config, folder=project.folder)
    return project.numbers


def leaks(folder: Path) -> Iterator[str]:
    """Every place under ``folder`` that holds the mark."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            raw = path.read_bytes()
            if (at := raw.find(MARK.encode())) >= 0:
                yield f"{path.relative_to(folder)}: {raw[max(0, at - 60) : at + 20]!r}"


@pytest.mark.parametrize("estimator", ["auto", "sampled"])
def test_one_copy_scores_as_a_second_one_would(
    estimator: str, project: Project, tmp_path: Path
) -> None:
    """``self``, the student's own folder and a copy of it: the same numbers, and only the copy is loaded."""
    copy = tmp_path / "copy"
    shutil.copytree(project.student, copy)
    write_told(project, privileged_context=lambda word: f"say {word[::-1]}")
    numbers, loaded = {}, {}
    real = models.load_model

    def counting(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return real(*args, **kwargs)

    for name, path in (("self", "self"), ("same", str(project.student)), ("copy", str(copy))):
        count: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rnow.setup.backends.load_model", counting)
            algorithm = {"kl_estimator": estimator}
            numbers[name] = one_step(project, name, teacher={"path": path}, algorithm=algorithm)
        loaded[name] = len(count)
    assert loaded == {"self": 1, "same": 1, "copy": 2}
    assert numbers["self"] == numbers["same"] == numbers["copy"]
    assert abs(numbers["self"][0]["teacher_kl"]) > 1e-3, "the teacher is told nothing"


def test_the_plan_says_that_there_is_one_copy(project: Project) -> None:
    write_told(project, privileged_context=lambda word: word * 20)
    shared = check(project.config(teacher={"path": "self"}), project.folder)
    apart = check(project.config(), project.folder)
    assert [plan.models["teacher"].own_base for plan in (shared, apart)] == [True, False]
    assert shared.longest_told > shared.longest_prompt
    (device,) = shared.devices
    lines = {(part.model, part.name): part.bytes for part in device.parts}
    assert ("teacher", "weights") not in lines
    assert lines["teacher", "activations"] > 0
    write_told(project, privileged_context=lambda word: word)
    shorter = check(project.config(teacher={"path": "self"}), project.folder)
    parts = {(part.model, part.name): part.bytes for part in shorter.devices[0].parts}
    assert parts["teacher", "activations"] < lines["teacher", "activations"]


def test_self_that_is_told_nothing_is_refused_before_anything_is_written(project: Project) -> None:
    with pytest.raises(InputError, match="nothing would be learned"):
        run(project.config(teacher={"path": "self"}), folder=project.folder)
    assert not project.run_dir.exists()


@pytest.mark.parametrize("path", ["self", "teacher"])
def test_what_the_teacher_is_told_is_seen_by_nobody_else(
    path: str,
    tmp_path: Path,
    tiny_model_dir: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With tools, rewards, an evaluation and W&B: the mark is in what the teacher scored, and in no file and no message."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["rnow", "run"])
    project = AgentProject(tmp_path / "agents", tiny_model_dir, tools=SPYING_TOOL, rewards=SPYING)
    rows = [json.loads(line) for line in (project.folder / "train.jsonl").read_text().splitlines()]
    messages = [{"role": "user", "content": f"think of {MARK}"}]
    for number, row in enumerate(rows):
        row |= {"privileged_context": MARK} if number % 2 else {"teacher_messages": messages}
    project.write_rows(rows)
    script_student(monkeypatch, project, lambda text, number: call("add", a=number, b=1))
    scored: list[str] = []
    real = privileged.with_prompt

    def watched(sample: Any, prompt: Any) -> Any:
        told = real(sample, prompt)
        scored.append(bytes_of(told.token_ids))
        return told

    tokenizer = AutoTokenizer.from_pretrained(project.student)

    def bytes_of(ids: Any) -> str:
        return tokenizer.decode(ids)

    monkeypatch.setattr(privileged, "with_prompt", watched)
    heard = Watcher()
    config = project.config(
        wandb_project="planted",
        teacher={"path": "self"} if path == "self" else {},
        data={"val_split": 0.2, "batch_size": 2},
        trainer={"max_steps": 1},
        rollout={"max_turns": 2},
        evaluation={"num_samples": 1},
    )
    run(config, folder=project.folder, display=heard)
    assert scored
    assert all(text.count(MARK) == 1 for text in scored)
    assert any(text.count("tool\n") for text in scored), "no sample of several turns"
    assert list((project.run_dir / "answers").glob("*")), "no answers to look at"
    assert list(project.run_dir.rglob("*.wandb")), "no W&B run to look at"
    assert list(leaks(project.run_dir)) == []
    printed = capfd.readouterr()
    assert MARK not in " ".join([*heard.notes, *heard.lines, printed.out, printed.err])


def test_the_teachers_system_prompt_goes_to_no_tracker(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the run's own config, which a resume compares, and nowhere else."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["rnow", "run"])
    teacher = {"path": "self", "system_prompt": MARK, "template": f"{MARK} {{prompt}} {{context}}"}
    source = {"path": "train.jsonl", "teacher": {"path": "self", "system_prompt": f"{MARK}!"}}
    sections = {"teacher": teacher, "data": {"train_file": ["train.jsonl", source]}}
    one_step(project, "tiny", wandb_project="planted", **sections)
    own = {"config.yml", "run.json", "state.json"}
    places = [place.partition(":")[0] for place in leaks(project.run_dir)]
    assert {Path(place).name for place in places} <= own
    assert "config.yml" in places


def test_every_teacher_tells_its_own_rows_what_it_says(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two teachers that are the student's base, and one that is not, each with a system prompt of its own."""
    rows = [
        {"messages": [{"role": "user", "content": f"{word} {row}"}], "teacher": name}
        for row, (word, name) in enumerate(zip(WORDS, "abc" * 6, strict=False))
    ]
    project.write_rows(rows)
    teachers = {
        "a": {"path": "self", "system_prompt": "be a"},
        "b": {"path": str(project.student), "system_prompt": "be b", "device": "cpu"},
        "c": {"path": str(project.teacher), "system_prompt": "be c", "device": "cpu"},
    }
    scored: dict[str, list[str]] = {}
    real = privileged.with_prompt
    tokenizer = AutoTokenizer.from_pretrained(project.student)

    def watched(sample: Any, prompt: Any) -> Any:
        told = real(sample, prompt)
        scored.setdefault(told.teacher, []).append(tokenizer.decode(told.token_ids))
        return told

    monkeypatch.setattr(privileged, "with_prompt", watched)
    values = project.values(teachers=teachers, trainer={"max_steps": 2})
    del values["teacher"]
    config = Config(**values)
    plan = check(config, project.folder)
    assert [plan.models[f"teacher/{name}"].own_base for name in "abc"] == [True, True, False]
    run(config, folder=project.folder)
    assert sorted(scored) == ["teacher/a", "teacher/b", "teacher/c"]
    for role, texts in scored.items():
        assert all(f"be {role[-1]}" in text for text in texts)
    kinds = {f"teacher_kl/teacher/{name}" for name in "abc"}
    assert kinds <= {key for row in project.numbers for key in row}
