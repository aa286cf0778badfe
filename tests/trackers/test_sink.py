"""The sink of trackers: nothing that one of them does ends, slows or garbles a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.trackers.fakes import files_of, record

from rnow.disk.folder import RunFolder
from rnow.text.redact import Redactor
from rnow.trackers import sink as sinks
from rnow.trackers.records import History, Record
from rnow.trackers.sink import TrackerSink


class Scripted:
    """A tracker that keeps what it is told, and does something else where told to."""

    title, extra = "A tracker", "wandb"

    def __init__(self, at: str = "", does: Callable[[], object] | None = None) -> None:
        self._at, self._does = at, does
        self.records: list[Record] = []
        self.ended = False

    def begin(self, history: History) -> None:
        self._reach("begin")
        self.records = list(history.records)

    def send(self, record: Record) -> None:
        self._reach("send")
        self.records.append(record)

    def finish(self) -> None:
        self._reach("finish")
        self.ended = True

    def _reach(self, where: str) -> None:
        if where == self._at and self._does is not None:
            self._does()


def fail(error: BaseException) -> Callable[[], object]:
    def raises() -> None:
        raise error

    return raises


def make(tmp_path: Path, *trackers: Scripted, warn: Callable[[str], None]) -> TrackerSink:
    return TrackerSink(trackers, RunFolder(tmp_path), warn=warn)


def test_every_tracker_is_told_everything_in_order(tmp_path: Path) -> None:
    files, trackers = files_of(tmp_path), (Scripted(), Scripted())
    record(files, steps=range(1, 3))
    sink = make(tmp_path, *trackers, warn=pytest.fail)
    sink.forget_from(2)
    files.forget_from(2)
    record(files, sink, steps=range(2, 4))
    sink.close(10.0)
    sink.close(10.0)
    for tracker in trackers:
        assert [one.step for one in tracker.records] == [1, 2, 2, 3]
        assert tracker.ended


def test_one_that_was_never_begun_is_not_finished(tmp_path: Path) -> None:
    tracker = Scripted()
    make(tmp_path, tracker, warn=pytest.fail).close(10.0)
    assert not tracker.ended


def test_secrets_are_taken_out_of_names(tmp_path: Path) -> None:
    tracker = Scripted()
    redact = Redactor({"KEY": "hunter22"})
    sink = TrackerSink([tracker], RunFolder(tmp_path), warn=pytest.fail, redact=redact)
    sink.forget_from(1)
    sink.log(1, {"reward/hunter22": 0.5})
    sink.evaluated("hunter22", 1, {"pass@1": 0.5})
    sink.close(10.0)
    names = [name for one in tracker.records for name in one.values]
    assert names == ["reward/[KEY]", "eval/[KEY]/pass@1"]


@pytest.mark.parametrize("where", ["begin", "send", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no such project\nreally"), SystemExit(3)])
def test_one_that_fails_gives_one_warning_and_the_others_go_on(
    tmp_path: Path, where: str, error: BaseException
) -> None:
    warnings: list[str] = []
    bad, good = Scripted(where, fail(error)), Scripted()
    sink = make(tmp_path, bad, good, warn=warnings.append)
    sink.forget_from(1)
    record(sink, steps=range(1, 4))
    sink.close(10.0)
    assert len(good.records) == 4
    (warning,) = warnings
    assert "training goes on" in warning
    assert f"`rnow track {tmp_path}`" in warning
    assert "\n" not in warning


def test_one_that_is_not_installed_says_what_to_type(tmp_path: Path) -> None:
    warnings: list[str] = []
    trackers = [
        Scripted("begin", fail(ModuleNotFoundError("No module named 'wandb'", name="wandb"))),
        Scripted("begin", fail(ModuleNotFoundError("No module named 'click'", name="click"))),
    ]
    sink = make(tmp_path, *trackers, warn=warnings.append)
    sink.forget_from(1)
    sink.log(1, {"loss": 1.0})
    sink.close(10.0)
    missing, broken = sorted(warnings, key=lambda text: "cannot be loaded" in text)
    assert "is not installed" in missing
    assert "pip install" in missing
    assert "cannot be loaded (No module named 'click')" in broken


@pytest.mark.parametrize("hangs", ["begin", "send", "finish"])
def test_one_that_does_not_come_back_holds_up_nobody(tmp_path: Path, hangs: str) -> None:
    warnings: list[str] = []
    never = threading.Event()
    hanging, good = Scripted(hangs, lambda: never.wait(60)), Scripted()
    sink = make(tmp_path, hanging, good, warn=warnings.append)
    began = time.monotonic()
    sink.forget_from(1)
    record(sink, steps=range(1, 4))
    sink.close(0.3)
    record(sink, steps=range(4, 5))
    sink.close(0.3)
    assert time.monotonic() - began < 5
    assert good.ended
    assert len(warnings) == 1
    assert "did not finish: no answer in 0.3 s" in warnings[0]
    never.set()
    sink._workers[0].thread.join(10)
    assert len(warnings) == 1, "what comes later is not told"


def test_without_a_thread_to_spare_there_is_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    warnings: list[str] = []
    sink = make(tmp_path, Scripted(), warn=warnings.append)
    sink.forget_from(1)
    record(sink, steps=range(1, 3))
    sink.close(1.0)
    assert len(warnings) == 1
    assert "can't start new thread" in warnings[0]


def test_the_user_is_told_of_one_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "SILENT_SECONDS", 0.0)
    warnings: list[str] = []
    never = threading.Event()
    sink = make(tmp_path, Scripted("begin", lambda: never.wait(60)), warn=warnings.append)
    sink.forget_from(1)
    time.sleep(0.01)
    record(sink, steps=range(1, 4))
    assert [text for text in warnings if "has not answered yet" in text] == warnings
    assert len(warnings) == 1
    never.set()
    sink.close(10.0)


def test_more_records_than_can_wait_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "MAX_UNSENT", 3)
    warnings: list[str] = []
    never = threading.Event()
    sink = make(tmp_path, Scripted("send", lambda: never.wait(60)), warn=warnings.append)
    sink.forget_from(1)
    record(sink, steps=range(1, 10))
    assert len(warnings) == 1
    assert "3 records are not sent" in warnings[0]
    sink.close(60.0)
    never.set()


def test_a_password_in_an_address_is_not_shown(tmp_path: Path) -> None:
    warnings: list[str] = []
    error = RuntimeError("cannot reach https://ann:hunter22@tracker.test/api")
    sink = make(tmp_path, Scripted("begin", fail(error)), warn=warnings.append)
    sink.forget_from(1)
    sink.close(10.0)
    assert "https://tracker.test/api" in warnings[0]
    assert "hunter22" not in warnings[0]
