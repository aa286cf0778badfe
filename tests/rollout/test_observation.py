"""What follows the student's turn: exactly what the template writes there, and nothing of the turn itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.rollout.families import BY_NAME, SUPPORTED, TOOLS, Family, byte_tokenizer, trl_template

from rnow.errors import InputError
from rnow.rollout.environment import Dialogue
from rnow.rollout.observation import CONTINUE, Observations

QWEN = (
    "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
LLAMA = (
    '<|start_header_id|>ipython<|end_header_id|>\n\n"{}"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
AFTER_ONE = {
    "ours": "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n",
    "qwen2_5": QWEN,
    "qwen3": QWEN,
    "qwen3_instruct_2507": QWEN,
    "qwen3_5_think": QWEN + "<think>\n",
    "qwen3_5_nothink": QWEN + "<think>\n\n</think>\n\n",
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "deepseek_v31": "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>",
    "mistral": '[TOOL_RESULTS]{{"content": "{}", "call_id": "c00000000"}}[/TOOL_RESULTS]',
    "mistral_v11": "[TOOL_RESULTS]c00000000[TOOL_CONTENT]{}[/TOOL_RESULTS]",
}
CHATML_ANSWER = "\n<|im_start|>assistant\n"
LLAMA_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
AFTER_ANSWER = {
    "ours": CHATML_ANSWER,
    "qwen2_5": CHATML_ANSWER,
    "qwen3": CHATML_ANSWER,
    "qwen3_5_think": CHATML_ANSWER + "<think>\n",
    "llama3_1": LLAMA_ANSWER,
    "llama3_2": LLAMA_ANSWER,
}


def answers(family: Family, *contents: str, turn: int = 0) -> list[dict[str, Any]]:
    call_id = family.dialogue().format.call_id
    return [
        {
            "role": "tool",
            "name": "look_up",
            "tool_call_id": call_id(turn, index),
            "content": content,
        }
        for index, content in enumerate(contents)
    ]


def eos_id(family: Family) -> int:
    return family.tokenizer.eos_token_id


@pytest.mark.parametrize("name", AFTER_ONE)
def test_after_one_call(name: str) -> None:
    family = BY_NAME[name]
    ids = family.dialogue().observations.after_tools(answers(family, "42 & more"), eos_id(family))
    assert family.tokenizer.decode(ids) == AFTER_ONE[name].format("42 & more")
    behind = family.encode(family.eos + AFTER_ONE[name].format("42 & more"))
    assert ids == behind[1:], "split as it is behind the end of the turn"


@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)
def test_after_three_calls(family: Family) -> None:
    messages = answers(family, "one", "two", "six")
    ids = family.dialogue().observations.after_tools(messages, eos_id(family))
    text = family.tokenizer.decode(ids)
    places = [text.index(message["content"]) for message in messages]
    assert places == sorted(places)
    assert "hi" not in text.split()
    assert "mark" not in text, "nothing of the probe is left"


def test_tool_messages_of_one_turn_share_a_user_turn_where_the_template_says_so() -> None:
    family = BY_NAME["qwen3"]
    ids = family.dialogue().observations.after_tools(answers(family, "a", "b"), eos_id(family))
    assert family.tokenizer.decode(ids) == (
        "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", AFTER_ANSWER)
def test_after_an_answer_the_next_turn_is_opened(name: str) -> None:
    family = BY_NAME[name]
    ids, messages = family.dialogue().observations.after_answer(eos_id(family))
    assert family.tokenizer.decode(ids) == AFTER_ANSWER[name]
    assert messages == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "mistral",
            "[/AVAILABLE_TOOLS][INST]Continue.[/INST]",
        ),  # it shows tools with the last user message
        ("deepseek_v31", "<｜User｜>Continue.<｜Assistant｜></think>"),
    ],
)
def test_where_a_template_cannot_open_it_the_user_says_continue(name: str, text: str) -> None:
    family = BY_NAME[name]
    ids, messages = family.dialogue().observations.after_answer(eos_id(family))
    assert family.tokenizer.decode(ids).endswith(text)
    assert messages == (CONTINUE,)


def test_thinking_switches_reach_the_next_turn() -> None:
    family = BY_NAME["qwen3"]
    dialogue = Dialogue(
        family.tokenizer, TOOLS, stop_token_ids=family.stop_token_ids, reasoning_mode="none"
    )
    ids = dialogue.observations.after_tools(answers(family, "x"), eos_id(family))
    assert family.tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")


# --- how the turn ended -------------------------------------------------------------------------------------------


def test_an_end_that_the_template_knows_takes_the_place_of_its_own() -> None:
    family = BY_NAME["llama3_1"]
    eom = family.tokenizer.convert_tokens_to_ids("<|eom_id|>")
    ids = family.dialogue().observations.after_tools(answers(family, "x"), eom)
    assert family.tokenizer.decode(ids) == LLAMA.format("x")


def test_behind_an_end_that_it_does_not_know_the_templates_own_follows() -> None:
    family = BY_NAME["qwen3"]
    other = family.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    observations = family.dialogue().observations
    ids = observations.after_tools(answers(family, "x"), other)
    assert family.tokenizer.decode(ids) == "<|im_end|>" + QWEN.format("x")
    ids, _ = observations.after_answer(other)
    assert family.tokenizer.decode(ids) == "<|im_end|>" + CHATML_ANSWER


def test_an_end_that_opens_the_next_turn_is_not_written_twice() -> None:
    """GLM ends a turn by opening the tool's."""
    family = BY_NAME["glm4moe"]
    opening = family.tokenizer.convert_tokens_to_ids("<|observation|>")
    ids = family.dialogue().observations.after_tools(answers(family, "x"), opening)
    text = "\n<tool_response>\nx\n</tool_response><|assistant|>"
    assert family.tokenizer.decode(ids) == text
    other = family.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = family.dialogue().observations.after_tools(answers(family, "x"), other)
    assert family.tokenizer.decode(ids) == "<|observation|>" + text


