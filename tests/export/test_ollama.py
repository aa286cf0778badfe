"""Modelfiles write the tokenizer's prompts, or there is none: over the chat templates of every supported family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from tests.conftest import CHAT_TEMPLATE, character_tokenizer
from tests.export.go import go_executes
from tests.rollout.families import BY_NAME, SUPPORTED, Family

from rnow.errors import InputError
from rnow.export.ollama import Modelfile, as_ollama, build_modelfile
from rnow.rollout.rendering import render_text
from rnow.types import Message

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' + (first if loop.first else '')"
    " + (message['content'] | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
BRACES = (
    "{% for message in messages %}{{ '{\"' + message.role + '\": {{' + message.content + '}}}\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{\"assistant\": {{' }}{% endif %}"
)
LAST = (
    "{% for message in messages %}{% if message.role == 'user' and loop.last %}{{ 'NOW ' }}{% endif %}"
    "{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
)
TWICE = "{% for message in messages %}{{ message.content + message.content }}{% endfor %}"
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"


def tokenizer(template: str | None, **options: Any) -> Any:
    made = character_tokenizer()
    made.chat_template = template
    for name, value in options.items():
        setattr(made, name, value)
    return made


def modelfile(tokenizer: Any, *, adds_bos: bool = False, **options: Any) -> Modelfile:
    stops = [tokenizer.eos_token_id]
    return build_modelfile(tokenizer, **{"stop_ids": stops, "adds_bos": adds_bos} | options)


def talk(*turns: str, system: str = "") -> list[Message]:
    led: list[Message] = [{"role": "system", "content": system}] if system else []
    return [
        *led,
        *(
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(turns)
        ),
    ]


CONVERSATIONS = (
    talk("Hi!"),
    talk("Hi!", system="Be kind."),
    talk("2 + 2?", "4", "And {{ 3 }}?", '"3"', "Thanks", system="Count."),
)


@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)
def test_every_supported_family(family: Family) -> None:
    known = family.tokenizer
    made = modelfile(known, stop_ids=family.stop_token_ids)
    takes_system = not any("no system message" in note for note in made.notes)
    for messages in CONVERSATIONS:
        if messages[0]["role"] != "system" or takes_system:
            assert as_ollama(made.template, messages) == render_text(known, messages)
    assert family.eos in made.stops


def test_smollm2_has_a_default_system_message() -> None:
    made = modelfile(tokenizer(SMOLLM2))
    prompt = as_ollama(made.template, talk("Hi"))
    assert prompt.startswith(f"{OPEN}system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith(f"{OPEN}user\nHi{CLOSE}\n{OPEN}assistant\n")
    assert "SmolLM" not in as_ollama(made.template, talk("Hi", system="Be terse."))
    assert made.stops == (CLOSE,)
    assert made.notes == ()
    assert made.conversations == 12


def test_a_template_that_puts_the_system_message_into_the_first_turn() -> None:
    made = modelfile(tokenizer(GEMMA, bos_token="<bos>"), adds_bos=True)
    assert as_ollama(made.template, talk("Hi", "Ho", "Hm", system="S")) == (
        "<start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
        "<start_of_turn>user\nHm<end_of_turn>\n<start_of_turn>model\n"
    )
    (note,) = made.notes
    assert "strips blanks" in note
    assert "<bos>" in modelfile(tokenizer(GEMMA, bos_token="<bos>")).template, (
        "nobody else writes it"
    )


def test_braces_are_text() -> None:
    made = modelfile(tokenizer(BRACES))
    assert as_ollama(made.template, talk("a")) == '{"user": {{a}}}\n{"assistant": {{'


def test_messages_of_one_role_are_joined_as_ollama_joins_them() -> None:
    made = modelfile(tokenizer(CHAT_TEMPLATE))
    twice: list[Message] = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert as_ollama(made.template, twice) == f"{OPEN}user\na\n\nb{CLOSE}\n{OPEN}assistant\n"


def test_an_answer_that_is_begun_is_gone_on_with() -> None:
    made = modelfile(tokenizer(CHAT_TEMPLATE))
    assert as_ollama(made.template, talk("a", "It is")).endswith(f"{OPEN}assistant\nIt is")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "no chat template"),
        (TWICE, {}, "elsewhere than in its turn"),
        (LAST, {}, "depending on how many came before"),
        (CHAT_TEMPLATE, {"adds_bos": True}, "puts <|endoftext|> before every prompt"),
        (CHAT_TEMPLATE.replace("\\n", "\u2028"), {}, "a Modelfile cannot hold"),
        (CHAT_TEMPLATE.replace("\\n", '"""'), {}, "three quotes"),
        ("{{ raise_exception('never') }}", {}, "refuses a plain conversation"),
        (
            "{% for m in messages %}{{ m.role ~ m.content ~ (m.content | length) }}{% endfor %}",
            {},
            "no template of Ollama's writes the same",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ messages[0].content }}!{% endif %}"
            "{% for m in messages if m.role != 'system' %}{{ (messages[0].role == 'system') ~ m.content }}{% endfor %}",
            {},
            "otherwise after a system message",
        ),
    ],
)
def test_no_modelfile_rather_than_a_wrong_one(
    template: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        modelfile(tokenizer(template, bos_token="<|endoftext|>"), **options)
    assert caught.value.title == "No faithful Ollama template"
    assert caught.value.fix


def test_thinking_that_the_template_drops_is_told() -> None:
    made = modelfile(BY_NAME["qwen3"].tokenizer)
    assert any("thinking" in note for note in made.notes)


def test_reasoning_switched_off_as_in_training() -> None:
    made = modelfile(BY_NAME["qwen3"].tokenizer, reasoning_mode="disabled")
    assert as_ollama(made.template, talk("Hi")).endswith("<think>\n\n</think>\n\n")


def test_the_file() -> None:
    made = modelfile(
        tokenizer(CHAT_TEMPLATE),
        generation={"temperature": 0.6, "top_k": 20, "do_sample": True, "eos_token_id": [2]},
        context=1048576,
    )
    text = made.text("tiny-q8_0.gguf")
    assert text.startswith('FROM ./tiny-q8_0.gguf\nTEMPLATE """')
    assert text.endswith(
        f'PARAMETER stop "{CLOSE}"\nPARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER num_ctx 1048576\n'
    )
    assert read_modelfile(text)["TEMPLATE"] == made.template


def read_modelfile(text: str) -> dict[str, str]:
    """The commands of a Modelfile as Ollama's parser takes them apart: up to a line's end, or to three quotes."""
    found: dict[str, str] = {}
    while text:
        name, _, text = text.partition(" ")
        if text.startswith('"""'):
            value, _, text = text[3:].partition('"""')
            text = text.removeprefix("\n")
        else:
            value, _, text = text.partition("\n")
        found[name] = value
    return found


def test_go_writes_what_we_say_that_it_writes() -> None:
    """The interpreter that compares is not the one that Ollama has: this holds them together."""
    templates = [modelfile(family.tokenizer, stop_ids=()).template for family in SUPPORTED]
    templates += [modelfile(tokenizer(text)).template for text in (SMOLLM2, GEMMA, BRACES)]
    for messages in CONVERSATIONS:
        answers = go_executes(templates, {"Messages": as_go(messages), "System": "", "None": ""})
        assert [a.get("text") for a in answers] == [as_ollama(t, messages) for t in templates]


def as_go(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"Role": str(m["role"]), "Content": str(m["content"])} for m in messages]
