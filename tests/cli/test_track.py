"""`rnow track`: what a run's files hold, sent to a tracker afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from tests.trackers.fakes import not_installed

from rnow.cli import track
from rnow.cli.main import run_command_line
from rnow.config.schema import TrackerName
from rnow.errors import EXIT_BAD_INPUT, EXIT_FAILED

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rnow_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command_line(["track", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return call


def make_run(folder: Path, **config: object) -> Path:
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    rows = [{"step": step, "teacher_kl": 1 / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "run.json").write_text(json.dumps({"run": "a" * 16, "config": config}))
    return run


def test_there_are_no_others() -> None:
    assert set(track.TRACKERS) == set(get_args(TrackerName))


def test_a_run_is_sent(rnow_: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.trackers.test_tensorboard_tracker import events_in, numbers_of

    run = make_run(tmp_path)
    code, output, errors = rnow_("one", "--to", "tensorboard")
    assert code == 0, errors
    assert "3 steps are in tensorboard" in output
    assert events_in(run) == numbers_of(run)
    assert len(events_in(run)) == 3


def test_the_config_says_where_to(
    rnow_: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_installed(monkeypatch, "wandb", "mlflow")
    make_run(tmp_path, trackers=["mlflow"], wandb_project="p")
    code, _, errors = rnow_("one")
    assert code == EXIT_FAILED
    assert "MLflow is not installed" in errors
    assert "Weights & Biases is not installed" in errors
    assert "2 of 2 trackers do not have the run" in errors
    assert "training" not in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one"], "names no tracker"),
        (["one", "--to", "comet"], "'comet' is no tracker"),
        (["other"], "there is no run 'other'"),
    ],
)
def test_what_is_refused(rnow_: Run, tmp_path: Path, arguments: list[str], said: str) -> None:
    make_run(tmp_path)
    code, _, errors = rnow_(*arguments)
    assert code == EXIT_BAD_INPUT
    assert said in errors
