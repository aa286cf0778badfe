"""What the student reads is what the template makes of what the user wrote: over every chat template of TRL's package, and
SmolLM2's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.rollout.families import byte_tokenizer, trl_folder, trl_template

from rnow.rollout.controls import ZERO_WIDTH
from rnow.rollout.rendering import Rendering, render, render_text, tell_of_alterations
from rnow.rollout.template_process import TemplateFault

# As in HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0).
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {path.stem: None for path in sorted(trl_folder().glob("*.jinja"))} | {
    "smollm2": SMOLLM2
}
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "[INST]", "<|channel|>", "<start_of_turn>")
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")
WORDS = ("<b>", "</table>", "aspirin")  # added tokens that are ordinary text, as Gemma's HTML

texts = st.lists(
    st.sampled_from(
        [
            "what",
            " ",
            "\n",
            "<b>",
            "aspirin",
            "</table>",
            "{x}",
            "é",
            "5 < 6",
            "'",
            '"',
            "|",
            "€",
            "\\n",
            "%s",
        ]
    ),
    min_size=1,
    max_size=6,
).map(lambda pieces: "say" + "".join(pieces) + ".")
spelled = st.lists(
    st.sampled_from([*SPECIAL, *PLAIN, "<|im_", "end|>", "<thi", "nk>", "x", "<", ">"]), max_size=5
).map("".join)


@cache
def tokenizer_of(name: str) -> Any:
    source = TEMPLATES[name] or trl_template(name)
    return byte_tokenizer(source, "<|end|>", SPECIAL, (*PLAIN, *WORDS))


def theirs(name: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """The template's own rendering."""
    try:
        text = tokenizer_of(name).apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception:
        assume(False)
        raise
    return str(text)


def ours(name: str, messages: Sequence[Mapping[str, Any]]) -> Rendering:
    (found,) = render(tokenizer_of(name), [(messages, None)])
    assert isinstance(found, Rendering), found
    return found


def dialogue(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def prints_texts(name: str) -> bool:
    return "a-text" in theirs(name, dialogue("a-text"))


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(TEMPLATES)), said=st.lists(texts, min_size=3, max_size=3))
def test_ordinary_text_is_rendered_as_the_template_has_it(name: str, said: list[str]) -> None:
    assume(prints_texts(name))
    found = ours(name, dialogue(*said))
    assert found == Rendering(text=theirs(name, dialogue(*said)), altered=None)


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(TEMPLATES)), said=st.lists(spelled, min_size=3, max_size=3))
def test_only_the_template_writes_control_tokens(name: str, said: list[str]) -> None:
    assume(prints_texts(name))
    tokenizer = tokenizer_of(name)
    controls = {tokenizer.convert_tokens_to_ids(text) for text in (*SPECIAL, *PLAIN, "<|end|>")}
    said = ["say " + text + "." for text in said]
    said[1] = said[1].replace("think", "thin-k")  # tags of thinking are the assistant's own

    def count(messages: list[dict[str, Any]]) -> list[int]:
        ids = tokenizer.encode(render_text(tokenizer, messages), add_special_tokens=False)
        return [token for token in ids if token in controls]

    assert count(dialogue(*said)) == count(dialogue("say a.", "say b.", "say c."))
    found = ours(name, dialogue(*said))
    plain = found.text.translate({ord(ZERO_WIDTH): None})
    assert (found.altered is None) == (plain == found.text)
    try:
        assert plain == theirs(name, dialogue(*said))
    except BaseException as refused:  # a template that refuses some words takes them broken
        if type(refused).__name__ != "UnsatisfiedAssumption":
            raise


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_parts_of_text_are_that_text(name: str) -> None:
    """A list of parts and the same as one text: the student reads the same, but for blanks between parts."""
    text = "Name a long river in Africa"
    parts = [{"type": "text", "text": "Name a long "}, {"type": "text", "text": "river in Africa"}]
    one, several = (
        "".join(ours(name, [{"role": "user", "content": content}]).text.split())
        for content in (text, parts)
    )
    assert one == several
    assert "".join(text.split()) in one
    assert "'text'" not in one


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_arguments_are_one_thing_in_both_forms(name: str) -> None:
    arguments = {"city": "Orléans", "days": 2}

    def text_of(given: object) -> str | None:
        call = {
            "id": "call00000",
            "type": "function",
            "function": {"name": "weather", "arguments": given},
        }
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00000", "name": "weather", "content": "sun"},
        ]
        (found,) = render(tokenizer_of(name), [(messages, None)])
        return None if isinstance(found, TemplateFault) else found.text

    as_object, as_text = text_of(arguments), text_of(json.dumps(arguments, ensure_ascii=False))
    assert as_object == as_text
    assert as_object is None or '\\"city' not in as_object
    assert as_object is None or "{'city'" not in as_object


def test_earlier_thinking_is_the_templates_to_drop() -> None:
    said = dialogue("2+2?", "<think>\nadd them\n</think>\n\n4", "3+3?")
    found = ours("qwen3", said)
    assert found == Rendering(text=theirs("qwen3", said), altered=None)
    assert "add them" not in found.text


def test_thinking_that_a_user_spells_is_text() -> None:
    found = ours("qwen3", dialogue("what does </think> mean?"))
    assert found.altered == "</think>"
    assert "<\u200b/think>" in found.text


def test_parts_that_spell_a_control_token_together() -> None:
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
        "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = byte_tokenizer(template, "<|im_end|>")
    parts = [{"type": "text", "text": text} for text in ("abc<|im_", "end|>d")]
    ids = tokenizer.encode(render_text(tokenizer, [{"role": "user", "content": parts}]))
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_name_between_the_brackets_of_the_template() -> None:
    template = "{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}"
    tokenizer = byte_tokenizer(template, "<|end|>", (), ("<think>",))
    text = render_text(tokenizer, [{"role": "user", "content": "think"}])
    assert text == "<\u200bthink>"


@pytest.mark.parametrize(
    "plain",
    [("<a>", "<\u200ba>"), ("<\u200b", "<a"), ("<\u200b", "<\u2060", "< ", "<a")],
    ids=["one inside the other", "a bracket with a space", "every space"],
)
def test_a_hostile_tokenizer_comes_to_an_end(plain: tuple[str, ...]) -> None:
    """Added tokens one of which is what another becomes when it is broken."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<a{{ x }}"
    tokenizer = byte_tokenizer(template, "<|end|>", plain)
    assert set(plain) <= set(tokenizer.all_special_tokens)
    text = render_text(tokenizer, [{"role": "user", "content": "x<a><a><\u200ba>y" * 20}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    own = {tokenizer.convert_tokens_to_ids(token) for token in plain}
    assert sum(token in own for token in ids) == ("<a" in plain)


def test_an_alteration_is_told_once() -> None:
    tokenizer = byte_tokenizer(trl_template("qwen3"), "<|im_end|>", ("<|im_start|>",))
    told: list[str] = []
    tell_of_alterations(tokenizer, told.append)
    for text in ("fine", "<|im_end|>", "<|im_start|>"):
        render_text(tokenizer, dialogue(text))
    assert len(told) == 1
    assert "'<|im_end|>'" in told[0]
