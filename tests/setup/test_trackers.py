"""Trackers beside whole runs: the numbers of metrics.jsonl, after a kill and a resume too; and what a config names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import Project, Watcher
from tests.trackers.fakes import not_installed, tracked

from rnow.cli.main import run_command_line
from rnow.config import dump_yaml
from rnow.disk.folder import RunFolder
from rnow.setup.build import run
from rnow.setup.trackers import build_trackers
from rnow.text.redact import Redactor
from rnow.trackers.records import Record, read_history
from rnow.trackers.wandb_tracker import COLUMNS, WandbTracker

MakeModel = Callable[..., Path]
SECRET = "hunter22"
SIX_STEPS: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"num_samples": 1, "max_prompts": 2, "teacher": False},
    "evals": [{"step": 2, "name": "often"}],
    "trainer": {"num_epochs": 2, "save_step": 2},
}

KILLED = """
import json, os, signal, sys
from pathlib import Path

import torch
from rnow.config import Config
from rnow.setup import build
from tests.setup.projects import Watcher

torch.set_num_threads(1)
watcher = Watcher().at("update", 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
build.run(Config(**json.loads(sys.argv[2])), folder=Path(sys.argv[1]), display=watcher)
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


def in_files(project: Project) -> list[Record]:
    return list(read_history(RunFolder(project.run_dir), before=float("inf")).records)


def kill_in_step_6(project: Project, **sections: Any) -> None:
    """Steps 1 to 5 are recorded, and the last checkpoint is that of step 4."""
    import json

    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(project.folder), json.dumps(project.values(**sections))],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [row["step"] for row in project.metrics] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_tensorboard_and_mlflow_after_a_kill(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    mlflow = pytest.importorskip("mlflow")
    from tests.trackers.test_tensorboard_tracker import events_in, numbers_of

    from rnow.trackers.mlflow_tracker import numbers

    address = (project.folder / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    sections = {**SIX_STEPS, "trackers": ["tensorboard", "mlflow"]}
    kill_in_step_6(project, **sections)
    watcher = Watcher()
    run(project.config(**sections), folder=project.folder, display=watcher)
    assert any("continuing after step 4" in note for note in watcher.notes)
    assert not [note for note in watcher.notes if "training goes on" in note]
    assert [row["step"] for row in project.metrics] == [1, 2, 3, 4, 5, 6]

    assert events_in(project.run_dir) == numbers_of(project.run_dir)
    client = mlflow.tracking.MlflowClient(tracking_uri=address)
    (shown,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert shown.info.status == "FINISHED"
    assert sorted(
        (name, one.value, one.step)
        for name in shown.data.metrics
        for one in client.get_metric_history(shown.info.run_id, name)
    ) == sorted(number for record in in_files(project) for number in numbers(record))


def test_a_run_whose_trackers_are_not_installed_is_the_same_run(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    not_installed(monkeypatch, "wandb", "tensorboard", "mlflow", "trackio")
    sections: dict[str, Any] = {
        "trackers": ["tensorboard", "mlflow", "trackio"],
        "wandb_project": "p",
        "trainer": {"max_steps": 1},
    }
    watcher = Watcher()
    summary = run(project.config(**sections), folder=project.folder, display=watcher)
    assert summary.values["steps"] == 1
    told = [note for note in watcher.notes if "is not installed" in note]
    assert len(told) == 4
    assert all("pip install" in note for note in told)
    (project.folder / "config.yml").write_text(dump_yaml(project.values(**sections)))
    assert run_command_line(["check", "-d", str(project.folder)]) == 0
    assert "trackers: mlflow is not installed" in " ".join(capsys.readouterr().out.split())


def test_rollouts_for_a_table_come_from_the_transcripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.training.test_recorder import Desk

    wandb: Any = types.ModuleType("wandb")
    wandb.Table = lambda **given: given
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    desk = Desk(tmp_path)
    desk.record(1)
    desk.recorder.settle()
    found: Any = WandbTracker(tracked(tmp_path), note=pytest.fail)._rollouts(1)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in found["rollouts"]["data"]]
    assert [(row["step"], row["status"], row["tokens"]) for row in rows] == [
        (1, "completed", 2),
        (1, "truncated", 2),
        (1, "failed", 2),
    ]


def test_what_trackers_are_told_holds_no_secret(tmp_path: Path) -> None:
    config = {
        "project_name": f"distill {SECRET}",
        "wandb_project": "mine",
        "wandb_name": None,
        "teacher": {"path": "big", "system_prompt": "the answer is 7", "template": "{context}"},
        "teachers": {"other": {"path": "b", "system_prompt": "it is 8"}},
    }
    sink = build_trackers(
        ["wandb", "mlflow"],
        RunFolder(tmp_path / "runs" / "one"),
        home=tmp_path,
        run_id="a",
        config=config,
        labels=config,
        warn=pytest.fail,
        note=pytest.fail,
        redact=Redactor({"KEY": SECRET}),
    )
    wandb, mlflow = (worker._tracker._tracked for worker in sink._workers)  # pyright: ignore
    assert (wandb.project, wandb.name) == ("mine", "one")
    assert (mlflow.project, mlflow.name) == ("distill [KEY]", "one")
    assert wandb.config == mlflow.config
    assert mlflow.config["teacher"] == {"path": "big"}
    assert mlflow.config["teachers"] == {"other": {"path": "b"}}
    sink.close(5.0)
