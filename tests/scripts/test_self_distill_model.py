"""The model and the data that ``rnow init --template self-distill`` copies, as committed under templates/."""

from __future__ import annotations

import json
import random
import runpy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rnow.config import load_config
from rnow.plan.privileged import teacher_messages
from rnow.project.rows import Privileged
from rnow.setup.build import run
from rnow.types import Prompt

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "templates" / "self-distill"
QUICKSTART = REPOSITORY / "templates" / "quickstart"
MAKER = REPOSITORY / "scripts" / "make_self_distill_model.py"

Row = dict[str, Any]


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TEMPLATE / "model")


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TEMPLATE / "model", dtype=torch.float32).eval()


@cache
def rows() -> list[Row]:
    return [json.loads(line) for line in (TEMPLATE / "train.jsonl").read_text().splitlines()]


def told(row: Row, hint: str) -> list[Any]:
    """The teacher's messages, by the config that is shipped."""
    section = load_config(TEMPLATE).config.teacher
    assert section is not None
    prompt = Prompt(id="x/0", dataset="x", row=0, messages=row["messages"])
    return list(teacher_messages(section, prompt, Privileged(context=hint)))


def chance(messages: list[Any], answer: str) -> float:
    """The probability that one sample at temperature 1 is the answer."""
    prompt = tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    wanted = torch.tensor([*answer.encode(), tokenizer().eos_token_id])
    with torch.no_grad():
        logits = model()(input_ids=torch.tensor([[*prompt, *answer.encode()]])).logits[0]
    logprobs = logits[len(prompt) - 1 :].log_softmax(-1)
    return float(logprobs.gather(1, wanted[:, None]).sum().exp())


def mean_chance(asked: Callable[[Row], tuple[list[Any], str]]) -> float:
    chosen = random.Random(1).sample(rows(), 64)
    return sum(chance(*asked(row)) for row in chosen) / len(chosen)


def test_everything_shipped_is_small() -> None:
    weights = [
        (t / "model.safetensors").stat().st_size
        for t in (TEMPLATE / "model", QUICKSTART / "student")
    ]
    assert weights[0] == weights[1]
    assert (TEMPLATE / "train.jsonl").stat().st_size < 500_000
    for name in ("tokenizer.json", "chat_template.jinja"):
        ours, theirs = TEMPLATE / "model" / name, QUICKSTART / "student" / name
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_hint_helps_and_is_what_is_read() -> None:
    """Half right without; right with the answer as a hint; and a wrong hint is obeyed."""
    plain = mean_chance(lambda row: (row["messages"], row["metadata"]["answer"]))
    hinted = mean_chance(
        lambda row: (told(row, row["privileged_context"]), row["metadata"]["answer"])
    )
    misled = mean_chance(lambda row: (told(row, "qxqxvw"), "qxqxvw"))
    assert 0.35 < plain < 0.65
    assert hinted > 0.9
    assert misled > 0.8


def test_the_same_seed_makes_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(MAKER.parent)
    maker = runpy.run_path(str(MAKER))
    maker["write_dataset"](tmp_path / "train.jsonl", maker["dataset_words"](0)[: maker["ROWS"]])
    assert (tmp_path / "train.jsonl").read_bytes() == (TEMPLATE / "train.jsonl").read_bytes()


@pytest.mark.slow
def test_a_short_run_answers_held_out_words_better_without_hints(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "project"
    shutil.copytree(TEMPLATE, folder)
    overrides = ["trainer.max_steps=12", "evaluation.max_prompts=96", "model.device=cpu"]
    summary = run(load_config(folder, overrides).config, folder=folder)
    before, after = summary.evaluation["before"], summary.evaluation["after"]
    assert summary.evaluation["teacher"] is None
    assert after["pass@1"] > before["pass@1"] + 0.1
    assert summary.teacher_kl["last"] < 0.7 * summary.teacher_kl["first"]
