"""``benchmarks/trackers.py``: that it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.scripts import load_benchmark


def test_the_loop_waits_for_next_to_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    script = load_benchmark("trackers")
    row = script.measure("tensorboard", tmp_path, steps=20, history=20)
    assert 0 < row["on_loop_ms"] < 5
    assert len(script.table([row])) == 2
