"""The page of a comparison: all runs in every chart in one order, and hostile text inert. tests/report has what holds of every page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.comparing.folders import evaluate, make_run
from tests.report.runs import data_of

from rnow.comparing.compared import compare
from rnow.comparing.page import POINTS, compare_page
from rnow.comparing.runs import read_runs

HOSTILE = '<script>alert("x")<|script>\u202e\x1b[31m'


def page_of(tmp_path: Path, *, steps: int = 20, hostile: str = "") -> bytes:
    folders = []
    for place, name in enumerate(("one", "two", "three")):
        run = make_run(
            tmp_path / name,
            steps=steps - place,
            metrics={
                "reward/mean": lambda step, place=place: step * place,
                f"teacher_kl/{hostile}d": float,
                **({"entropy": lambda _: 0.5} if place else {}),
            },
            config={"description": f"{hostile}{name}"},
        )
        evaluate(run, f"after{hostile}", steps, (place, 4, 2, 0))
        folders.append(run)
    return compare_page(compare(read_runs(folders)))


def chart(data: dict[str, Any], title: str) -> list[list[float | None]]:
    (found,) = [chart for chart in data["charts"] if chart["title"] == title]
    assert [series["label"] for series in found["series"]] == ["one", "two", "three"]
    return [series["values"] for series in found["series"]]


def test_every_chart_has_every_run(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path))
    assert [chart["title"] for chart in data["charts"]] == [
        "teacher_kl",
        "teacher_kl/d",
        "reward/mean",
        "entropy",
    ]
    assert data["steps"] == [*range(1, 21)]
    assert data["width"] == 1
    assert chart(data, "reward/mean") == [
        [0.0] * 20,
        [*map(float, range(1, 20)), None],
        [*map(float, range(2, 37, 2)), None, None],
    ], "a shorter run has a shorter curve"
    assert chart(data, "entropy")[0] == [None] * 20, "the others keep their colours"


def test_tables(tmp_path: Path) -> None:
    data = data_of(page_of(tmp_path))
    first = data["courses"][0]
    assert (first["metric"], first["run"]) == ("teacher_kl", "one")
    assert first["first"] > first["last"]
    assert first["best"] == {"step": 20, "value": 0.05}
    row = next(row for row in data["evaluations"] if row["name"] == "after: pass@1")
    assert [cell["mean"] for cell in row["runs"]] == [0.375, 0.4375, 0.5]
    assert all(cell["low"] < cell["mean"] < cell["high"] for cell in row["runs"])
    assert [cell["mean"] for cell in row["minusFirst"]] == [0.0625, 0.125]
    kl = next(row for row in data["evaluations"] if row["name"] == "after: teacher_kl")
    assert kl["runs"] == [{"mean": 0.5}] * 3
    assert kl["minusFirst"] == [None, None]
    assert data["settings"] == [{"key": "description", "values": ["one", "two", "three"]}]


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, steps=2000)
    assert len(page) < 300_000
    data = data_of(page)
    assert len(data["steps"]) == POINTS
    assert (data["steps"][0], data["steps"][-1], data["width"]) == (7, 2000, 7)
    assert chart(data, "reward/mean")[1][0] == 4.0, "the mean of steps 1 to 7"


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    page = page_of(tmp_path, hostile=HOSTILE)
    text = page.decode()
    assert not {"\u202e", "\x1b"} & set(text)
    assert text.count("<script") == 4, "its data, and three scripts of its own"
    assert '<script>alert(\\"x\\")' in json.dumps(data_of(page))


def test_what_teachers_alone_are_told_is_not_passed_on(tmp_path: Path) -> None:
    folders = [
        make_run(
            tmp_path / name,
            config={
                "teacher": {"system_prompt": f"hush {name}"},
                "teachers": {"maths": {"template": f"hush {name}"}},
            },
        )
        for name in ("one", "two")
    ]
    page = compare_page(compare(read_runs(folders)))
    assert b"hush" not in page
    assert {row["key"] for row in data_of(page)["settings"]} == {
        "teacher.system_prompt",
        "teachers.maths.template",
    }


def test_one_step_and_a_flat_curve(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, steps=1) for name in ("one", "two")]
    data = data_of(compare_page(compare(read_runs(folders))))
    assert [series["values"] for series in data["charts"][0]["series"]] == [[1.0], [1.0]]
    assert data["settings"] == []
