"""``benchmarks/kill_resume.py``: that it kills, continues, and would see a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.benchmarks.scripts import load_benchmark


def run_of(folder: Path, loss: float = 0.5, text: str = "a", adapter: bytes = b"1") -> Path:
    (folder / "transcripts").mkdir(parents=True)
    (folder / "adapter").mkdir()
    row = {"step": 1, "loss": loss, "time/step": id(folder)}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "evaluations.jsonl").write_text("")
    (folder / "transcripts" / "step-000001.jsonl").write_text(text)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(adapter)
    return folder


def test_what_counts_as_a_difference(tmp_path: Path) -> None:
    script = load_benchmark("kill_resume")
    whole = run_of(tmp_path / "whole")
    assert list(script.differences(run_of(tmp_path / "same"), whole)) == []
    assert list(script.differences(run_of(tmp_path / "loss", loss=0.25), whole)) == [
        "metrics.jsonl"
    ]
    other = run_of(tmp_path / "other", text="b", adapter=b"2")
    assert list(script.differences(other, whole)) == [
        "adapter/adapter_model.safetensors", "transcripts/step-000001.jsonl",
    ]  # fmt: skip
    (other / "transcripts" / "step-000001.jsonl").unlink()
    assert "transcripts/step-000001.jsonl" in list(script.differences(other, whole))
    (other / "transcripts").rmdir()
    assert "transcripts/step-000001.jsonl" in list(script.differences(other, whole))


@pytest.mark.whole
def test_it_kills_and_continues(tmp_path: Path) -> None:
    script = load_benchmark("kill_resume")
    finished = script.measure(tmp_path, kills=1, saves=1, steps=6, seed=1)
    kills = [kill for row in finished for kill in row.kills]
    assert len(kills) >= 1
    assert any(kill.in_save for kill in kills)
    assert all(row.differs == () for row in finished)
    assert "0 of" in script.table(finished)[-1]
