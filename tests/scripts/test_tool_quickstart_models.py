"""The models, the tool and the data that ``rnow init --template tool-quickstart`` copies, as committed under templates/."""

from __future__ import annotations

import importlib
import json
import random
import runpy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rnow.core import RewardArgs
from rnow.rollout.environment import Dialogue
from rnow.rollout.rendering import render_text
from rnow.usercode.host import load_functions

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "templates" / "tool-quickstart"
NAMES = ("student", "teacher")


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield importlib.import_module("make_tool_quickstart_models")


@pytest.fixture(scope="module")
def encoder(maker: ModuleType) -> Any:
    return maker.Encoder(tokenizer("student"), maker.describe_calc(calc()))


@cache
def tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(QUICKSTART / name)


@cache
def model(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / name, dtype=torch.float32).eval()


@cache
def calc() -> Any:
    return runpy.run_path(str(QUICKSTART / "tools.py"))["calc"]


@cache
def rows() -> list[dict[str, Any]]:
    with (QUICKSTART / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def conversation() -> list[dict[str, Any]]:
    def call(expression: str) -> dict[str, Any]:
        function = {"name": "calc", "arguments": {"expression": expression}}
        calls = [{"id": "1", "type": "function", "function": function}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    return [
        {"role": "user", "content": "Compute 37+58-12."},
        call("37+58"),
        {"role": "tool", "name": "calc", "tool_call_id": "1", "content": "95"},
        call("95-12"),
        {"role": "tool", "name": "calc", "tool_call_id": "1", "content": "83"},
        {"role": "assistant", "content": "83"},
    ]


# --- the calculator and the reward --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("37+58", "95"),
        ("12-34", "-22"),
        ("-22-5", "-27"),
        ("-22--5", "-17"),
        (" 7 * 6 \n", "42"),
        ("7/2", "3.5"),
        ("6/3", "2"),
        ("1/3", "0.3333333333"),
        ("999999999*999999999", "999999998000000001"),
    ],
)
def test_calc_works_out_one_operation(expression: str, result: str) -> None:
    assert calc()(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "12",
        "12+",
        "1+2+3",
        "9**9**9",
        "9**9",
        "2<<99",
        "1000000000*2",
        "__import__('os')",
        "abs+1",
        "a+b",
        "(1)+2",
        "1.5+2",
        "١+٢",
        "1+" + "9" * 100_000,
    ],
)
def test_calc_refuses_everything_else(expression: str) -> None:
    with pytest.raises(ValueError, match="write one operation") as caught:
        calc()(expression)
    assert len(str(caught.value)) < 80


def test_division_by_zero_is_a_short_error() -> None:
    with pytest.raises(ValueError, match=r"^division by zero$"):
        calc()("7/0")


def test_the_host_tells_of_the_tool_what_the_models_were_trained_on(maker: ModuleType) -> None:
    (info,) = load_functions(QUICKSTART / "tools.py", "tools")
    assert {
        "type": "function",
        "function": {
            "name": info.name,
            "description": info.description,
            "parameters": dict(info.parameters),
        },
    } == maker.describe_calc(calc())


def test_reward_is_the_exact_answer() -> None:
    accuracy = runpy.run_path(str(QUICKSTART / "rewards.py"))["accuracy"]
    args = RewardArgs(metadata={"answer": "83"})
    assert accuracy(args, conversation()) == 1.0
    assert accuracy(args, conversation()[:-2]) == 0.0
    assert accuracy(args, [*conversation()[:-1], {"role": "assistant", "content": "38"}]) == 0.0


# --- the files ----------------------------------------------------------------------------------------------------


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


def test_rows_are_distinct_and_correct() -> None:
    assert len({row["messages"][0]["content"] for row in rows()}) == len(rows()) == 2048
    for row in rows():
        assert set(row) == {"messages", "rewards", "metadata"}
        assert row["rewards"] == ["accuracy"]
        (message,) = row["messages"]
        instruction, sums = message["content"].split()
        assert (message["role"], instruction, sums[-1]) == ("user", "Compute", ".")
        first, second = calc()(sums[:5]), sums[5:-1]
        assert row["metadata"] == {"answer": calc()(first + second)}


