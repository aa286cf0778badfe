"""The maker of a quickstart teacher with another tokenizer."""

from __future__ import annotations

import random
import runpy
from pathlib import Path
from typing import Any

import pytest

MAKER = Path(__file__).resolve().parents[2] / "scripts" / "make_cross_teacher.py"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(MAKER.parent)
    return runpy.run_path(str(MAKER))


def test_its_tokens_are_letters_and_pairs_of_letters(maker: dict[str, Any]) -> None:
    tokenizer = maker["build_tokenizer"](["planet", "plan"], 3)
    # Counted in both directions: an, la, na ... are as frequent as each other, so the alphabet decides.
    assert tokenizer.convert_ids_to_tokens(range(5 + 256, len(tokenizer))) == ["al", "an", "la"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reverse: plan"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<s>[Q] Reverse: plan\n[A]"
    examples = maker["Examples"](tokenizer)
    assert examples.prompt("plan") == tokenizer.encode(prompt, add_special_tokens=False)


def test_after_every_token_it_learns_to_go_on_with_the_right_letters(maker: dict[str, Any]) -> None:
    tokenizer = maker["build_tokenizer"](["planet", "plan"], 3)
    examples, rng = maker["Examples"](tokenizer), random.Random(0)
    ids, labels = examples.row("plan", 0.0, rng)
    targets = [label for label in labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(targets) == ["n", "al", "p", "</s>"]
    assert targets[:-1] == ids[-3:]
    slipped = 0
    for _ in range(50):
        ids, labels = examples.row("planet", 0.4, rng)
        targets = [label for label in labels if label != -100]
        written = ids[-len(targets) + 1 :]
        at = 0
        for token, target in zip(written, targets, strict=False):
            expected = "tenalp"[at:]
            if expected:
                assert expected.startswith(tokenizer.decode([target]))
            else:
                assert target == examples.end
            slipped += tokenizer.decode([token]) != tokenizer.decode([target])
            at += len(tokenizer.decode([token]))
    assert slipped > 20
