"""``benchmarks/report.py``: that it measures, and that the page of a long run costs what that of a short one does."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.scripts import load_benchmark
from tests.report.runs import make_run


def test_it_measures(tmp_path: Path) -> None:
    script = load_benchmark("report")
    row = script.measure("tiny", make_run(tmp_path / "run"), 1)
    assert row["seconds"] > 0
    assert row["share_of_wall"] == row["seconds"] / 12.5
    made = script.make_up(tmp_path / "made", 60, tokens=20)
    found = script.measure("60 steps", made, 1)
    assert found["share_of_wall"] is None
    assert 0.1 < found["mb"] < 5