# --- tokenizer and template ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "planet", "  two  spaces\t\n", "".join(map(chr, range(32, 127))), "Zoë 逆さま 🙃"]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert tokenizer("student").decode(tokenizer("student").encode(text)) == text


def test_prompt_with_the_tool_is_short(encoder: Any) -> None:
    prompt = encoder.rendered_prompt("Compute 37+58-12.")
    assert len(prompt) < 40
    text = tokenizer("student").decode(prompt)
    assert '"name": "calc"' in text
    assert "Work out one operation" in text
    assert text.endswith("Compute 37+58-12.<|im_end|>\n<|im_start|>assistant\n")


def test_chat_template_extends_what_it_rendered(maker: ModuleType) -> None:
    tools = [maker.describe_calc(calc())]
    messages = [{"role": "system", "content": "Be brief."}, *conversation()]
    for shown in (tools, None):
        before = ""
        for count in range(1, len(messages) + 1):
            text = tokenizer("student").apply_chat_template(
                messages[:count], tools=shown, tokenize=False
            )
            assert text.startswith(before)
            assert len(text) > len(before)
            before = text
        assert before.count("Be brief.") == 1
        assert ("Tools:" in before) == (shown is not None)


def test_a_whole_conversation_is_rendered_as_a_rollout_writes_it(encoder: Any) -> None:
    """Turn by turn, with nothing rendered again, gives the ids of the chat template on the whole."""
    ids = [
        *encoder.rendered_prompt("Compute 37+58-12."),
        *encoder.call("37+58"),
        *encoder.rendered_observation("95"),
        *encoder.call("95-12"),
        *encoder.rendered_observation("83"),
        *encoder.answer("83"),
    ]
    whole = render_text(
        tokenizer("student"), conversation(), tools=[encoder.tool], generation_prompt=False
    )
    assert tokenizer("student").decode(ids) + "\n" == whole
    assert tokenizer("student").encode(whole, add_special_tokens=False)[: len(ids)] == ids


def test_several_calls_and_several_answers_in_one_turn() -> None:
    messages = conversation()
    both = {**messages[1], "content": "Two.", "tool_calls": messages[1]["tool_calls"] * 2}
    text = tokenizer("student").apply_chat_template(
        [messages[0], both, messages[2], messages[2]], tokenize=False
    )
    assert text.count("<tool_call>") == text.count("<tool_response>") == 2
    assert "assistant\nTwo.\n<tool_call>\n{" in text


def test_chat_template_reads_parts_and_refuses_unknown_roles() -> None:
    render = tokenizer("student").apply_chat_template
    parts = [{"type": "text", "text": "Compute "}, {"type": "text", "text": "1+1."}]
    assert (
        render([{"role": "user", "content": parts}], tokenize=False)
        == "<|im_start|>user\nCompute 1+1.<|im_end|>\n"
    )
    with pytest.raises(TemplateError, match="Unknown role: critic"):
        render([{"role": "critic", "content": "hm"}])


def test_calls_are_read_as_hermes(encoder: Any) -> None:
    name = tokenizer("student")
    dialogue = Dialogue(name, [encoder.tool], stop_token_ids=[encoder.end, encoder.pad])
    text = name.decode(encoder.call("37+58")[:-1])
    (call,) = dialogue.parse(text, turn=0, inside_thinking=False).calls
    assert dialogue.format.name == "hermes"
    assert (call.name, call.arguments, call.error) == ("calc", {"expression": "37+58"}, None)


# --- the script ---------------------------------------------------------------------------------------------------


def test_training_ids_are_those_of_rollouts(maker: ModuleType, encoder: Any) -> None:
    rng = random.Random(0)
    for _ in range(50):
        problem = maker.Problem.draw(rng)
        assert encoder.prompt(problem) == encoder.rendered_prompt(problem.question)
        assert encoder.observation(problem.answer) == encoder.rendered_observation(problem.answer)
    for error in maker.ERRORS:
        assert encoder.observation(error) == encoder.rendered_observation(error)


