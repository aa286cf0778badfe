"""MLflow has the numbers of the run's files, no others and each once, after any number of starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trackers.fakes import files_of, record, tracked

from rnow.disk.folder import RunFolder
from rnow.trackers.mlflow_tracker import MlflowTracker, flat, metric_name
from rnow.trackers.mlflow_tracker import numbers as numbers_in
from rnow.trackers.records import read_history
from rnow.trackers.sink import TrackerSink


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("teacher_kl", "train/teacher_kl"),
        ("teacher_kl/math", "teacher_kl/math"),
        ("teacher_kl/teacher/big one", "teacher_kl/teacher.big one"),
        ("tools/calls_per_rollout", "tools/calls_per_rollout"),
        ("tools/calls_per_rollout/math", "tools/calls_per_rollout.math"),
        ("eval/after/pass@1", "eval/after.pass_at_1"),
        ("eval/after/teacher_kl/math", "eval/after.teacher_kl.math"),
        ("reward/à la $", "reward/à la _"),
    ],
)
def test_names_are_those_that_mlflow_takes(name: str, shown: str) -> None:
    assert metric_name(name) == shown


def test_a_config_is_flat() -> None:
    config = {"seed": 0, "teacher": None, "data": {"files": ["a", "b"], "shuffle": True}}
    assert list(flat(config)) == [
        ("seed", "0"),
        ("data.files", '["a", "b"]'),
        ("data.shuffle", "true"),
    ]


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A client of a store in an empty folder: of files, or by the test's parameter a database, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    patch = pytest.MonkeyPatch()
    if getattr(request, "param", "file") == "sqlite":
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    else:
        # Since 3.13 a store of files has to be asked for.
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        address = (tmp_path / "mlruns").as_uri()
        patch.setenv("MLFLOW_TRACKING_URI", address)
    patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    yield mlflow.tracking.MlflowClient(tracking_uri=address)
    patch.undo()


def runs(client: Any) -> list[Any]:
    return client.search_runs([client.get_experiment_by_name("project").experiment_id])


def shown(client: Any) -> list[tuple[str, float, int]]:
    """Every number of the only run."""
    (run,) = runs(client)
    return sorted(
        (name, one.value, one.step)
        for name in run.data.metrics
        for one in client.get_metric_history(run.info.run_id, name)
    )


def in_files(folder: Path) -> list[tuple[str, float, int]]:
    records = read_history(RunFolder(folder), before=float("inf")).records
    return sorted(number for one in records for number in numbers_in(one))


def attempt(folder: Path, *, first: int, last: int, offset: float = 0.0) -> None:
    files = files_of(folder)
    sink = TrackerSink(
        [MlflowTracker(tracked(folder), note=pytest.fail)], RunFolder(folder), warn=pytest.fail
    )
    sink.forget_from(first)
    files.forget_from(first)
    record(files, sink, steps=range(first, last + 1), offset=offset)
    sink.close(120.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


@pytest.mark.slow
def test_every_number_is_there_once(client: Any, folder: Path) -> None:
    (folder / "report.html").write_text("<p>how it went</p>")
    attempt(folder, first=1, last=3)
    (first,) = runs(client)
    assert len(in_files(folder)) == 11
    assert shown(client) == in_files(folder)
    assert first.data.params["trainer.learning_rate"] == "0.0001"
    assert first.info.run_name == "run"
    assert first.info.status == "KILLED", "it did not come to its end"
    assert {one.path for one in client.list_artifacts(first.info.run_id)} == {
        "config.json",
        "report.html",
    }
    (folder / "summary.json").write_text("{}")
    attempt(folder, first=4, last=5)
    (again,) = runs(client)
    assert again.info.run_id == first.info.run_id
    assert again.info.status == "FINISHED"
    assert shown(client) == in_files(folder)


@pytest.mark.slow
@pytest.mark.parametrize("client", ["file", "sqlite"], indirect=True)
def test_what_was_taken_back_is_not_shown(client: Any, folder: Path) -> None:
    attempt(folder, first=1, last=4)
    (first,) = runs(client)
    attempt(folder, first=3, last=5, offset=0.5)
    (again,) = runs(client)
    assert again.info.run_id != first.info.run_id
    assert shown(client) == in_files(folder)


@pytest.mark.slow
def test_what_mlflow_lost_is_sent(client: Any, folder: Path) -> None:
    attempt(folder, first=1, last=2)
    record(files_of(folder), steps=range(3, 5))
    attempt(folder, first=5, last=5)
    assert shown(client) == in_files(folder)
