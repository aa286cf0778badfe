"""What can be told of a run from outside: from its folder, and from the process that holds it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rnow.disk.folder import RunFolder
from rnow.disk.runs import find_runs, is_run, read_state

WORKER = """
import sys, time
from pathlib import Path
from rnow.disk.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock(steps=10):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    return RunFolder(tmp_path / "runs" / "tiny")


def write_steps(folder: RunFolder, *rows: dict[str, Any]) -> None:
    lines = (json.dumps({"step": step, **row}) for step, row in enumerate(rows, start=1))
    folder.metrics.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def worker(folder: RunFolder) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_run_that_another_process_works_on(
    folder: RunFolder, worker: subprocess.Popen[str]
) -> None:
    first = {"time/step": 90.0, "teacher_kl": 0.9}
    write_steps(
        folder, first, {"time/step": 2.0, "teacher_kl": 0.5, "reward/mean": 1}, {"time/step": 4.0}
    )
    at = read_state(folder)
    assert (at.state, at.pid, at.step, at.steps) == ("running", worker.pid, 3, 10)
    assert (at.teacher_kl, at.loss, at.reward) == (0.5, None, 1)
    assert at.seconds_left == 7 * 3.0, "the first step warms up"
    assert time.time() - at.changed < 60
    worker.kill()
    worker.wait()
    at = read_state(folder)
    assert (at.state, at.pid, at.step, at.steps) == ("stopped", None, 3, 10)
    assert math.isnan(at.seconds_left)


def test_a_run_that_learns_from_rows_has_a_loss(folder: RunFolder) -> None:
    write_steps(folder, {"loss": 2.0}, {"loss": 1.5})
    at = read_state(folder)
    assert (at.teacher_kl, at.loss) == (None, 1.5)
    assert at.to_dict()["loss"] == 1.5


def test_a_process_of_that_number_that_does_something_else(folder: RunFolder) -> None:
    (folder.path / ".lock").touch()
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "steps": 5}
    folder.process.write_text(json.dumps(mine))
    assert read_state(folder).state == "stopped"
    with (folder.path / ".lock").open():
        assert read_state(folder).state == "running"


def test_a_process_of_another_user(
    folder: RunFolder, worker: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)
    assert read_state(folder).state == "running"
    worker.kill()
    worker.wait()
    assert read_state(folder).state == "stopped"


def test_a_run_that_was_asked_to_stop(folder: RunFolder, worker: subprocess.Popen[str]) -> None:
    assert not read_state(folder).stopping
    folder.tell_stopping()
    at = read_state(folder)
    assert (at.pid, at.steps, at.stopping) == (worker.pid, 10, True)
    worker.kill()
    worker.wait()
    assert not read_state(folder).stopping
    folder.process.unlink()
    folder.tell_stopping()
    assert not folder.process.exists(), "nobody works here"


def test_a_run_of_another_machine(folder: RunFolder) -> None:
    folder.process.write_text(json.dumps({"pid": os.getpid(), "host": "elsewhere.example"}))
    at = read_state(folder)
    assert (at.state, at.pid, at.host) == ("elsewhere", None, "elsewhere.example")


def test_a_finished_run_and_one_that_goes_on_after_it(folder: RunFolder) -> None:
    write_steps(folder, {}, {})
    folder.summary.write_text(json.dumps({"steps": 2}))
    at = read_state(folder)
    assert (at.state, at.step, at.steps) == ("finished", 2, 2)
    write_steps(folder, {}, {}, {})
    assert read_state(folder).state == "stopped"


def test_files_that_are_cut_or_missing_say_nothing(folder: RunFolder) -> None:
    at = read_state(folder)
    assert (at.state, at.step, at.steps, at.teacher_kl) == ("stopped", 0, None, None)
    folder.process.write_text('{"pid": "x", "steps"')
    folder.summary.write_text("[]")
    folder.metrics.write_text('{"step": 1, "teacher_kl": null, "time/step": null}\n{"step": 2')
    at = read_state(folder)
    assert (at.state, at.step, at.teacher_kl) == ("stopped", 1, None)
    assert json.loads(json.dumps(at.to_dict()))["seconds_left"] is None


def test_which_folders_are_runs(folder: RunFolder, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert find_runs(tmp_path / "none") == []
    assert find_runs(runs) == []
    with folder.lock():
        pass
    (runs / ".hidden").mkdir()
    (runs / "file").touch()
    (runs / "other").mkdir()
    assert [found.path.name for found in find_runs(runs)] == ["tiny"]
    assert not is_run(RunFolder(runs / "other"))


def test_a_folder_that_only_tells_who_locked_it_is_bare(folder: RunFolder) -> None:
    with folder.lock(steps=3):
        assert json.loads(folder.process.read_text())["steps"] == 3
    folder.remove_if_bare()
    assert not folder.path.exists()
