"""The worker that runs GGUF files, with a stand-in for llama-cpp-python that is found in its place."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from rnow.errors import RnowError
from rnow.export import llama
from rnow.export.llama import ask_llama

ROWS = 5
STAND_IN = """
import numpy

class Llama:
    def __init__(self, model_path, n_ctx, n_batch, logits_all, verbose):
        assert logits_all and n_batch == n_ctx
        if "broken" in model_path:
            raise ValueError("Failed to load model from file")
        self.n_tokens = 0
        self.scores = numpy.zeros((n_ctx, 5), dtype=numpy.float32)

    def eval(self, ids):
        for token in ids:
            self.scores[self.n_tokens] = [0.5 * ((token + column) % 4) for column in range(5)]
            self.n_tokens += 1

    def reset(self):
        self.n_tokens = 0

    def tokenize(self, text, add_bos, special):
        assert special and not add_bos
        return [letter % 4 for letter in text]
"""


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def logprob(before: int, token: int, rows: int) -> float:
    scores = [0.5 * ((before + column) % 4) for column in range(rows)]
    return scores[token] - math.log(sum(map(math.exp, scores)))


@pytest.mark.parametrize("rows", [ROWS, 4])
def test_what_it_gives(tmp_path: Path, rows: int) -> None:
    """Rows that the tokenizer does not have take no part."""
    ids = [0, 3, 2, 1]
    answer = ask_llama(tmp_path / "m.gguf", ids, vocabulary=rows, text="abc", greedy=3)
    expected = [logprob(a, b, rows) for a, b in pairwise(ids)]
    assert answer.logprobs == pytest.approx(expected, abs=1e-6)
    assert answer.ids == [letter % 4 for letter in b"abc"]
    tokens, drawn = list(answer.ids), []
    for _ in range(3):
        scores = [(tokens[-1] + column) % 4 for column in range(rows)]
        drawn.append(scores.index(max(scores)))
        tokens.append(drawn[-1])
    assert answer.greedy == drawn


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(RnowError, match=r"cannot run broken\.gguf") as caught:
        ask_llama(tmp_path / "broken.gguf", [1, 2], vocabulary=4)
    assert "ValueError: Failed to load model from file" in caught.value.details


def test_one_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_SECONDS", 0.0)
    with pytest.raises(RnowError, match="cannot run") as caught:
        ask_llama(tmp_path / "m.gguf", [1, 2], vocabulary=4)
    assert "not done" in caught.value.details[0]
