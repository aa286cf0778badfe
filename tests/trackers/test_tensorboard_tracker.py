"""The event file holds every number once, as a 32-bit float, after any number of starts."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tests.trackers.fakes import files_of, record, tracked

from rnow.disk.folder import RunFolder
from rnow.trackers.records import read_history
from rnow.trackers.sink import TrackerSink
from rnow.trackers.tensorboard_tracker import TensorBoardTracker

pytest.importorskip("tensorboard")

Numbers = list[tuple[int, str, float]]


def events_in(folder: Path) -> Numbers:
    """Every scalar in the event files of a run, one by one, as they stand there."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    return sorted(
        (event.step, value.tag, value.simple_value)
        for file in (folder / "tensorboard").iterdir()
        for event in LegacyEventFileLoader(str(file)).Load()
        for value in event.summary.value
    )


def numbers_of(folder: Path) -> Numbers:
    """The same of the run's own files."""
    history = read_history(RunFolder(folder), before=float("inf"))
    return sorted(
        (one.step, name, float(np.float32(value)))
        for one in history.records
        for name, value in one.values.items()
    )


def attempt(folder: Path, *, first: int, last: int, offset: float = 0.0, end: bool = True) -> None:
    files = files_of(folder)
    sink = TrackerSink([TensorBoardTracker(tracked(folder))], RunFolder(folder), warn=pytest.fail)
    sink.forget_from(first)
    files.forget_from(first)
    record(files, sink, steps=range(first, last + 1), offset=offset)
    if end:
        sink.close(30.0)
    while not end and sink._workers[0]._waiting.unfinished_tasks:
        time.sleep(0.01)  # a killed process writes nothing more


def test_every_number_is_there_once(tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=4)
    assert len(numbers_of(tmp_path)) == 16
    assert events_in(tmp_path) == numbers_of(tmp_path)
    attempt(tmp_path, first=5, last=6)
    assert events_in(tmp_path) == numbers_of(tmp_path)


def test_after_a_kill_and_another_course(tmp_path: Path) -> None:
    attempt(tmp_path, first=1, last=6, end=False)
    attempt(tmp_path, first=4, last=7, offset=0.5)
    assert events_in(tmp_path) == numbers_of(tmp_path)
    attempt(tmp_path, first=6, last=6, offset=0.25)
    assert events_in(tmp_path) == numbers_of(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, (
        "an empty one stays until the next start"
    )


def test_tensorboard_shows_the_same(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempt(tmp_path, first=1, last=6)
    looking = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    looking.Reload()
    attempt(tmp_path, first=3, last=5, offset=0.5)
    looking.Reload()
    shown = sorted(
        (one.step, tag, one.value)
        for tag in looking.Tags()["scalars"]
        for one in looking.Scalars(tag)
    )
    assert shown == numbers_of(tmp_path), "one that was looking on forgets what was taken back"
