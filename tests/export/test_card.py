"""What a model card says, and that nothing in it is taken for markup."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rnow.export import card as module
from rnow.export.card import CARD, CURVE, RunRecord, card, draw_curve, write_card

FACTS: Mapping[str, Any] = {
    "student": "Qwen/Qwen3-8B",
    "student_revision": "0123456789abcdef",
    "teacher": "/home/ann/models/big",
    "teacher_revision": None,
    "teachers": {"teacher/maths": {"path": "Qwen/Qwen3-32B"}},
    "dataset_hash": "c0bc84f2a4e6a0f2a7d3",
    "kl_estimator": "exact",
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "config": {
        "dataset_type": "distill",
        "data": {
            "train_file": [{"path": "/home/ann/data/train.jsonl"}, {"path": "org/rows"}],
            "batch_size": 4,
            "group_size": 2,
            "val_split": 0.1,
        },
        "model": {
            "qlora_rank": 8,
            "qlora_alpha": None,
            "lora_targets": ["all-linear"],
            "quantization": "nf4",
            "dtype": "auto",
            "description": "For <b>reversing</b> words.",
        },
        "trainer": {"learning_rate": 1e-4, "lr_schedule": "cosine"},
        "algorithm": {"kl_penalty_coef": 0.1, "reward_coef": 0.0},
    },
}
SUMMARY: Mapping[str, Any] = {
    "steps": 3,
    "device": "cpu (2 threads)",
    "evaluation": {
        "before": {"step": 0, "pass@1": 0.5, "teacher_kl": 0.93788},
        "after": {"step": 3, "pass@1": 0.75, "teacher_kl": 0.4},
        "teacher": None,
    },
}
ROWS = [
    {"step": step, "teacher_kl": 1.0 / step, "completions/mean_length": 3.0} for step in (1, 2, 3)
]
RECORD = RunRecord(name="tiny", facts=FACTS, summary=SUMMARY, rows=ROWS, step=3, final=True)


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_what_was_done_is_said() -> None:
    text = card(RECORD, form="adapter", picture=True)
    for line in (
        "| base | Qwen/Qwen3-8B at 0123456789ab |",
        "| teacher | big, maths: Qwen/Qwen3-32B |",
        "| data | train.jsonl, org/rows; 0.1 of the rows held out |",
        "| steps | 3 |",
        "| a step | 4 prompts, 2 answers each |",
        "| adapter | LoRA, rank 8, alpha 16, all-linear |",
        "| learning rate | 0.0001, cosine |",
        "| held-out prompts | before | after |",
        "| pass@1 | 0.5 | 0.75 |",
        "teacher_kl: 1 in the first, 0.3333 in the last step.",
        f"![teacher_kl by step]({CURVE})",
    ):
        assert line in text.splitlines(), line
    assert "/home/ann" not in text
    assert "For \\<b\\>reversing" in text


@pytest.mark.parametrize(
    ("form", "library", "relation"),
    [
        ("adapter", "peft", "adapter"),
        ("merged", "transformers", "finetune"),
        ("gguf", "gguf", "quantized"),
    ],
)
def test_what_the_hub_reads(form: module.Form, library: str, relation: str) -> None:
    matter = front(card(RECORD, form=form, picture=False))
    assert matter["library_name"] == library
    assert matter["base_model"] == "Qwen/Qwen3-8B"
    assert matter["base_model_relation"] == relation
    assert "distillation" in matter["tags"]
    assert ("lora" in matter["tags"]) == (form == "adapter")


def test_a_base_in_a_folder_is_none_of_the_hub() -> None:
    local = replace(RECORD, facts={**FACTS, "student": "/home/ann/base", "student_revision": None})
    text = card(local, form="adapter", picture=False)
    assert "base_model" not in front(text)
    assert "/home/ann" not in text
    assert "on the machine that trained it" in text


def test_a_checkpoint_has_no_evaluation_after() -> None:
    text = card(replace(RECORD, step=2, rows=ROWS[:2], final=False), form="adapter", picture=False)
    assert "| steps | 2 (a checkpoint) |" in text
    assert "| held-out prompts | before |" in text
    assert "0.75" not in text


def test_of_an_adapter_of_no_run_little_is_known() -> None:
    bare = RunRecord(name="mine", facts={}, summary={}, rows=[], step=None, final=True)
    text = card(bare, form="adapter", picture=False)
    assert text.startswith("---\nlibrary_name: peft\n")
    assert "# mine" in text
    assert "Figures" not in text


def test_nothing_breaks_the_page() -> None:
    hostile = {**FACTS, "kl_estimator": "a | b\n# c <script>[x](y)"}
    text = card(replace(RECORD, facts=hostile, name="a\n---\n<i>"), form="adapter", picture=False)
    assert "| signal | a \\| b \\# c \\<script\\>\\[x\\](y) |" in text
    assert front(text)["library_name"] == "peft"
    assert "# a --- \\<i\\>" in text


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = draw_curve(ROWS)
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
    assert draw_curve(ROWS[:1]) is None
    assert draw_curve([{"step": 1, "loss": None}, {"step": 2, "loss": None}]) is None
    write_card(tmp_path, RECORD)
    assert (tmp_path / CURVE).read_bytes() == picture, "the same bytes for the same numbers"
    assert CURVE in (tmp_path / CARD).read_text()


def test_without_matplotlib_there_is_a_card_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_card(tmp_path, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == [CARD]
    assert CURVE not in (tmp_path / CARD).read_text()
