"""``benchmarks/streamed.py``: what it calls within its bounds."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
from tests.benchmarks.scripts import load_benchmark

SIZES = {"layer": 50e6, "tables": 67e6, "whole": 1267e6}
ASKED = Namespace(layers=24, hidden=1024, rows=16, length=128, micro=512, pairs=1)


@pytest.mark.parametrize(
    ("changes", "passes", "says"),
    [
        ({}, True, "Scores equal bit for bit: yes"),
        ({"digest": "b"}, False, "Scores equal bit for bit: NO"),
        ({"seconds": [1.2, 1.2]}, False, "Time: 1.20"),
        ({"memory": 270e6}, False, "270 MB of 267 MB allowed"),
    ],
)
def test_the_bounds(changes: dict[str, Any], passes: bool, says: str) -> None:
    script = load_benchmark("streamed")
    resident = {"seconds": [1.0, 1.0], "memory": 1300e6, "digest": "a"}
    streamed = resident | {"memory": 260e6} | changes
    text, passed = script.report({"resident": [resident], "streamed": [streamed]}, SIZES, ASKED)
    assert passed == passes
    assert says in text
