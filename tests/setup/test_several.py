"""A list of students: one run after the other, and what is said of all of them at the end."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import Project

from rnow.cli.main import run_command_line
from rnow.config import Config, dump_yaml
from rnow.display.display import QuietDisplay
from rnow.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, RnowError, TemporaryError
from rnow.setup import build, several

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Sweep:
    """A project with two students, ``a`` and ``b``, and the command in it."""

    def __init__(self, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
        self.project, self._capsys = project, capsys
        for name, seed in (("a", 0), ("b", 3)):
            made = project.make_model(seed=seed, num_hidden_layers=1, vocab_size=128)
            (project.folder / name).symlink_to(made)

    def write(self, *students: str, rows: bool = False, **sections: Any) -> None:
        """``rows``: they learn from answers, which takes least time."""
        values = self.project.values(**{"trainer": {"max_steps": 1}, **sections})
        if rows:
            answer = {"role": "assistant", "content": "yes"}
            asked = [{"messages": [{"role": "user", "content": f"q{n}"}, answer]} for n in range(8)]
            self.project.write_rows(asked)
            values["dataset_type"] = "sft"
            del values["teacher"]
        values["model"] |= {"path": list(students), "name": "sweep"}
        (self.project.folder / "config.yml").write_text(dump_yaml(values))

    def run(self, *arguments: str, command: str = "run") -> tuple[int, str, str]:
        code = run_command_line([command, "-d", str(self.project.folder), *arguments])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def runs(self) -> list[str]:
        return sorted(path.name for path in (self.project.folder / "runs").iterdir())


@pytest.fixture
def sweep(tmp_path: Path, tiny_model_dir: MakeModel, capsys: pytest.CaptureFixture[str]) -> Sweep:
    return Sweep(Project(tmp_path / "project", tiny_model_dir), capsys)


def test_one_that_fails_holds_up_no_other_and_the_command_has_failed(sweep: Sweep) -> None:
    sweep.write("a", "./nowhere", "b")
    code, output, errors = sweep.run()
    assert code == EXIT_BAD_INPUT
    assert "there is no folder './nowhere'" in errors
    assert "config.yml:" in errors, "it is placed"
    assert sweep.runs() == ["sweep-a", "sweep-b"]
    table = output[output.index("outcome") :]
    assert table.count("trained") == 2
    assert "failed: there is no folder './nowhere'" in " ".join(table.split())
    assert "teacher_kl" in table
    for name in ("a", "b"):
        assert (sweep.project.folder / f"runs/sweep-{name}/adapter").is_dir()


def test_the_same_command_goes_on_and_trains_nothing_twice(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun = build._Run.load_and_train, []

    async def interrupted(self: Any) -> Any:
        begun.append(self._folder.path.name)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return await real(self)

    monkeypatch.setattr(build._Run, "load_and_train", interrupted)
    sweep.write("a", "b", "./a/", rows=True, trainer={"max_steps": 2, "save_step": 1})
    code, output, errors = sweep.run()
    assert code == EXIT_INTERRUPTED
    assert begun == ["sweep-a", "sweep-b"], "Ctrl-C ends all"
    assert "not begun: ./a/" in errors
    assert "outcome" not in output
    sweep.write("a", "b", rows=True, trainer={"max_steps": 2, "save_step": 1})
    code, output, errors = sweep.run("--json")
    assert code == 0, errors
    assert begun[2:] == ["sweep-b"], "the first is finished"
    events = [json.loads(line) for line in output.splitlines()]
    finished = [(one["student"], one["name"]) for one in events if one["event"] == "finished"]
    assert finished == [("a", "sweep-a"), ("b", "sweep-b")]
    assert (events[-1]["event"], events[-1]["exit_code"]) == ("runs", 0)
    assert {one["student"] for one in events if one["event"] == "step"} == {"b"}
    runs = events[-1]["runs"]
    assert [(one["student"], one["status"], one["steps"]) for one in runs] == [
        ("a", "finished", 2),
        ("b", "finished", 2),
    ]


def test_a_fault_in_the_middle_of_one_is_reported_and_the_next_begins(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.write("a", "b", rows=True)
    real = several.run

    def broken(config: Any, **options: Any) -> Any:
        if config.model.path == "a":
            raise ZeroDivisionError("a fault of ours")
        return real(config, **options)

    monkeypatch.setattr(several, "run", broken)
    code, output, errors = sweep.run("--json")
    assert code == 1
    assert "Traceback" in errors
    events = [json.loads(line) for line in output.splitlines()]
    assert [one["student"] for one in events if one["event"] == "failed"] == ["a"]
    one, other = events[-1]["runs"]
    assert (one["status"], one["error"]) == ("failed", "ZeroDivisionError: a fault of ours")
    assert (other["status"], other["error"]) == ("finished", None)


def test_quiet_is_a_line_for_each(sweep: Sweep) -> None:
    sweep.write("a", "./nowhere")
    code, output, errors = sweep.run("--quiet")
    assert code == EXIT_BAD_INPUT
    (line,) = output.splitlines()
    assert line.startswith("sweep-a: ")
    assert line.endswith("runs/sweep-a/adapter")
    assert errors.startswith("Unusable student model")


class Weights:
    """What a run loads."""


def test_what_a_failed_one_had_loaded_is_let_go_and_no_kind_of_fault_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[weakref.ref[Weights]] = []
    begun: list[str] = []

    def checked(config: Config, folder: Path) -> None:
        if config.model.path == "unreachable":
            raise TemporaryError("the disk is full")

    def trained(config: Config, **options: Any) -> Any:
        assert all(weights() is None for weights in loaded)
        begun.append(config.model.path)
        weights = Weights()
        loaded.append(weakref.ref(weights))
        try:
            raise RuntimeError("out of memory")
        except RuntimeError as error:
            raise RnowError("no room") from error

    monkeypatch.setattr(several, "check", checked)
    monkeypatch.setattr(several, "run", trained)
    outcomes = several.run_each(
        [
            Config(dataset_type="rl", model={"path": path, "name": "on-{model.path}"})
            for path in ("a", "unreachable", "b")
        ],
        folder=tmp_path,
        fresh=False,
        display=lambda config: nullcontext(QuietDisplay()),
        done=lambda config, summary: None,
        failed=lambda config, error: None,
    )
    assert begun == ["a", "b"]
    assert [outcome.name for outcome in outcomes] == ["on-a", "on-unreachable", "on-b"]
    assert [str(outcome.error) for outcome in outcomes] == [
        "no room",
        "the disk is full",
        "no room",
    ]


def test_check_shows_each_and_test_takes_one(sweep: Sweep) -> None:
    sweep.write("a", "b")
    code, output, errors = sweep.run("--json", command="check")
    assert code == 0, errors
    runs = json.loads(output)["runs"]
    assert [one["student"]["path"] for one in runs] == ["a", "b"]
    assert [Path(one["run_dir"]).name for one in runs] == ["sweep-a", "sweep-b"]
    sweep.write("a", "./nowhere", "b")
    code, output, errors = sweep.run("--json", command="check")
    assert code == EXIT_BAD_INPUT
    assert "there is no folder './nowhere'" in errors
    assert [one["student"]["path"] for one in json.loads(output)["runs"]] == ["a", "b"]
    code, _, errors = sweep.run(command="test")
    assert code == EXIT_BAD_INPUT
    assert "lists 3 students" in errors
    assert "-m a" in errors
