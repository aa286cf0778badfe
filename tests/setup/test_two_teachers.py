"""A whole run with two teachers: who judges what, going on after kill -9, and what a resume refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollouts import read_transcripts
from tests.serving.scripted import ScriptedServer, logprob, status
from tests.setup.projects import Killed, Project, Watcher, die, read_jsonl

from rnow.config import Config
from rnow.errors import ConfigError, DataError, TemporaryError
from rnow.plan.plan import build_plan
from rnow.plan.prepare import prepare
from rnow.setup.build import run
from rnow.setup.models import load_model
from rnow.teacher.transformers import TransformersTeacher

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class TwoTeachers(Project):
    """``words.jsonl`` is judged by the teacher ``plain``; ``letters.jsonl`` by another, but for its first row."""

    def __init__(self, folder: Path, make_model: MakeModel) -> None:
        super().__init__(folder, make_model)
        rows = read_jsonl(folder / "train.jsonl")
        (folder / "train.jsonl").unlink()
        rows[8]["teacher"] = "plain"
        self.write("words.jsonl", rows[:8])
        self.write("letters.jsonl", rows[8:])
        for name, seed in (("plain", 1), ("odd", 2)):
            model = make_model(seed=seed, num_hidden_layers=1, vocab_size=104)
            shutil.copytree(model, folder / name)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def values(self, **sections: Any) -> dict[str, Any]:
        files = [
            {"path": "words.jsonl", "name": "words", "teacher": "plain"},
            {
                "path": "letters.jsonl",
                "name": "letters",
                "teacher": {"path": "odd", "device": "cpu"},
            },
        ]
        values = super().values(
            teachers={"plain": {"path": "plain", "device": "cpu"}},
            data={"train_file": files, "val_split": 0.25},
            evaluation={"num_samples": 1},
            trainer={"max_steps": 3, "save_step": 1},
        )
        del values["teacher"]
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
        return values


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> TwoTeachers:
    return TwoTeachers(tmp_path / "project", tiny_model_dir)


def teacher_of(prompt_id: str) -> str:
    """The role that has to judge a row."""
    return (
        "teacher/plain"
        if prompt_id.startswith("words") or prompt_id == "letters/0"
        else "teacher/letters"
    )


def judged(
    project: TwoTeachers, config: Config
) -> Iterator[tuple[str, list[float], dict[str, list[float]]]]:
    """Of every rollout of the run: its prompt, what the transcript says the teacher gave its tokens, and what each of the
    teachers gives them on its own."""
    prepared = prepare(config, project.folder, weights=True)
    roles = ("teacher/plain", "teacher/letters")
    teachers = {
        role: TransformersTeacher(load_model(prepared.models[role], prepared.rendered))
        for role in roles
    }
    for step in range(1, prepared.num_steps + 1):
        for row in read_transcripts(project.run_dir / "transcripts", step):
            prompt_id = row["id"].rpartition("#")[0]
            prompt = prepared.rendered.prompt_token_ids[prompt_id]
            ids = [*prompt, *(token["id"] for token in row["tokens"])]
            given = [token["teacher_logprob"] for token in row["tokens"]]
            alone = {
                role: [
                    value
                    for value in teacher.compute_logprobs(ids)[len(prompt) :]
                    if value is not None
                ]
                for role, teacher in teachers.items()
            }
            yield prompt_id, given, alone


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_each_row_is_judged_by_its_own_teacher(project: TwoTeachers, estimator: str) -> None:
    config = project.config(algorithm={"kl_estimator": estimator})
    run(config, folder=project.folder)
    seen = set()
    for prompt_id, given, alone in judged(project, config):
        own = teacher_of(prompt_id)
        (other,) = set(alone) - {own}
        seen.add(own)
        assert given == pytest.approx(alone[own], abs=1e-4), prompt_id
        assert given != pytest.approx(alone[other], abs=1e-2), f"{prompt_id}: both say the same"
    assert seen == {"teacher/plain", "teacher/letters"}
    for row in project.numbers:
        assert {"teacher_kl/words", "teacher_kl/letters"} & set(row)
        by_teacher = {name for name in row if name.startswith("teacher_kl/teacher/")}
        assert by_teacher <= {"teacher_kl/teacher/plain", "teacher_kl/teacher/letters"}
    assert {"teacher_kl/teacher/plain", "teacher_kl/teacher/letters"} <= {
        name for row in project.numbers for name in row
    }


def test_each_held_out_row_is_answered_and_judged_by_its_own(project: TwoTeachers) -> None:
    config = project.config(evaluation={"teacher": True, "num_samples": 2})
    watcher = Watcher()
    run(config, folder=project.folder, display=watcher)
    rows = {row["name"]: row for row in project.evaluations}
    assert list(rows) == ["before", "teacher", "after"]
    for name in ("before", "after"):
        parts = [rows[name][f"teacher_kl/teacher/{one}"] for one in ("plain", "letters")]
        assert min(parts) <= rows[name]["teacher_kl"] <= max(parts)
    answers = read_jsonl(project.run_dir / "answers" / "teacher.jsonl")
    held_out = [prompt.id for prompt in prepare(config, project.folder, weights=True).evaluated]
    assert len(answers) == 2 * len(held_out)
    assert "loading the teacher/plain" in watcher.stages
    assert "loading the teacher/letters" in watcher.stages


def test_what_the_plan_says(project: TwoTeachers) -> None:
    spare = {"plain": {"path": "plain", "device": "cpu"}, "spare": {"path": "nowhere/at-all"}}
    spare["spare"]["path"] = str(project.folder / "odd")
    prepared = prepare(project.config(teachers=spare), project.folder, weights=False)
    assert list(prepared.models) == ["student", "teacher/plain", "teacher/letters"]
    assert "no row is judged by teachers.spare, which is not loaded" in prepared.notices
    plan = build_plan(prepared, run_dir=project.run_dir)
    assert sum(plan.judged.values()) == plan.prompts == 12
    assert set(plan.to_dict()) >= {"student", "teacher/plain", "teacher/letters"}


@pytest.mark.parametrize(
    ("row", "where", "said", "fix"),
    [
        ({"teacher": "plian"}, "letters.jsonl, line 3", 'unknown teacher "plian" (did you mean plain?)', "teachers in config.yml has plain"),
        ({"teacher": "letters"}, "letters.jsonl, line 3", 'unknown teacher "letters"', "teachers in config.yml has plain"),
        ({"teacher": 3}, "letters.jsonl, line 3", '"teacher" must be the name of a teacher, but it is a number', "correct"),
    ],
)  # fmt: skip
def test_a_row_that_names_nobody(
    project: TwoTeachers, row: dict[str, Any], where: str, said: str, fix: str
) -> None:
    rows = read_jsonl(project.folder / "letters.jsonl")
    rows[2] |= row
    project.write("letters.jsonl", rows)
    with pytest.raises(DataError) as caught:
        run(project.config(), folder=project.folder)
    assert caught.value.where == where
    assert said in caught.value.details[0]
    assert fix in str(caught.value.fix)
    assert not project.run_dir.exists()


def test_a_row_without_any_teacher(project: TwoTeachers) -> None:
    config = project.config(data={"train_file": ["words.jsonl", "letters.jsonl"]})
    with pytest.raises(DataError) as caught:
        run(config, folder=project.folder)
    assert caught.value.where == "words.jsonl, line 1"
    assert "names no teacher, and its dataset has none" in caught.value.details[0]


# ---- going on ---------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path

import torch
from rnow.config import Config
from rnow.setup import build
from tests.setup.projects import Watcher

torch.set_num_threads(1)
stage, nth, folder, values = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
watcher = Watcher().at(stage, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
build.run(Config(**values), folder=folder, display=watcher)
"""


