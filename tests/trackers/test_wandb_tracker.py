"""Weights & Biases: one row for each record, and a new W&B run where rows would have to be taken back."""

from __future__ import annotations

import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from tests.trackers.fakes import files_of, record, tracked

from rnow.disk import transcript_rows
from rnow.disk.folder import RunFolder
from rnow.trackers.sink import TrackerSink
from rnow.trackers.wandb_tracker import WandbTracker, has_wandb_key, rollout_table

KEY = "k" * 40


class Service:
    """What W&B's server has: the rows of each run by its id. It stands in for the module ``wandb``."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.started: list[dict[str, Any]] = []
        self.summaries: dict[str, dict[str, Any]] = {}
        self.artifacts: list[tuple[str, str]] = []
        self.finished: list[str] = []

    def init(self, **arguments: Any) -> ServiceRun:
        self.started.append(arguments)
        offline = arguments["mode"] == "offline"
        place = f"offline-{len(self.started)}" if offline else arguments["id"]
        return ServiceRun(self, place)


class ServiceRun:
    def __init__(self, service: Service, place: str) -> None:
        self._service = service
        self.id = place
        self._rows = service.rows.setdefault(place, [])
        self.summary = service.summaries.setdefault(place, {})
        self.starting_step = len(self._rows)

    def define_metric(self, name: str, **options: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.summary.update(row)

    def log_artifact(self, artifact: Artifact) -> None:
        self._service.artifacts.append((artifact.kind, artifact.path))

    def finish(self) -> None:
        self._service.finished.append(self.id)


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.kind, self.path = type, ""

    def add_file(self, path: str) -> None:
        self.path = path


class Settings:
    base_url = "https://wandb.test"

    def __init__(self, **settings: Any) -> None: ...


class Table:
    def __init__(self, *, columns: list[str], data: list[list[object]]) -> None:
        self.columns, self.data = columns, data


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()
    module: Any = types.ModuleType("wandb")
    module.Settings, module.Table, module.Artifact, module.init = (
        Settings,
        Table,
        Artifact,
        made.init,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("NETRC", os.devnull)
    return made


def sink_of(folder: Path, notes: list[str] | None = None) -> TrackerSink:
    told = notes if notes is not None else []
    tracker = WandbTracker(tracked(folder), note=told.append)
    return TrackerSink([tracker], RunFolder(folder), warn=pytest.fail)


def attempt(folder: Path, *, first: int, last: int, offset: float = 0.0) -> None:
    """One start of the run, from one step to another."""
    files, sink = files_of(folder), sink_of(folder)
    sink.forget_from(first)
    files.forget_from(first)
    record(files, sink, steps=range(first, last + 1), offset=offset)
    sink.close(10.0)


def assert_like_the_files(folder: Path, rows: list[dict[str, Any]]) -> None:
    from rnow.trackers.records import read_history

    history = read_history(RunFolder(folder), before=float("inf"))
    assert [{"step": one.step, **one.values} for one in history.records] == rows


def test_a_run_begins_with_what_the_project_says(service: Service, tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=3)
    (given,) = service.started
    assert (given["project"], given["name"], given["mode"]) == ("project", "run", None)
    assert (given["id"], given["resume"]) == (RunFolder(tmp_path).wandb_id(), "allow")
    assert given["config"]["trainer"] == {"learning_rate": 1e-4}
    assert_like_the_files(tmp_path, service.rows[given["id"]])
    assert service.finished == [given["id"]]


def test_a_run_that_goes_on_at_its_end_is_the_same(service: Service, tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=3)
    attempt(tmp_path, first=4, last=6)
    (only,) = service.rows
    assert_like_the_files(tmp_path, service.rows[only])


def test_what_wandb_lost_is_sent(service: Service, tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=4)
    (only,) = service.rows
    del service.rows[only][2:]
    attempt(tmp_path, first=5, last=6)
    assert list(service.rows) == [only]
    assert_like_the_files(tmp_path, service.rows[only])


def test_what_was_taken_back_is_not_shown(service: Service, tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=6)
    attempt(tmp_path, first=4, last=7, offset=0.5)
    old, new = service.rows
    assert RunFolder(tmp_path).wandb_id() == new
    assert_like_the_files(tmp_path, service.rows[new])
    assert old in service.started[1]["notes"]


def test_rows_that_the_files_never_had_are_not_kept(service: Service, tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=3)
    (old,) = service.rows
    service.rows[old] += service.rows[old]
    attempt(tmp_path, first=4, last=4)
    assert len(service.rows) == 2
    assert_like_the_files(tmp_path, service.rows[RunFolder(tmp_path).wandb_id()])


def test_rows_of_an_earlier_version_are_not_counted(service: Service, tmp_path: Path) -> None:
    record(files_of(tmp_path), steps=range(1, 4))
    old = RunFolder(tmp_path).wandb_id()
    service.rows[old] = [{"teacher_kl": 1.0}] * 3
    attempt(tmp_path, first=4, last=4)
    new = RunFolder(tmp_path).wandb_id()
    assert new != old
    assert_like_the_files(tmp_path, service.rows[new])


def test_without_a_key_each_recording_is_whole(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    notes: list[str] = []
    files, sink = files_of(tmp_path), sink_of(tmp_path, notes)
    sink.forget_from(1)
    record(files, sink, steps=range(1, 4))
    sink.close(10.0)
    assert service.started[0]["mode"] == "offline"
    assert len(notes) == 1
    assert "wandb sync" in notes[0]
    attempt(tmp_path, first=4, last=6)
    assert service.started[0]["id"] != service.started[1]["id"]
    assert_like_the_files(tmp_path, service.rows["offline-2"])


def test_the_mode_of_the_user_wins(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    notes: list[str] = []
    sink = sink_of(tmp_path, notes)
    sink.forget_from(1)
    sink.close(10.0)
    assert service.started[0]["mode"] == "disabled"
    assert notes == []


def test_rollouts_and_the_report_are_shown(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def read_step(path: Path, choose: Any) -> list[object]:
        read.append(path.name)
        assert not choose([row(path.name)]), "no list of tokens is read"
        return []

    monkeypatch.setattr(transcript_rows, "read_step", read_step)
    transcripts = tmp_path / "transcripts"
    transcripts.mkdir()
    for step in range(1, 13):
        (transcripts / f"step-{step:06d}.parquet").touch()
    (tmp_path / "report.html").write_text("<p>how it went</p>")
    attempt(tmp_path, first=1, last=12)
    assert [int(name[5:11]) for name in read] == [1, 10, 12]
    (rows,) = service.rows.values()
    shown = {row["step"]: row["rollouts"] for row in rows if "rollouts" in row}
    assert sorted(shown) == [2, 11], "with the next record: a row of its own would be counted"
    assert shown[11].data[0][1] == "step-000010.parquet"
    (summary,) = service.summaries.values()
    assert summary["rollouts"].data[0][1] == "step-000012.parquet"
    assert service.artifacts == [("report", str(tmp_path / "report.html"))]


def row(name: str) -> dict[str, Any]:
    return {
        "step": 3,
        "id": name,
        "messages": [{"role": "user", "content": "How many?"}],
        "answer": [
            {"role": "assistant", "content": "", "tool_calls": [{"name": "count"}]},
            {"role": "tool", "content": "7"},
            {"role": "assistant", "content": "x" * 3000},
        ],
        "reward": 1.0,
        "teacher_kl": 0.5,
        "status": "completed",
        "completion_tokens": 9,
    }


def test_a_table_holds_few_and_short_rollouts() -> None:
    table = rollout_table([row("a")] * 40)
    assert len(table) == 32
    step, name, prompt, answer, *rest = table[0]
    assert (step, name, prompt) == (3, "a", "[user] How many?")
    assert str(answer).startswith('[assistant] [{"name": "count"}]\n[tool] 7\n[assistant] xxx')
    assert len(str(answer)) < 2100
    assert rest == [1.0, 0.5, "completed", 9]


@pytest.mark.parametrize(
    ("netrc", "found"),
    [
        ("machine wandb.test login user password secret\n", True),
        ("machine other.test login user password secret\n", False),
        ("not a netrc file", False),
        ("", False),
    ],
)
def test_key_in_netrc(tmp_path: Path, netrc: str, found: bool) -> None:
    path = tmp_path / "netrc"
    path.write_text(netrc)
    path.chmod(0o600)
    assert has_wandb_key("https://wandb.test", {"NETRC": str(path)}) is found


@pytest.mark.slow
def test_real_wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(transcript_rows, "read_step", lambda path, choose: choose([row(path.name)]))
    (tmp_path / "transcripts").mkdir()
    (tmp_path / "transcripts" / "step-000003.parquet").touch()
    (tmp_path / "report.html").write_text("<p>how it went</p>")
    attempt(tmp_path, first=1, last=3)
    attempt(tmp_path, first=3, last=4)
    recorded = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 2
    # W&B's own process writes the end of a recording after it was finished.
    deadline = time.monotonic() + 30
    for file in recorded:
        while b"eval/often/pass@1" not in file.read_bytes():
            assert time.monotonic() < deadline, file
            time.sleep(0.1)
