"""A comparison as one HTML file, drawn as a run's report is: curves over each other, nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from rnow.comparing.compared import Comparison
from rnow.comparing.evaluations import Measured
from rnow.comparing.runs import Course, thinned
from rnow.config.overrides import show
from rnow.config.teachers import TOLD_TO_TEACHERS, without_told
from rnow.report.curves import rounded
from rnow.report.page import render
from rnow.report.text import MESSAGE, safe
from rnow.training.intervals import HOW, Interval

POINTS = 300
"""At most so many points of a curve."""


def compare_page(found: Comparison) -> bytes:
    """The whole page."""
    count = max(1, min(POINTS, found.end))
    data: dict[str, object] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [{"label": safe(run.label), "steps": run.steps} for run in found.runs],
        # Of each part of the steps the last one; see ``thinned``.
        "steps": [-(-(part + 1) * found.end // count) for part in range(count)],
        "width": math.ceil(found.end / count),
        "charts": [_chart(found, name, courses, count) for name, courses in found.courses.items()],
        "courses": [*_course_rows(found)],
        "evaluations": [*_measured_rows(found)],
        "how": HOW,
        "settings": [
            {"key": safe(key), "values": [_setting(key, value) for value in values]}
            for key, values in found.settings.items()
        ],
        "contents": [safe(what) for what in found.contents],
    }
    return render(data, title="Runs side by side", kind="compare")


def _setting(key: str, value: object) -> str:
    """A page is passed on: what teachers alone are told stays out of it."""
    if value is not None and key.rpartition(".")[2] in TOLD_TO_TEACHERS:
        return "(set, and not shown here)"
    return safe(show(without_told(value)), MESSAGE)


def _chart(
    found: Comparison, name: str, courses: Sequence[Course | None], count: int
) -> dict[str, object]:
    """The curves of one metric. A run without it has one too, of nothing, so that the next run keeps its colour."""
    series = [
        {
            "label": safe(run.label),
            "values": [None] * count if one is None else _points(one, found.end, count),
        }
        for run, one in zip(found.runs, courses, strict=True)
    ]
    return {"title": safe(name), "unit": "", "about": "", "series": series}


def _points(one: Course, end: int, count: int) -> list[float | None]:
    return [
        rounded(value) if math.isfinite(value) else None
        for value in thinned(one, end=end, count=count)
    ]


def _course_rows(found: Comparison) -> Iterator[dict[str, object]]:
    for name, courses in found.courses.items():
        for run, one in zip(found.runs, courses, strict=True):
            if one is not None:
                best = None if one.best is None else {"step": one.best[0], "value": one.best[1]}
                row: dict[str, object] = {"metric": safe(name), "run": safe(run.label)}
                yield row | {"first": one.first, "last": one.last, "best": best}


def _measured_rows(found: Comparison) -> Iterator[dict[str, object]]:
    for name, row in found.measured.items():
        yield {
            "name": safe(name),
            "runs": [_measured(one) for one in row],
            "minusFirst": [_interval(one) for one in found.differences(name)],
        }


def _measured(one: Measured | None) -> dict[str, float] | None:
    if one is None:
        return None
    return {"mean": rounded(one.value)} | (_interval(one.interval) or {})


def _interval(one: Interval | None) -> dict[str, float] | None:
    if one is None:
        return None
    return {"mean": rounded(one.mean), "low": rounded(one.low), "high": rounded(one.high)}
