"""The one wording of a suggestion."""

from __future__ import annotations

import pytest

from rnow.text.suggest import closest, did_you_mean, hint


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("serach", ["search", "browse"], ["search"]),
        ("SEARCH", ["search"], ["search"]),
        ("search", ["Search", "other"], ["Search"]),
        ("nothing", ["search"], []),
        ("word", [], []),
        ("x" * 5000, ["search"], []),
    ],
)
def test_closest(word: str, known: list[str], found: list[str]) -> None:
    assert closest(word, known) == found


def test_several_and_how_near() -> None:
    files = ["train.jsonl", "train2.jsonl", "eval.json"]
    assert closest("trian.jsonl", files, count=2) == ["train.jsonl", "train2.jsonl"]
    assert closest("lr", ["learning_rate"], cutoff=0.75) == []


def test_words() -> None:
    assert did_you_mean([]) == ""
    assert did_you_mean(["a", "b"]) == "did you mean a or b?"
    assert hint("serach", ["search"]) == " (did you mean search?)"
    assert hint("nothing", ["search"]) == ""
