"""trackio's database holds the run as its files do, and the runs of others stay."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trackers.fakes import files_of, record, tracked

from rnow.disk.folder import RunFolder
from rnow.trackers.records import read_history
from rnow.trackers.sink import TrackerSink
from rnow.trackers.trackio_tracker import KEY, TrackioTracker


class Database:
    """What trackio keeps of one project. It stands in for the module."""

    def __init__(self) -> None:
        self.kept: list[DatabaseRun] = []

    def init(self, *, project: str, name: str, config: dict[str, Any], **options: Any) -> Any:
        sys.stdout.write("* Trackio project initialized\n")
        assert name not in [run.name for run in self.kept]
        self.kept.append(DatabaseRun(self, name, config))
        return self.kept[-1]

    def runs(self, project: str) -> Iterator[DatabaseRun]:
        if not self.kept:
            raise ValueError(f"Project '{project}' does not exist")
        return iter(self.kept)


class DatabaseRun:
    def __init__(self, database: Database, name: str, config: dict[str, Any]) -> None:
        self._database, self.name, self.config = database, name, config
        self.rows: list[dict[str, float]] = []
        self.finished = False

    def log(self, metrics: dict[str, float], *, step: int) -> None:
        self.rows.append({"step": step, **metrics})

    def delete(self) -> None:
        self._database.kept.remove(self)

    def finish(self) -> None:
        sys.stdout.write("* Run finished\n")
        self.finished = True


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    made = Database()
    module: Any = types.ModuleType("trackio")
    module.init, module.Api = made.init, lambda: made
    monkeypatch.setitem(sys.modules, "trackio", module)
    return made


def attempt(folder: Path, *, first: int, last: int, offset: float = 0.0, **changes: Any) -> None:
    files = files_of(folder)
    tracker = TrackioTracker(tracked(folder, **changes))
    sink = TrackerSink([tracker], RunFolder(folder), warn=pytest.fail)
    sink.forget_from(first)
    files.forget_from(first)
    record(files, sink, steps=range(first, last + 1), offset=offset)
    sink.close(60.0)


def in_files(folder: Path) -> list[dict[str, float]]:
    records = read_history(RunFolder(folder), before=float("inf")).records
    return [{"step": one.step, **one.values} for one in records]


def test_a_run_is_written_anew(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(tmp_path, first=1, last=5)
    attempt(tmp_path, first=3, last=6, offset=0.5)
    (run,) = database.kept
    assert (run.name, run.finished) == ("run", True)
    assert run.rows == in_files(tmp_path)
    assert capsys.readouterr().out == "", "it says nothing on the terminal of a run"


def test_another_run_of_the_same_name_stays(database: Database, tmp_path: Path) -> None:
    for name, run_id in (("one", "a" * 16), ("other", "b" * 16)):
        (tmp_path / name).mkdir()
        attempt(tmp_path / name, first=1, last=2, id=run_id)
    assert [run.name for run in database.kept] == ["run", "run-bbbbbb"]
    attempt(tmp_path / "other", first=2, last=3, id="b" * 16)
    assert [len(run.rows) for run in database.kept] == [3, 4]


@pytest.mark.slow
def test_the_real_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    attempt(tmp_path, first=1, last=5)
    attempt(tmp_path, first=3, last=6, offset=0.5)
    (run,) = trackio.Api().runs("project")
    assert run.config[KEY] == "0123456789abcdef"
    shown = SQLiteStorage.get_logs("project", "run")
    for row in shown:
        del row["timestamp"]
    assert shown == in_files(tmp_path)
