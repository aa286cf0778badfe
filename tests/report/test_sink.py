"""The page is written beside a run, seldom, at its end too, and never ends it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import data_of, make_run, metrics_row, write_lines

from rnow.disk.folder import RunFolder
from rnow.report import sink as sink_module
from rnow.report.sink import EVERY_SECONDS, SHARE, ReportSink


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Desk:
    def __init__(self, path: Path) -> None:
        self.folder = make_run(path, steps=1)
        self.clock, self.warnings = Clock(), list[str]()
        self.sink = ReportSink(self.folder, warn=self.warnings.append, clock=self.clock)

    def step(self, step: int, *, later: float = 0.0) -> None:
        """A step that ends ``later`` seconds after now, and whatever is written then."""
        self.clock.now += later
        write_lines(self.folder.metrics, [metrics_row(s, step) for s in range(1, step + 1)])
        self.sink.log(step, {})
        self.wait()

    def wait(self) -> None:
        if self.sink._thread is not None:
            self.sink._thread.join(30)

    @property
    def steps(self) -> list[int]:
        return data_of(self.folder.report.read_bytes())["steps"]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "run")


def test_a_quick_run_is_written_at_its_end(desk: Desk) -> None:
    desk.step(1, later=1)
    desk.step(2, later=1)
    assert not desk.folder.report.exists()
    desk.sink.close(30)
    assert desk.steps == [1, 2]
    assert desk.warnings == []


def test_a_slow_run_is_written_step_by_step(desk: Desk) -> None:
    desk.step(1, later=EVERY_SECONDS + 1)
    assert desk.steps == [1]
    desk.step(2, later=1)
    assert desk.steps == [1]
    desk.step(3, later=EVERY_SECONDS + 1)
    assert desk.steps == [1, 2, 3]


def test_writing_takes_a_small_share_of_the_time(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def slow(folder: RunFolder, **options: Any) -> None:
        nonlocal count
        count += 1
        desk.clock.now += 5.0

    monkeypatch.setattr(sink_module, "write_report", slow)
    for step in range(1, 1001):
        desk.clock.now += 10.0
        desk.sink.log(step, {})
        desk.wait()
    assert count * 5.0 <= SHARE * (desk.clock.now - 100.0) + 5.0
    assert count > 5


def test_a_run_does_not_wait_for_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    going, done = threading.Event(), threading.Event()

    def stuck(folder: RunFolder, **options: Any) -> None:
        going.set()
        done.wait(30)

    monkeypatch.setattr(sink_module, "write_report", stuck)
    desk.clock.now += EVERY_SECONDS
    desk.sink.log(1, {})
    assert going.wait(30)
    desk.clock.now += 1000
    desk.sink.log(2, {})
    desk.sink.evaluated("after", 2, {})
    desk.sink.close(0.05)
    assert not done.is_set()
    done.set()
    desk.wait()


def test_what_goes_wrong_is_told_once_and_ends_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(folder: RunFolder, **options: Any) -> None:
        raise ValueError("no such column")

    monkeypatch.setattr(sink_module, "write_report", broken)
    for step in range(1, 5):
        desk.step(step, later=EVERY_SECONDS + 1)
    desk.sink.close(30)
    (warning,) = desk.warnings
    assert "no such column" in warning
    assert "rnow report run" in warning


def test_a_run_without_a_thread_to_spare_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for step in (1, 2):
        desk.clock.now += EVERY_SECONDS + 1
        desk.sink.log(step, {})
    desk.sink.close(30)
    (warning,) = desk.warnings
    assert "can't start new thread" in warning


def test_a_folder_that_is_gone_is_no_matter(tmp_path: Path) -> None:
    warnings: list[str] = []
    sink = ReportSink(RunFolder(tmp_path / "gone"), warn=warnings.append)
    sink.forget_from(1)
    sink.log(1, {})
    sink.close(30)
    assert warnings == []
    assert not (tmp_path / "gone").exists()
