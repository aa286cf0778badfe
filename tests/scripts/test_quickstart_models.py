"""The models and the data that ``rnow init`` copies for the quickstart, as committed under templates/."""

from __future__ import annotations

import json
import random
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "templates" / "quickstart"
STUDENT = QUICKSTART / "student"
MAKER = REPOSITORY / "scripts" / "make_quickstart_models.py"
NAMES = ("student", "teacher")


@cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / name)


@cache
def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32).eval()


@cache
def rows() -> list[dict[str, Any]]:
    with (QUICKSTART / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompt_ids(row: dict[str, Any]) -> list[int]:
    return tokenizer("student").apply_chat_template(
        row["messages"], add_generation_prompt=True, return_dict=False
    )


def answer_logits(name: str, row: dict[str, Any], written: str) -> torch.Tensor:
    """Logits at every position of the answer and at its end, given what was ``written``: [letters + 1, vocabulary]."""
    prompt = prompt_ids(row)
    with torch.no_grad():
        logits = model(name)(input_ids=torch.tensor([prompt + list(written.encode())])).logits[0]
    return logits[len(prompt) - 1 :]


def test_everything_shipped_is_small() -> None:
    sizes = [file.stat().st_size for name in NAMES for file in (QUICKSTART / name).rglob("*")]
    assert sum(sizes) < 4_000_000
    assert (QUICKSTART / "train.jsonl").stat().st_size < 500_000


@pytest.mark.parametrize("name", NAMES)
def test_architecture_suits_every_backend(name: str) -> None:
    config = model(name).config
    assert config.model_type == "qwen3"
    assert config.head_dim == 32
    assert config.hidden_size % 64 == 0
    assert config.intermediate_size % 64 == 0
    assert config.vocab_size == len(tokenizer(name))
    assert all(parameter.dtype is torch.float32 for parameter in model(name).parameters())
    stored = json.loads((QUICKSTART / name / "config.json").read_text(encoding="utf-8"))
    assert stored["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", NAMES)
def test_every_end_of_turn_id_is_listed(name: str) -> None:
    ends = tokenizer(name).convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model(name).generation_config.eos_token_id == ends
    assert tokenizer(name).eos_token_id == ends[0]
    assert tokenizer(name).pad_token_id == ends[1]


def test_both_tokenizers_are_the_same() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (QUICKSTART / "student" / file).read_bytes() == (
            QUICKSTART / "teacher" / file
        ).read_bytes()


@pytest.mark.parametrize(
    "text", ["", "planet", "  two  spaces\t\n", "".join(map(chr, range(32, 127))), "Zoë 逆さま 🙃"]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer("student").encode(text)
    assert ids == list(text.encode())
    assert tokenizer("student").decode(ids) == text


def test_chat_template_extends_what_it_rendered() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Reverse: planet"},
        {"role": "assistant", "content": "tenalp"},
        {"role": "tool", "content": "ok"},
        {"role": "user", "content": "Reverse: stone"},
    ]
    before: list[int] = []
    for count in range(1, len(messages) + 1):
        ids = tokenizer("student").apply_chat_template(messages[:count], return_dict=False)
        assert ids[: len(before)] == before
        assert len(ids) > len(before)
        before = ids
    prompt = tokenizer("student").apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert prompt[:-1] == before
    assert prompt[-1:] == tokenizer("student").convert_tokens_to_ids(["<|assistant|>"])


def test_answer_continues_the_prompt_and_ends_with_an_end_of_turn() -> None:
    row = rows()[0]
    answer = row["metadata"]["answer"]
    turns = [*row["messages"], {"role": "assistant", "content": answer}]
    ids = tokenizer("student").apply_chat_template(turns, return_dict=False)
    assert ids == [*prompt_ids(row), *answer.encode(), tokenizer("student").eos_token_id, ord("\n")]


def test_chat_template_reads_parts_and_refuses_what_it_cannot_show() -> None:
    render = tokenizer("student").apply_chat_template
    parts = [{"type": "text", "text": "Reverse: "}, {"type": "text", "text": "planet"}]
    assert (
        render([{"role": "user", "content": parts}], tokenize=False)
        == "<|user|>Reverse: planet<|im_end|>\n"
    )
    assert render([{"role": "user", "content": None}], tokenize=False) == "<|user|><|im_end|>\n"
    with pytest.raises(TemplateError, match="Unknown role: critic"):
        render([{"role": "critic", "content": "hm"}])
    with pytest.raises(TemplateError, match="no tool calls"):
        render([{"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}])


def test_rows_are_distinct_correct_and_encodable() -> None:
    assert len({row["messages"][0]["content"] for row in rows()}) == len(rows()) == 4096
    longest = 0
    for row in rows():
        assert set(row) == {"messages", "rewards", "metadata"}
        assert row["rewards"] == ["accuracy"]
        (message,) = row["messages"]
        instruction, word = message["content"].split(": ")
        assert (message["role"], instruction) == ("user", "Reverse")
        assert 5 <= len(word) <= 10
        assert row["metadata"] == {"answer": word[::-1]}
        ids = prompt_ids(row)
        assert (
            "".join(tokenizer("student").decode(ids))
            == f"<|user|>Reverse: {word}<|im_end|>\n<|assistant|>"
        )
        longest = max(longest, len(ids) + len(word) + 1)
    assert longest <= model("student").config.max_position_embeddings


def test_teacher_goes_on_correctly_after_a_mistake() -> None:
    """Else its scores of everything after a student's first slip would be noise."""
    right = total = 0
    for row in random.Random(0).sample(rows(), 64):
        answer = row["metadata"]["answer"]
        wrong = next(letter for letter in "xqz" if letter != answer[1])
        chosen = answer_logits("teacher", row, answer[0] + wrong + answer[2:]).argmax(-1).tolist()
        wanted = [*answer.encode(), tokenizer("teacher").eos_token_id]
        right += sum(a == b for a, b in zip(chosen[2:], wanted[2:], strict=True))
        total += len(wanted) - 2
    assert right / total > 0.99


def test_student_is_half_right_and_teacher_nearly_always() -> None:
    """The chance that one sample at temperature 1 is the answer, averaged over words; no sampling needed."""
    chance = {}
    for name in NAMES:
        sequences = []
        for row in random.Random(1).sample(rows(), 128):
            answer = row["metadata"]["answer"]
            wanted = torch.tensor([*answer.encode(), tokenizer(name).eos_token_id])
            logprobs = answer_logits(name, row, answer).log_softmax(-1)
            sequences.append(logprobs.gather(1, wanted[:, None]).sum().exp())
        chance[name] = float(torch.stack(sequences).mean())
    assert 0.40 < chance["student"] < 0.60
    assert chance["teacher"] > 0.97


def test_logprobs_are_finite_on_text_never_seen() -> None:
    for name in NAMES:
        ids = torch.tensor([tokenizer(name).encode("Zoë 123 <|tool|> {}\n")])
        with torch.no_grad():
            logprobs = model(name)(input_ids=ids).logits.log_softmax(-1)
        assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("name", NAMES)
def test_loads_in_four_bits_on_the_cpu(name: str) -> None:
    import bitsandbytes  # noqa: F401  a dependency: without it this must fail, not skip

    quantised = AutoModelForCausalLM.from_pretrained(
        QUICKSTART / name,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        device_map={"": "cpu"},
    )
    kinds = {type(module).__name__ for module in quantised.modules()}
    assert "Linear4bit" in kinds
    for module in (
        quantised.modules()
    ):  # the repacking for AVX512-bf16 rounds more than the quantisation does
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    row = rows()[0]
    prompt = torch.tensor([prompt_ids(row)])
    with torch.no_grad():
        exact = model(name)(input_ids=prompt).logits[0, -1].log_softmax(-1)
        rough = quantised(input_ids=prompt).logits[0, -1].float().log_softmax(-1)
    assert not torch.equal(exact, rough)
    assert int(exact.argmax()) == int(rough.argmax()) == ord(row["metadata"]["answer"][0])


def test_the_same_seed_makes_the_same_tokenizer_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(MAKER.parent)
    maker = runpy.run_path(str(MAKER))
    maker["build_tokenizer"]().save_pretrained(tmp_path)
    maker["write_dataset"](tmp_path / "train.jsonl", maker["dataset_words"](0))
    made, shipped = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, STUDENT)
    )
    assert made == shipped
    assert (tmp_path / "chat_template.jinja").read_bytes() == (
        STUDENT / "chat_template.jinja"
    ).read_bytes()
    assert (tmp_path / "train.jsonl").read_bytes() == (QUICKSTART / "train.jsonl").read_bytes()
