"""What a run tells programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from tests.display.test_display import Clock

from rnow.display.display import Display
from rnow.display.downloads import Download
from rnow.display.events import Events
from rnow.errors import InputError, RnowError, StopRequested


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(told: list[dict[str, Any]], clock: Clock) -> Events:
    def write(event: Mapping[str, object]) -> None:
        told.append(dict(event))

    return Events(write, clock=clock, more={"student": "a"})


def test_each_event_says_what_when_and_of_which_run(
    events: Events, told: list[dict[str, Any]], clock: Clock
) -> None:
    clock.now = 12.3456
    display: Display = events
    display.start(["student: tiny (0.2M)", "run folder: runs/a: b", "no label"])
    display.stage("loading the student")
    display.stage("rollout")  # comes round every step
    display.stage("rollout")
    display.step(1, 3, {"teacher_kl": 0.5, "loss": math.nan})
    display.note("a note")
    display.warn("careful")
    display.evaluation("before", {"pass@1": 0.5})
    display.saved(1, "runs/a/checkpoints/step-000001")
    display.finish(["adapter: x"])
    display.close()
    events.finished({"steps": 3})
    assert {(event["time"], event["student"]) for event in told} == {(12.346, "a")}
    own = [{k: v for k, v in one.items() if k not in ("time", "student")} for one in told]
    plan = {"student": "tiny (0.2M)", "run folder": "runs/a: b", "no label": ""}
    assert own[0] == {"event": "plan", "plan": plan}
    assert own[1] == {"event": "stage", "stage": "loading the student"}
    step = own[2]
    assert (step["event"], step["step"], step["steps"]) == ("step", 1, 3)
    assert step["metrics"]["teacher_kl"] == 0.5
    assert own[3:] == [
        {"event": "note", "text": "a note"},
        {"event": "warning", "text": "careful"},
        {"event": "evaluation", "name": "before", "metrics": {"pass@1": 0.5}},
        {"event": "saved", "step": 1, "checkpoint": "runs/a/checkpoints/step-000001"},
        {"event": "finished", "exit_code": 0, "summary": {"steps": 3}},
    ]


def test_downloads_are_told_once_a_second_and_at_their_end(
    events: Events, told: list[dict[str, Any]], clock: Clock
) -> None:
    for quarter in range(9):
        clock.now = quarter / 4
        events.download(Download(name="org/m", done=quarter, total=100, rate=4.0))
    events.download(Download(name="org/m", done=100, total=100, rate=math.nan))
    assert [(one["bytes"], one["total"]) for one in told] == [(0, 100), (4, 100), (8, 100), (100, 100)]  # fmt: skip
    assert [one["seconds_left"] for one in told] == [25.0, 24.0, 23.0, 0.0]


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (InputError("bad", where="config.yml:3", fix="mend it", details=["a"]), "failed", 2),
        (RnowError("worse"), "failed", 1),
        (StopRequested(exit_code=143), "stopped", 143),
        (KeyboardInterrupt(), "stopped", 130),
        (ZeroDivisionError("a bug"), "failed", 1),
    ],
)
def test_how_it_ended(
    events: Events, told: list[dict[str, Any]], error: BaseException, event: str, code: int
) -> None:
    events.ended(error)
    (one,) = told
    assert (one["event"], one["exit_code"]) == (event, code)
    if isinstance(error, InputError):
        assert (one["message"], one["where"], one["fix"]) == ("bad", "config.yml:3", "mend it")
        assert one["details"] == ["a"]
    if isinstance(error, ZeroDivisionError):
        assert one["message"] == "ZeroDivisionError: a bug"
