"""What rows tell their teacher alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rnow.config.schema import DatasetSource
from rnow.errors import DataError
from rnow.project.dataset import Dataset, load_dataset
from rnow.project.rows import Privileged, RowRules

ASKED = [{"role": "user", "content": "2 + $n?"}]


def load(folder: Path, *rows: dict[str, Any], kind: str = "distill") -> Dataset:
    lines = (json.dumps({"messages": ASKED, "variables": {"n": 2}} | row) for row in rows)
    (folder / "train.jsonl").write_text("\n".join(lines))
    rules = RowRules(dataset_type=kind, known_rewards={"right"})
    return load_dataset([DatasetSource(path="train.jsonl")], rules, base_dir=folder)


def fault_of(folder: Path, row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        load(folder, {}, row)
    return caught.value


def test_it_is_kept_beside_the_prompt_and_its_variables_are_filled(tmp_path: Path) -> None:
    told = [{"role": "system", "content": "$n is even"}, {"role": "user", "content": "2 + 2?"}]
    found = load(tmp_path, {}, {"privileged_context": "$n + $n is 4"}, {"teacher_messages": told})
    assert found.privileged == {
        "dataset_0/1": Privileged(context="2 + 2 is 4"),
        "dataset_0/2": Privileged(messages=({**told[0], "content": "2 is even"}, told[1])),
    }
    assert found.warnings == ()
    assert "is 4" not in str([asdict(prompt) for prompt in found.prompts])
    assert "is 4" not in repr(found.privileged)


def test_another_context_is_another_dataset_and_none_is_as_before(tmp_path: Path) -> None:
    plain = load(tmp_path, {}).content_hash
    hashes = {
        load(tmp_path, {"privileged_context": text}).content_hash for text in ("four", "five")
    }
    assert len(hashes | {plain}) == 3
    assert load(tmp_path, {"privileged_context": None}).content_hash == plain


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"privileged_context": 4}, "must be a text, but it is a number"),
        ({"privileged_context": " \n"}, '"privileged_context" is empty'),
        ({"teacher_messages": "x"}, '"teacher_messages" must be a list'),
        ({"teacher_messages": []}, '"teacher_messages" is empty'),
        ({"teacher_messages": [{"role": "user"}]}, "the message has no content"),
        ({"teacher_messages": [{"role": "usr", "content": ""}]}, 'unknown role "usr"'),
        (
            {"teacher_messages": [*ASKED, {"role": "assistant", "content": "4"}]},
            "what follows is the student's answer",
        ),
        (
            {"privileged_context": "4", "teacher_messages": ASKED},
            'the row has both "privileged_context" and "teacher_messages"',
        ),
        (
            {"messages": [{"role": "system", "content": "x"}], "privileged_context": "4"},
            "the row has no user message",
        ),
    ],
)
def test_what_is_wrong_is_placed(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    error = fault_of(tmp_path, row)
    assert error.where == "train.jsonl, line 2"
    (detail,) = error.details
    assert words in detail
    assert "column" in detail


def test_without_a_teacher_the_keys_are_ignored_and_named(tmp_path: Path) -> None:
    found = load(tmp_path, {"privileged_context": "4", "rewards": ["right"]}, kind="rl")
    assert found.privileged == {}
    (warning,) = found.warnings
    assert warning.endswith('these keys of its rows are ignored: "privileged_context"')
