"""``benchmarks/shared_prompt.py``: both ways do the same work."""

from __future__ import annotations

from typing import Any

import pytest
from tests.benchmarks.scripts import load_benchmark


def test_a_round_of_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = load_benchmark("shared_prompt")
    small = script.Size(prompts=2, prompt=30, group=4, shortest=3, longest=6, ids=258)
    monkeypatch.setitem(script.SIZES, "quickstart", small)
    rows = script.measure("quickstart", 1)
    assert [row["stage"] for row in rows] == ["teacher", "update"]
    for row in rows:
        assert row["tokens"]["shared"] < row["tokens"]["separate"] / 2
        assert row["apart"] < 1e-4
        assert row["ratio"] > 0
