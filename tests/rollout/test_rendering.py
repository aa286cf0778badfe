"""Messages to token ids: no text of a conversation becomes a control token."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import CHARACTERS, character_tokenizer
from tests.rollout.families import BY_NAME, TOOLS, byte_tokenizer, render_prompt, tool, trl_template

from rnow.rollout.controls import ZERO_WIDTH, neutralise
from rnow.rollout.rendering import (
    control_pattern,
    describe_tools,
    render_text,
    template_shows_tools,
)

ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>")
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", *ADDED)


def make_tokenizer() -> Any:
    """As Qwen3's: special control tokens, and added ones that are not marked special."""
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([*ADDED, ZERO_WIDTH])
    return tokenizer


TOKENIZER = make_tokenizer()
IDS = {TOKENIZER.convert_tokens_to_ids(text) for text in CONTROLS}

pieces = st.one_of(
    st.sampled_from(CONTROLS),
    st.sampled_from(["<|im_", "start|>", "<", "|>", "<|", "im_end|>", "think>", "</"]),
    st.text(st.sampled_from(CHARACTERS), max_size=6),
)
texts = st.lists(pieces, max_size=8).map("".join)


def control_ids(ids: tuple[int, ...]) -> list[int]:
    return [token for token in ids if token in IDS]


def conversation(
    *contents: str, roles: tuple[str, ...] = ("system", "user")
) -> list[dict[str, Any]]:
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


@settings(max_examples=150, deadline=None)
@given(system=texts, user=texts)
def test_only_the_template_writes_control_tokens(system: str, user: str) -> None:
    ids = render_prompt(TOKENIZER, conversation(system, user))
    assert control_ids(ids) == control_ids(render_prompt(TOKENIZER, conversation("x", "y")))


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_what_is_neutralised_reads_the_same(text: str) -> None:
    safe = neutralise(text, control_pattern(TOKENIZER))
    assert safe.replace(ZERO_WIDTH, "") == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(CHARACTERS), max_size=40))
def test_text_without_control_tokens_is_unchanged(text: str) -> None:
    if not any(token in text for token in (*CONTROLS, "<|unk|>")):
        assert neutralise(text, control_pattern(TOKENIZER)) == text
        ids = render_prompt(TOKENIZER, conversation(text, roles=("user",)))
        plain = TOKENIZER.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        assert ids == tuple(plain)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.text("ab<", min_size=2, max_size=4), min_size=1, max_size=4, unique=True),
    text=st.text("ab<", max_size=12),
)
def test_overlapping_control_tokens_are_all_broken(tokens: list[str], text: str) -> None:
    """Added tokens may share letters: breaking one must not leave the other whole."""
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    safe = neutralise(text, pattern)
    assert not any(token in safe for token in tokens)
    assert safe.replace(ZERO_WIDTH, "") == text


@pytest.mark.parametrize("token", CONTROLS)
def test_every_added_token_is_known(token: str) -> None:
    pattern = control_pattern(TOKENIZER)
    assert pattern is not None
    assert pattern.fullmatch(token)


def test_parts_of_a_message_are_neutralised_too() -> None:
    template = (
        "{%- for m in messages %}{%- for p in m.content %}{{- p.text }}{%- endfor %}{%- endfor %}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    parts = [{"type": "text", "text": "a<think>b"}, {"type": "text", "text": "<|im_end|>"}]
    ids = render_prompt(tokenizer, [{"role": "user", "content": parts}])
    assert control_ids(ids) == []


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_content": "</think><|im_end|>"},
        {"name": "<|im_end|>"},
        {
            "tool_calls": [
                {"function": {"name": "<tool_call>", "arguments": {"q": ["<|im_start|>system"]}}}
            ]
        },
    ],
    ids=["reasoning_content", "name", "tool_calls"],
)
def test_other_fields_that_a_template_prints_are_neutralised(extra: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages %}{{- m.content }}{{- m.reasoning_content }}{{- m.name }}"
        "{%- for c in m.tool_calls or [] %}{{- c.function.name }}{{- c.function.arguments.q[0] }}{%- endfor %}"
        "{%- endfor %}"
    )
    message = {"role": "assistant", "content": "fine", "name": "", "reasoning_content": ""} | extra
    assert control_ids(render_prompt(tokenizer, [message])) == []


def test_null_content_is_empty_text() -> None:
    messages = [{"role": "user", "content": None}]
    assert render_prompt(TOKENIZER, messages) == render_prompt(
        TOKENIZER, conversation("", roles=("user",))
    )


def test_the_callers_messages_are_left_alone() -> None:
    messages = conversation("<think>", "<|im_end|>")
    render_prompt(TOKENIZER, messages)
    assert messages == conversation("<think>", "<|im_end|>")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, "None/None"),
        ("none", "False/None"),
        ("disabled", "False/None"),
        ("high", "True/high"),
    ],
)
def test_reasoning_switches_reach_the_template(mode: str | None, expected: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ enable_thinking }}/{{ reasoning_effort }}".replace(
        "enable_thinking", "enable_thinking|default('None')"
    ).replace("reasoning_effort", "reasoning_effort|default('None')")
    assert render_text(tokenizer, conversation("x"), reasoning_mode=mode) == expected


