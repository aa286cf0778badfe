"""Messages to token ids: no text of a conversation becomes a control token."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import CHARACTERS, character_tokenizer

from rnow.rollout.rendering import (
    ZERO_WIDTH,
    control_pattern,
    decode,
    neutralise,
    render_prompt,
    render_text,
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


def test_decoding_leaves_control_tokens_out() -> None:
    ids = [*TOKENIZER.encode("a , b ."), TOKENIZER.eos_token_id]
    assert decode(TOKENIZER, ids) == "a , b .", "nothing is cleaned up"
