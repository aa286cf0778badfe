"""What trackers are told: the numbers of the run's files, in the order in which they were recorded."""

from __future__ import annotations

from pathlib import Path

from tests.trackers.fakes import files_of, record

from rnow.disk.folder import RunFolder
from rnow.trackers.records import (
    History,
    Record,
    evaluation_record,
    read_history,
    step_record,
)


def test_a_record_holds_finite_numbers_only() -> None:
    made = step_record(3, {"loss": float("nan"), "lr": 1e-4, "tokens/total": 7})
    assert made == Record(step=3, values={"lr": 1e-4, "tokens/total": 7.0})
    assert evaluation_record("after", 3, {"pass@1": 0.5}).values == {"eval/after/pass@1": 0.5}


def test_the_history_is_what_was_recorded(tmp_path: Path) -> None:
    files = files_of(tmp_path)
    files.evaluated("before", 0, {"pass@1": 0.25})
    record(files, steps=range(1, 4))
    history = read_history(RunFolder(tmp_path), before=3)
    assert history.taken_back
    assert [one.step for one in history.records] == [0, 1, 2, 2]
    assert history.records[0].values == {"eval/before/pass@1": 0.25}
    assert history.records[2].values == {
        "teacher_kl": 0.5,
        "teacher_kl/math": 0.2,
        "reward/mean": 2.0,
    }
    assert history.records[3].values == {"eval/often/pass@1": 0.25, "eval/often/teacher_kl": 0.3}
    assert not read_history(RunFolder(tmp_path), before=4).taken_back


def test_a_run_that_begins_has_none(tmp_path: Path) -> None:
    assert read_history(RunFolder(tmp_path), before=1) == History(records=[], taken_back=False)