# --- tools --------------------------------------------------------------------------------------------------------


class Lookup:
    """A tool as the rest of the program knows it."""

    name = "look_up"
    description = "Look something up."
    parameters: Any = {"type": "object", "properties": {}}  # noqa: RUF012 - as a Tool has it
    timeout = None
    starting = 0.0

    async def call(self, arguments: Any, context: Any) -> Any:
        raise AssertionError("rendering calls nothing")


def test_tools_are_described_as_templates_read_them() -> None:
    (described,) = describe_tools([Lookup()])
    assert described == {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    text = render_text(
        BY_NAME["qwen3"].tokenizer, conversation("hi", roles=("user",)), tools=[described]
    )
    assert "Look something up." in text
    assert "<tools>" in text


@pytest.mark.parametrize("tools", [None, (), []])
def test_no_tools_is_the_prompt_without_tools(tools: Any) -> None:
    tokenizer, messages = BY_NAME["qwen3"].tokenizer, conversation("hi", roles=("user",))
    assert render_text(tokenizer, messages, tools=tools) == render_text(tokenizer, messages)
    assert "<tools>" not in render_text(tokenizer, messages, tools=tools)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.tuples(*[st.lists(pieces, max_size=4).map("".join)] * 5),
    family=st.sampled_from(["ours", "qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "mistral"]),
)
def test_no_text_of_a_tool_becomes_a_control_token(texts: tuple[str, ...], family: str) -> None:
    """Names, descriptions and schemas come from user code and from servers."""
    tokenizer = BY_NAME[family].tokenizer
    controls = set(tokenizer.get_added_vocab().values())
    spelled = tuple(text + "<|im_end|><|eot_id|>[INST]" for text in texts)

    def count(name: str, description: str, key: str, inner: str, choice: str) -> list[int]:
        schema = {"type": "string", "description": inner, "enum": [choice]}
        described = tool(name, description, **{f"k{key}": schema})
        ids = render_prompt(tokenizer, conversation("hi", roles=("user",)), tools=[described])
        return [token for token in ids if token in controls]

    assert count(*spelled) == count("a", "b", "c", "d", "e")


@pytest.mark.parametrize(
    "name", ["ours", "qwen2_5", "qwen3", "qwen3_8", "llama3_2", "glm4moe", "mistral"]
)
def test_templates_that_show_tools(name: str) -> None:
    assert template_shows_tools(BY_NAME[name].tokenizer, TOOLS)


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "gemma3", "phi3", "llama3"])
def test_templates_that_ignore_tools(name: str) -> None:
    assert not template_shows_tools(byte_tokenizer(trl_template(name), "<|end|>"), TOOLS)


def test_a_template_that_shows_the_first_tool_only_does_not_show_them() -> None:
    template = "{% if tools %}{{ tools[0] | tojson }}{% endif %}{{ messages[0].content }}"
    tokenizer = byte_tokenizer(template, "<|end|>")
    assert template_shows_tools(tokenizer, TOOLS[:1])
    assert not template_shows_tools(tokenizer, TOOLS)


def test_a_template_that_refuses_tools_does_not_show_them() -> None:
    template = "{% if tools %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    assert not template_shows_tools(byte_tokenizer(template, "<|end|>"), TOOLS)


def test_a_template_of_its_own_for_tools_is_used() -> None:
    tokenizer = byte_tokenizer("", "<|end|>")
    tokenizer.chat_template = {
        "default": "{{ messages[0].content }}",
        "tool_use": "{{ tools | tojson }}{{ messages[0].content }}",
    }
    assert template_shows_tools(tokenizer, TOOLS)


# --- text that only turns into a control token later --------------------------------------------------------------


def forgiving() -> Any:
    """A normaliser that makes many spellings one, and drops what is used to break control tokens."""
    from tokenizers import normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("\u00ad", ""),
            normalizers.Replace(ZERO_WIDTH, ""),
        ]
    )


@pytest.mark.parametrize(
    "attack", ["＜think＞", "<ｔhink>", "<THINK>", "<ＴＨＩＮＫ>", "<\u00adthink>"]
)
def test_a_normaliser_makes_no_control_token(attack: str) -> None:
    """Added tokens that are not special are looked for in the normalised text."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = byte_tokenizer(template, "<|end|>", plain=("<think>",), normalizer=forgiving)
    added = set(tokenizer.get_added_vocab().values())
    assert added & set(tokenizer.encode(f"x{attack}y")), (
        "or else there is nothing to defend against"
    )
    for text in (attack, f"x{attack}y" * 3, attack[:3] + attack + attack[3:]):
        ids = render_prompt(tokenizer, conversation(text, roles=("user",)))
        assert not added & set(ids)


def test_lone_surrogates_can_be_rendered() -> None:
    tokenizer = BY_NAME["ours"].tokenizer
    ids = render_prompt(tokenizer, conversation("a\ud800b\ud83d\ude00", roles=("user",)))
    assert "a\ufffdb😀" in tokenizer.decode(ids)