def test_kill_9_changes_no_number(
    project: TwoTeachers, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    whole = TwoTeachers(tmp_path / "whole", tiny_model_dir)
    run(whole.config(), folder=whole.folder)
    root = Path(__file__).parents[2]
    paths = f"{root / 'src'}{os.pathsep}{root}"
    ended = subprocess.run(
        [
            sys.executable, "-c", KILLED, "update", "2", str(project.folder),
            json.dumps(project.values()),
        ],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    watcher = Watcher()
    run(project.config(), folder=project.folder, display=watcher)
    assert any("continuing after step 1" in note for note in watcher.notes)
    assert project.numbers == whole.numbers
    assert project.evaluations == whole.evaluations
    name = Path("adapter") / "adapter_model.safetensors"
    assert (project.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


def stopped(project: TwoTeachers) -> None:
    """One step is saved."""
    with pytest.raises(Killed):
        run(project.config(), folder=project.folder, display=Watcher().at("update", 2, die))


def other_weights(project: TwoTeachers, name: str) -> None:
    """At the same path, and of the same size."""
    from safetensors.torch import load_file, save_file

    file = project.folder / name / "model.safetensors"
    save_file(
        {key: value + 0.01 for key, value in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


def with_row(project: TwoTeachers) -> None:
    rows = read_jsonl(project.folder / "letters.jsonl")
    rows[3]["teacher"] = "plain"
    project.write("letters.jsonl", rows)


@pytest.mark.parametrize(
    ("change", "sections", "line"),
    [
        (lambda project: other_weights(project, "plain"), {}, "the weights of teacher/plain changed"),
        (lambda project: other_weights(project, "odd"), {}, "the weights of teacher/letters changed"),
        (lambda project: None, {"teachers": {"plain": {"path": "odd", "dtype": "float32", "device": "cpu"}}}, "teachers.plain.path: plain -> odd"),
        (with_row, {}, "the training data changed"),
    ],
)  # fmt: skip
def test_a_resume_with_another_teacher_is_refused(
    project: TwoTeachers, change: Callable[[TwoTeachers], None], sections: dict[str, Any], line: str
) -> None:
    stopped(project)
    change(project)
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        run(project.config(**sections), folder=project.folder)
    assert line in caught.value.details
    assert "--fresh" in str(caught.value.fix)


def test_swapped_datasets_are_refused_and_where_a_teacher_is_placed_is_not(
    project: TwoTeachers,
) -> None:
    stopped(project)
    files = project.values()["data"]["train_file"]
    swapped = [files[0] | {"teacher": "./odd"}, files[1] | {"teacher": "plain"}]
    with pytest.raises(ConfigError, match="cannot be continued"):
        run(project.config(data={"train_file": swapped}), folder=project.folder)
    placed = [files[0], files[1] | {"teacher": {"path": "odd"}}]
    watcher = Watcher()
    run(project.config(data={"train_file": placed}), folder=project.folder, display=watcher)
    assert "changed since the checkpoint: teachers.letters.device: cpu -> auto" in watcher.notes


def test_one_of_them_may_be_served(project: TwoTeachers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server gets its own key, and what it says reaches its own rows alone."""
    monkeypatch.delenv("RNOW_TEACHER_API_KEY", raising=False)
    (project.folder / ".env").write_text(
        "RNOW_TEACHER_API_KEY=another\nRNOW_TEACHER_PLAIN_API_KEY=0wn-key\n"
    )
    with ScriptedServer(key="0wn-key") as server:
        config = project.config(
            teachers={"plain": {"path": "plain", "url": server.url}},
            rollout={"max_context_window": 60},
            algorithm={"kl_estimator": "sampled"},
            trainer={"max_steps": 2},
        )
        run(config, folder=project.folder)
    prepared = prepare(config, project.folder, weights=True)
    for step in (1, 2):
        for row in read_transcripts(project.run_dir / "transcripts", step):
            prompt_id = row["id"].rpartition("#")[0]
            at = len(prepared.rendered.prompt_token_ids[prompt_id])
            scripted = [logprob(t["id"], at + index) for index, t in enumerate(row["tokens"])]
            given = [token["teacher_logprob"] for token in row["tokens"]]
            served = given == pytest.approx(scripted, rel=2**-16)
            assert served == (teacher_of(prompt_id) == "teacher/plain"), prompt_id


@pytest.mark.parametrize("names", ["plain", None])
def test_a_server_that_goes_is_named_by_its_own_key(
    project: TwoTeachers, names: str | None
) -> None:
    """Of two teachers, and of one that is described under ``teachers``."""
    sections: dict[str, Any] = {}
    if names is None:
        (project.folder / "letters.jsonl").unlink()
        sections["data"] = {
            "train_file": [{"path": "words.jsonl", "name": "words", "teacher": "plain"}]
        }
    with ScriptedServer() as server:
        config = project.config(
            teachers={"plain": {"path": "plain", "url": server.url}},
            rollout={"max_context_window": 60},
            algorithm={"kl_estimator": "sampled"},
            **sections,
        )
        gone = Watcher().at("teacher", 1, lambda: setattr(server, "always", status(403)))
        with pytest.raises(TemporaryError) as caught:
            run(config, folder=project.folder, display=gone)
    assert caught.value.where == "teachers.plain.url"
