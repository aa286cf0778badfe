"""``benchmarks/step_overhead.py``: how it splits a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.scripts import load_benchmark


def test_a_step_is_split_without_a_rest() -> None:
    script = load_benchmark("step_overhead")
    row = {"rollout": 5.0, "teacher": 2.0, "update": 2.0, "reward": 0.1, "sync": 0.3, "step": 9.5}
    found = script.split(10.0, row)
    assert found["overhead"] == pytest.approx(1.0)
    assert found["of_it_sync"] == 0.3
    assert found["of_it_saving_and_records"] == pytest.approx(0.6)
    assert "of_it_step" not in found


def test_it_runs(tmp_path: Path) -> None:
    script = load_benchmark("step_overhead")
    row = script.measure(tmp_path, tiny=True, backend="transformers", steps=2)
    assert row["steps"] == 2
    assert 0 < row["overhead_share"] < 1
    assert row["overhead_share"] <= row["overhead_share_worst_step"]
    seconds = row["seconds"]
    work = seconds["rollout"] + seconds["teacher"] + seconds["update"]
    assert work + seconds["overhead"] == pytest.approx(seconds["wall"])
    saved = sorted(path.name for path in (tmp_path / "runs/overhead/checkpoints").iterdir())
    assert saved == ["step-000002", "step-000003"], "every step saves"
