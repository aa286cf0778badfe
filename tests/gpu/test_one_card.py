"""Sampler, teacher and trainer on one card: the whole of ``benchmarks/one_card.py``."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from tests.benchmarks.scripts import BENCHMARKS
from tests.gpu.device import needs_cuda, needs_vllm

pytestmark = [pytest.mark.gpu, pytest.mark.slow, needs_cuda, needs_vllm]


def test_ten_steps_in_4_bits_and_in_bfloat16_resident_and_in_turns() -> None:
    """Writes ``benchmarks/results/one_card.json``."""
    done = subprocess.run([sys.executable, str(BENCHMARKS / "one_card.py")], check=False)
    results = json.loads((BENCHMARKS / "results" / "one_card.json").read_text())
    rows = {(row["quantization"], row["residency"]): row for row in results["rows"]}
    assert done.returncode == 0, [row.get("error") for row in rows.values()]
    assert rows.keys() == {(q, r) for q in ("nf4", "none") for r in ("time_shared", "resident")}
    for row in rows.values():
        assert row["steps"] == 10
        for stage in ("rollout", "teacher", "update"):
            assert row["tokens_per_s"][stage] > 0
            assert row["peak_gb"][stage] > 1
        assert all(math.isfinite(value) for value in row["teacher_kl"])
        assert max(map(abs, row["sampler_trainer_kl"])) < 0.05
    for quantization in ("nf4", "none"):
        turns, together = rows[quantization, "time_shared"], rows[quantization, "resident"]
        assert turns["seconds"]["wake_sampler"] > 0
        assert turns["peak_gb"]["update"] < together["peak_gb"]["update"]
