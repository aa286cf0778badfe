"""``benchmarks/transcripts.py``: that it measures, and what it must find."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmarks.scripts import load_benchmark


@pytest.mark.parametrize(
    ("group", "tokens", "vocabulary"), [(4, 1024, 50_000), (32, 32, 100)], ids=["long", "short"]
)
def test_a_token_costs_less_than_25_bytes(
    tmp_path: Path, group: int, tokens: int, vocabulary: int
) -> None:
    """Of rollouts like those of a language model, and of short ones of letters, with all their numbers and texts."""
    script = load_benchmark("transcripts")
    work = script.make_work(
        prompts=2, group=group, prompt_tokens=64, tokens=tokens, vocabulary=vocabulary
    )
    found = script.measure(work, tmp_path, repeats=1)
    assert found["columns"]["bytes"] < 25
    assert found["columns"]["bytes"] < found["json"]["bytes"] / 5
    assert found["journal"]["bytes"] < found["journal of lists"]["bytes"]
    assert found["columns"]["on_loop"] < found["columns"]["us"], "the rest is the thread's"
    lines = script.table(found)
    assert len(lines) == 1 + len(found)
    assert all(len(line) <= 80 for line in lines)
