"""``run.log``: everything that was told, secrets apart, from before there was a folder to how it ended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rnow.disk.run_log import RunLog
from rnow.errors import InputError
from rnow.text.redact import Redactor


def test_what_is_told_is_kept_with_its_time(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    log = RunLog(Redactor({"TOKEN": "very-secret"}))
    log.display.warn("early very-secret")
    log.open(path)
    with log.kept():
        log.display.start(["student: tiny"])
        log.display.step(1, 2, {"teacher_kl": 0.5})
        log.display.step(2, 2, {"teacher_kl": 0.25})
        log.display.note("\x1b[31mred")
    lines = path.read_text().splitlines()
    assert lines[1] == "student: tiny"
    told = [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines]
    assert told[0] == "warning: early [TOKEN]"
    assert told[2].startswith("step 1/2  teacher_kl 0.500")
    assert told[3] == "step 2/2  teacher_kl 0.250"
    assert told[4] == r"\x1b[31mred"


def test_a_second_start_goes_on_below(tmp_path: Path) -> None:
    for word in ("first", "second"):
        log = RunLog(str)
        log.open(tmp_path / "run.log")
        log.display.note(word)
    assert [line.split()[-1] for line in (tmp_path / "run.log").read_text().splitlines()] == [
        "first",
        "second",
    ]


def test_how_it_ended_is_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    log = RunLog(str)
    log.open(path)

    def train(error: Exception) -> None:
        with log.kept():
            log.display.step(1, 9, {})
            log.display.step(2, 9, {})
            raise error

    with pytest.raises(InputError):
        train(InputError("no room", fix="make some"))
    assert path.read_text().endswith("Bad input: no room\n  fix: make some\n")
    assert "step 2/9" in path.read_text(), "the line that was held back"
    with pytest.raises(ZeroDivisionError):
        train(ZeroDivisionError("oops"))
    assert "a fault in rnow itself: ZeroDivisionError: oops" in path.read_text()


def test_a_disk_that_does_not_take_it_ends_nothing(tmp_path: Path) -> None:
    log = RunLog(str)
    log.open(tmp_path / "none" / "run.log")
    log.display.note("lost")
    assert not list(tmp_path.iterdir())
