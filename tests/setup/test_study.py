"""A study: which runs it makes, and what they come to over the seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import Project

from rnow.cli.main import run_command_line
from rnow.config import Config, dump_yaml
from rnow.errors import EXIT_BAD_INPUT, ConfigError, InputError
from rnow.setup import several
from rnow.setup.study import (
    Result,
    Study,
    StudyRun,
    measures,
    plan_study,
    read_settings,
    split_values,
)
from rnow.training.intervals import Interval, seeds_interval

MakeModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4", ["1e-4"]),
        ("1e-4, 1e-3", ["1e-4", "1e-3"]),
        ("[a, b],[c]", ["[a, b]", "[c]"]),
        ('"a,b",c', ['"a,b"', "c"]),
        ("[{a: [1, 2]}],none", ["[{a: [1, 2]}]", "none"]),
        ('["]",x],y', ['["]",x]', "y"]),
        ("a,", ["a", ""]),
    ],
)
def test_commas_inside_brackets_and_quotes_stay(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_what_is_varied_and_what_is_the_same_for_all() -> None:
    varied, fixed = read_settings(["lr=1e-4,1e-3", "data.batch_size=8", "--debug"])
    assert varied == {"trainer.learning_rate": ["1e-4", "1e-3"]}
    assert fixed == ["data.batch_size=8", "--debug"]


@pytest.mark.parametrize(
    "texts",
    [
        ["lr=1,1"],
        ["lr=1,"],
        ["lr=1,2", "trainer.learning_rate=3,4"],
        ["seed=1,2"],
        ["model.name=a,b"],
    ],
)
def test_what_cannot_be_varied(texts: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_settings(texts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "reverse"
    made.mkdir()
    values = {
        "dataset_type": "distill",
        "seed": 7,
        "model": {"path": "student"},
        "teacher": {"path": "teacher"},
    }
    (made / "config.yml").write_text(dump_yaml(values))
    return made


def test_every_combination_with_every_seed(folder: Path) -> None:
    varied = {"trainer.learning_rate": ["1e-4", "1e-3"], "model.qlora_rank": ["8", "16"]}
    title, runs = plan_study(folder, varied, ["data.batch_size=2"], seeds=2)
    assert title == "reverse-learning_rate-qlora_rank"
    assert [run.name for run in runs[:3]] == [
        "reverse-learning_rate-1e-4-qlora_rank-8-seed-7",
        "reverse-learning_rate-1e-4-qlora_rank-8-seed-8",
        "reverse-learning_rate-1e-4-qlora_rank-16-seed-7",
    ]
    assert len({run.name for run in runs}) == len(runs) == 8
    last = runs[-1].config
    assert (last.seed, last.trainer.learning_rate, last.model.qlora_rank) == (8, 1e-3, 16)
    assert {run.config.data.batch_size for run in runs} == {2}


def test_names_of_a_study(folder: Path) -> None:
    varied = {"model.dtype": ["float32", "bfloat16"], "teacher.dtype": ["float32", "bfloat16"]}
    _, runs = plan_study(folder, varied, [], seeds=1, name="lr-{trainer.learning_rate}")
    assert runs[0].name == "lr-0.0001-model.dtype-float32-teacher.dtype-float32-seed-7"
    title, runs = plan_study(folder, {"model.path": ["a/x", "b/x"]}, ["model.name=n"], seeds=1)
    assert [run.name for run in runs] == ["n-path-a/x-seed-7", "n-path-b/x-seed-7"]
    assert title == "n-path"


def test_a_list_of_students_is_varied_too(folder: Path) -> None:
    varied = {"trainer.learning_rate": ["1e-4", "1e-3"]}
    _, runs = plan_study(folder, varied, ["model.path=[a, b]", "model.name=n"], seeds=1)
    assert [dict(run.setting)["model.path"] for run in runs] == ["a", "b", "a", "b"]
    assert runs[1].name == "n-learning_rate-1e-4-seed-7-b"


@pytest.mark.parametrize(
    ("varied", "error"),
    [
        ({}, InputError),
        ({"trainer.learning_rate": ["1e-4", "fast"]}, ConfigError),
        ({"trainer.learning_rat": ["1e-4", "1e-3"]}, ConfigError),
    ],
)
def test_what_is_refused(
    folder: Path, varied: dict[str, list[str]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        plan_study(folder, varied, [], seeds=1)


def test_what_a_run_is_judged_by() -> None:
    summary = {
        "evaluation": {
            "before": {"step": 0, "pass@1": 0.25, "teacher_kl": 0.9},
            "after": {"step": 9, "pass@1": 0.75, "teacher_kl": 0.1},
            "teacher": None,
        },
        "teacher_kl": {"first": 0.9, "last": 0.2, "averaged_steps": 1},
    }
    assert measures(summary) == {
        "after: pass@1": 0.75,
        "after: teacher_kl": 0.1,
        "teacher_kl at the end": 0.2,
        "pass@1 gained": 0.5,
    }
    rows = {"evaluation": {"before": None, "after": None}, "loss": {"first": 2.0, "last": 1.0}}
    assert measures(rows) == {"loss at the end": 1.0}


def test_settings_over_their_seeds() -> None:
    config = Config(dataset_type="distill", model={"path": "s"}, teacher={"path": "t"})

    def result(value: str, seed: int, measured: float | None) -> Result:
        return Result(
            run=StudyRun(setting=(("lr", value),), seed=seed, config=config),
            measures={} if measured is None else {"kl": measured},
            error="it broke" if measured is None else None,
        )

    study = Study(
        name="s",
        results=[
            result("1", 0, 0.5), result("1", 1, 0.7), result("1", 2, 0.6),
            result("2", 0, 0.4), result("2", 1, None), result("2", 2, 0.48),
            result("3", 0, None), result("3", 1, 0.1), result("3", 2, None),
        ],
    )  # fmt: skip
    first, second, third = study.rows()
    assert (first.done, first.of, first.minus_first) == (3, 3, {})
    assert first.measures["kl"] == seeds_interval([0.5, 0.7, 0.6])
    assert (second.done, second.of) == (2, 3)
    found = second.minus_first["kl"]
    assert isinstance(found, Interval)
    assert found.mean == pytest.approx((-0.1 - 0.12) / 2), "of the seeds that both have"
    assert third.measures["kl"] == 0.1
    assert third.minus_first["kl"] == pytest.approx(-0.6)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_study_from_end_to_end(
    tmp_path: Path,
    tiny_model_dir: MakeModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = Project(tmp_path / "project", tiny_model_dir)
    values = project.values(trainer={"max_steps": 1}, data={"val_split": 0.25})
    values |= {"evaluation": {"num_samples": 1, "max_prompts": 2, "teacher": False}}
    (project.folder / "config.yml").write_text(dump_yaml(values))
    command = ["study", "--seeds", "2", "lr=2e-3", "-d", str(project.folder)]
    real, begun = several.run, []

    def sometimes(config: Any, **options: Any) -> Any:
        begun.append(config.model.name)
        if len(begun) == 1:
            raise ZeroDivisionError("a fault of ours")
        return real(config, **options)

    monkeypatch.setattr(several, "run", sometimes)
    assert run_command_line(command) == 1
    captured = capsys.readouterr()
    assert "tiny-seed-0 failed:" in captured.err
    assert begun == ["tiny-seed-0", "tiny-seed-1"]
    assert "1/2" in captured.out

    assert run_command_line([*command, "--json"]) == 0
    assert begun[2:] == begun[:2]
    found = json.loads(capsys.readouterr().out)
    kept = project.folder / "studies" / "tiny.json"
    assert json.loads(kept.read_text()) == found
    (row,) = found["settings"]
    assert (row["settings"], row["done"], row["seeds"]) == ({}, 2, 2)
    kl = row["measures"]["teacher_kl at the end"]
    assert kl["low"] < kl["mean"] < kl["high"]
    assert [one["error"] for one in found["runs"]] == [None, None]
    assert "| seeds | after: pass@1 |" in kept.with_suffix(".md").read_text()
    assert sorted(path.name for path in (project.folder / "runs").iterdir()) == begun[:2]


def test_one_run_is_no_study(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["study", "-d", str(folder)]) == EXIT_BAD_INPUT
    assert "--seeds 3" in capsys.readouterr().err
