"""``benchmarks/growth.py``: its points, its slopes and its plot. Running a point is vs_trl's, which has tests of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.scripts import load_benchmark


@pytest.fixture(scope="module")
def script() -> Any:
    return load_benchmark("growth")


def test_every_axis_changes_a_number_of_a_point(script: Any) -> None:
    base = script.Point().size()
    for field, values in script.AXES.values():
        assert list(values) == sorted(values)
        for value in values:
            size = script.replace(script.Point(), **{field: value}).size()
            assert (size != base) == (value != getattr(script.Point(), field))


def test_a_slope_of_one_is_linear(script: Any) -> None:
    before, after = {"seconds": 0.5, "value": 64}, {"seconds": 2.0, "value": 256}
    assert script.slope(before, after) == pytest.approx(1.0)
    assert script.slope(before, after | {"seconds": 8.0}) == pytest.approx(2.0)


def test_the_plot_is_drawn(script: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"title": title, "value": value, "seconds": 1.0, "peak_mb": 10.0, "rest": 0.1}
        | dict.fromkeys(script.STAGES, 0.3)
        for title, (_, values) in script.AXES.items()
        for value in values
    ]
    script.plot(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_what_is_added_stands_beside_what_was_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    new = [{"title": script.LARGE_TITLE, "value": 4096}, {"title": "layers", "value": 4}]
    with pytest.raises(SystemExit, match="measure without --add"):
        script.with_earlier(new)
    earlier = [{"title": title, "value": 1} for title in ("steps", "layers", "vocabulary")]
    kept = {"machine": script.machine() | {"date": "2020-01-01"}, "rows": earlier}
    (tmp_path / "growth.json").write_text(json.dumps(kept))
    found = [(row["title"], row["value"]) for row in script.with_earlier(new)]
    large = (script.LARGE_TITLE, 4096)
    assert found == [("vocabulary", 1), ("layers", 4), ("steps", 1), large]
    kept["machine"]["cpu"] = "another"
    (tmp_path / "growth.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="another machine"):
        script.with_earlier(new)