def test_a_newline_that_the_end_token_swallows_is_not_written() -> None:
    """Some end tokens take the blanks behind them (``rstrip``): so they do in a whole conversation."""
    from tokenizers import AddedToken

    family = BY_NAME["ours"]
    tokenizer = byte_tokenizer(family.source, "<|im_end|>", family.special)
    tokenizer.add_tokens([AddedToken("<|im_end|>", rstrip=True, special=True, normalized=False)])
    observations = Observations(
        tokenizer,
        (),
        call_id=lambda turn, index: "c",
        stop_token_ids=[tokenizer.eos_token_id],
    )
    ids = observations.after_tools(answers(family, "x"), tokenizer.eos_token_id)
    whole = tokenizer.encode("<|im_end|>\n<|im_start|>tool\nx<|im_end|>\n<|im_start|>assistant\n")
    assert list(ids) == whole[1:]
    assert tokenizer.decode(ids).startswith("<|im_start|>")


def test_a_stop_id_that_is_ordinary_text_is_no_end_of_turn() -> None:
    family = BY_NAME["qwen3"]
    newline, end = family.encode("\n")[0], eos_id(family)
    dialogue = Dialogue(family.tokenizer, TOOLS, stop_token_ids=[newline, end])
    ids = dialogue.observations.after_tools(answers(family, "x"), end)
    assert family.tokenizer.decode(ids) == QWEN.format("x")
    ids = dialogue.observations.after_tools(answers(family, "x"), newline)
    assert family.tokenizer.decode(ids).endswith(QWEN.format("x"))


# --- what the template reads --------------------------------------------------------------------------------------


def test_what_is_for_transcripts_is_not_rendered() -> None:
    family = BY_NAME["ours"]
    template = family.source.replace(
        "message.content }}", "message.content + (message | tojson) }}"
    )
    tokenizer = byte_tokenizer(template, family.eos, family.special, family.plain)
    observations = Observations(
        tokenizer, (), call_id=lambda *_: "c", stop_token_ids=[tokenizer.eos_token_id]
    )
    (message,) = answers(family, "boom")
    message |= {"failed": True, "detail": "Traceback: s3cret"}
    text = tokenizer.decode(observations.after_tools([message], tokenizer.eos_token_id))
    assert "boom" in text
    assert "s3cret" not in text
    assert "failed" not in text


@pytest.mark.parametrize("name", ["", None])
def test_an_answer_to_an_unnamed_call_can_be_rendered(name: str | None) -> None:
    family = BY_NAME["mistral"]
    (message,) = answers(family, "Error: not JSON")
    ids = family.dialogue().observations.after_tools([message | {"name": name}], eos_id(family))
    assert "Error: not JSON" in family.tokenizer.decode(ids)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role + m.content }}<|end|>{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}<|end|>{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.role + m.content }}<|end|>{% endfor %}",
    ],
    ids=["silent", "raises", "user only", "backwards"],
)
def test_a_template_without_tool_messages_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer(template, "<|end|>")
    with pytest.raises(InputError, match="cannot express the answers of tools") as caught:
        Observations(tokenizer, (), call_id=lambda *_: "c", stop_token_ids=[tokenizer.eos_token_id])
    assert caught.value.fix


@pytest.mark.parametrize(
    "name", ["gemma", "phi3", "cohere", "smolvlm", "qwen2_5_vl", "deepseekv3", "llama3"]
)
def test_a_template_that_does_not_show_tools_is_refused(name: str) -> None:
    tokenizer = byte_tokenizer(trl_template(name), "<|end|>")
    with pytest.raises(InputError, match="does not show tools"):
        Dialogue(tokenizer, TOOLS, stop_token_ids=[tokenizer.eos_token_id])


def test_the_quickstart_student_has_no_tools() -> None:
    folder = Path(__file__).resolve().parents[2] / "templates" / "quickstart" / "student"
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template, "<|im_end|>")
    with pytest.raises(InputError, match="does not show tools"):
        Dialogue(tokenizer, TOOLS, stop_token_ids=[tokenizer.eos_token_id])