def test_a_careful_conversation_is_the_solution(maker: ModuleType, encoder: Any) -> None:
    problem = maker.Problem((37, 58, 12), "+-")
    ids, labels = maker.conversation(
        problem, encoder, calc(), maker.Rates(0, 0, 0, 0, 0), random.Random(0), corrected=True
    )
    assert tokenizer("student").decode([*ids, encoder.end]) + "\n" == render_text(
        tokenizer("student"), conversation(), tools=[encoder.tool], generation_prompt=False
    )
    learned = [label for label in labels if label != -100]
    assert learned == [*encoder.call("37+58"), *encoder.call("95-12"), *encoder.answer("83")]
    assert all(label in (-100, after) for label, after in zip(labels, ids[1:], strict=False))


def test_a_careless_conversation_learns_what_it_wrote_and_a_corrected_one_what_was_due(
    maker: ModuleType, encoder: Any
) -> None:
    rates, decode = maker.Rates(0.3, 0.3, 0.3, 0.3, 0.3), tokenizer("student").decode
    problem = maker.Problem((37, 58, 12), "+-")
    seen = dict.fromkeys(("slip", "early", "again", "broken"), 0)
    for seed in range(200):

        def wrong(corrected: bool, seed: int = seed) -> list[tuple[str, str]]:
            """(what was written, what the model learns to write there), where these differ."""
            ids, labels = maker.conversation(
                problem, encoder, calc(), rates, random.Random(seed), corrected=corrected
            )
            pairs = [p for p in zip(ids[1:], labels, strict=False) if p[1] not in (-100, p[0])]
            return [(decode([after]), decode([label])) for after, label in pairs]

        assert wrong(corrected=False) == []
        for after, due in wrong(corrected=True):
            kinds = {
                "slip": len(after) == len(due) == 1 and due != after,
                "early": due == "<tool_call>",
                "again": after == "<tool_call>",
                "broken": after == '"}}' and due.isdigit(),
            }
            assert sum(kinds.values()) == 1, (after, due)
            for kind, found in kinds.items():
                seen[kind] += found
    assert min(seen.values()) > 20


def test_micro_run_is_repeatable(maker: ModuleType, encoder: Any) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        tiny = maker.build_model(tokenizer("student"), layers=1, seed=seed)
        data = maker.batches(
            encoder, calc(), rates=None, size=4, excluded=set(), rng=random.Random(seed)
        )
        maker.train(tiny, data, name="micro", steps=3, learning_rate=1e-3)
        return [parameter.detach() for parameter in tiny.parameters()]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_same_seed_makes_the_same_tokenizer_and_data(maker: ModuleType, tmp_path: Path) -> None:
    maker.build_tokenizer(maker.describe_calc(calc())).save_pretrained(tmp_path)
    maker.write_dataset(tmp_path / "train.jsonl", maker.dataset(0))
    made, shipped = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, QUICKSTART / "student")
    )
    assert made == shipped
    for file, folder in (("chat_template.jinja", "student"), ("train.jsonl", ".")):
        assert (tmp_path / file).read_bytes() == (QUICKSTART / folder / file).read_bytes()


# --- the models ---------------------------------------------------------------------------------------------------


def test_teacher_is_nearly_always_right_and_the_student_half_the_time(
    maker: ModuleType, encoder: Any
) -> None:
    problems = random.Random(1).sample(maker.dataset(0), 96)

    def measured(name: str, temperature: float, count: int) -> Any:
        return maker.measure(
            QUICKSTART / name, encoder, calc(), problems[:count], temperature=temperature, seed=0
        )

    assert measured("teacher", 0.0, 16).right == 1.0
    teacher, student = measured("teacher", 1.0, 96), measured("student", 1.0, 96)
    assert teacher.right > 0.94
    assert 0.30 < student.right < 0.62
    assert teacher.answered > 0.98
    assert student.answered > 0.90


def test_logprobs_are_finite_on_text_never_seen() -> None:
    for name in NAMES:
        ids = torch.tensor([tokenizer(name).encode("Zoë 123 <tool_call> {}\n")])
        with torch.no_grad():
            logprobs = model(name)(input_ids=ids).logits.log_softmax(-1)
        assert torch.isfinite(logprobs).all()
