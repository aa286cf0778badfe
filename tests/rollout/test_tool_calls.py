"""Calls in what the student wrote: the formats of the families, and everything that can be wrong with a call."""

from __future__ import annotations

import json
import re
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.rollout.families import BY_NAME, DEEPSEEK_V3, SUPPORTED, TOOLS, Family, byte_tokenizer

from rnow.errors import InputError
from rnow.rollout import tool_calls
from rnow.rollout.tool_calls import (
    DEEPSEEK,
    DEEPSEEK_V31,
    GLM,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_V11,
    QWEN3_CODER,
    ParsedTurn,
    ToolCallFormat,
    detect_format,
    parse_turn,
)

FORMATS = (HERMES, QWEN3_CODER, GLM, LLAMA3, DEEPSEEK, DEEPSEEK_V31, MISTRAL, MISTRAL_V11)
SCHEMAS: dict[str, Any] = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ONE, ONE_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


def fenced(name: str, arguments: str) -> str:
    return f"{ONE}function{SEP}{name}\n```json\n{arguments}\n```{ONE_END}"


def runnable(parsed: ParsedTurn) -> list[tuple[str, Any]]:
    return [(call.name, call.arguments) for call in parsed.calls if call.error is None]


def errors(parsed: ParsedTurn) -> list[str]:
    return [call.error for call in parsed.calls if call.error is not None]


# --- which format -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*SUPPORTED, DEEPSEEK_V3], ids=lambda family: family.name)
def test_the_format_is_the_templates(family: Family) -> None:
    assert detect_format(family.tokenizer, TOOLS).name == family.format


@pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)
def test_ids_have_the_shape_the_template_takes(family: Family) -> None:
    call_id = detect_format(family.tokenizer, TOOLS).call_id
    ids = [call_id(turn, index) for turn in (0, 7, 1234) for index in (0, 31)]
    assert len(set(ids)) == len(ids)
    if family.format.startswith("mistral"):
        assert all(re.fullmatch(r"[a-z0-9]{9}", one) for one in ids)
    else:
        assert ids[0] == "call_0_0"


@pytest.mark.parametrize("name", ["gptoss", "gemma4", "gemma3", "phi3", "cohere", "lfm2"])
def test_an_unknown_format_is_refused_clearly(name: str) -> None:
    from tests.rollout.families import trl_template

    tokenizer = byte_tokenizer(trl_template(name), "<|end|>")
    with pytest.raises(InputError, match="no format that rnow reads") as caught:
        detect_format(tokenizer, TOOLS)
    assert caught.value.fix


def test_a_format_is_not_taken_from_the_instructions() -> None:
    """A template that only talks about <tool_call> does not write calls that way."""
    template = (
        '{{ \'Write <tool_call>{"name": "lookup", "arguments": {}}</tool_call>\' }}'
        "{%- for m in messages %}{{ m.role + m.content }}{%- for c in m.tool_calls or [] %}"
        "{{ 'CALL ' + c.function.name + (c.function.arguments | tojson) }}{%- endfor %}{%- endfor %}"
    )
    with pytest.raises(InputError):
        detect_format(byte_tokenizer(template, "<|end|>"))


# --- what is read -------------------------------------------------------------------------------------------------

GOOD = [
    (HERMES, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"arguments":{"a":[1,{"b":null}]},"name":"add"}</tool_call>', [("add", {"a": [1, {"b": None}]})]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", {})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"t": "</tool_call><tool_call>"}}</tool_call>', [("f", {"t": "</tool_call><tool_call>"})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"t": "<think>x</think>"}}</tool_call>', [("f", {"t": "<think>x</think>"})]),
    (HERMES, '<tool_call>{"name":"f"}</tool_call>\n<tool_call>{"name":"g"}</tool_call>', [("f", {}), ("g", {})]),
    (HERMES, '{"name": "f", "parameters": {}}', []),
    (QWEN3_CODER, "<tool_call>\n<function=look_up>\n<parameter=q>\na\nb\n</parameter>\n<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>", [("look_up", {"q": "a\nb", "n": 7})]),
    (QWEN3_CODER, "<tool_call><function=look_up></function></tool_call>", [("look_up", {})]),
    (QWEN3_CODER, "<tool_call>\n<function=look_up>\n<parameter=q>\n7\n</parameter>\n</function>\n</tool_call>", [("look_up", {"q": "7"})]),
    (QWEN3_CODER, "<tool_call>\n<function=add>\n<parameter=numbers>\n[1, 2.5]\n</parameter>\n</function>\n</tool_call>", [("add", {"numbers": [1, 2.5]})]),
    (QWEN3_CODER, "<tool_call>\n<function=other>\n<parameter=x>\n[1]\n</parameter>\n</function>\n</tool_call>", [("other", {"x": "[1]"})]),
    (GLM, "<tool_call>look_up\n<arg_key>q</arg_key>\n<arg_value>x y</arg_value>\n<arg_key>n</arg_key>\n<arg_value>7</arg_value>\n</tool_call>", [("look_up", {"q": "x y", "n": 7})]),
    (GLM, "<tool_call>now</tool_call>", [("now", {})]),
    (LLAMA3, '{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
    (LLAMA3, '\n {"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
    (LLAMA3, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "arguments": {}}', [("f", {}), ("g", {})]),
    (LLAMA3, '{"name": "f", "parameters": {}};{"name": "g", "parameters": {}}', [("f", {}), ("g", {})]),
    (LLAMA3, '{"answer": 5}', []),
    (LLAMA3, '{"name": "Bob", "age": 3}', []),
    (LLAMA3, 'I would call {"name": "f", "parameters": {}}', []),
    (LLAMA3, "{not json", []),
    (DEEPSEEK, BEGIN + fenced("f", '{"a": 1}') + "\n" + fenced("g", "{}") + END, [("f", {"a": 1}), ("g", {})]),
    (DEEPSEEK, BEGIN + fenced("f", '{"a": "``` x"}'), [("f", {"a": "``` x"})]),
    (DEEPSEEK_V31, f'{BEGIN}{ONE}f{SEP}{{"a": 1}}{ONE_END}{ONE}g{SEP}{{}}{ONE_END}{END}', [("f", {"a": 1}), ("g", {})]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]', [("f", {"a": 1}), ("g", {})]),
    (MISTRAL_V11, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x[ARGS]{}', [("f", {"a": 1}), ("g", {})]),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "expected"), GOOD)
def test_good_calls(format: ToolCallFormat, text: str, expected: list[Any]) -> None:
    parsed = parse_turn(text, format, schemas=SCHEMAS)
    assert runnable(parsed) == expected
    assert errors(parsed) == []
    if not expected:
        assert parsed.content == text


BAD = [
    (HERMES, "<tool_call>{bad}</tool_call>", "not valid JSON"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}', "does not end"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}} and more</tool_call>', "does not end"),
    (HERMES, "<tool_call>", "not valid JSON"),
    (HERMES, "<tool_call></tool_call>", "not valid JSON"),
    (HERMES, "<tool_call>[1]</tool_call>", "JSON object"),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
    (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>', 'no "name"'),
    (HERMES, '<tool_call>{"name": "f", "args": {}}</tool_call>', 'no "arguments"'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "must be a JSON object"),
    (HERMES, '<tool_call>{"name": "f", "arguments": "rm -rf"}</tool_call>', "not valid JSON"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is no JSON"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', "too large"),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>', "given twice"),
    (HERMES, f'<tool_call>{{"name": "f", "arguments": {{"a": {"9" * 5000}}}}}</tool_call>', "digits"),
    (HERMES, f"<tool_call>{'[' * 100_000}</tool_call>", "deep"),
    (HERMES, f'<tool_call>{{"name": "f", "arguments": {{"a": {"[" * 40}{"]" * 40}}}}}</tool_call>', "deep"),
    (QWEN3_CODER, "<tool_call>{}</tool_call>", "name of a tool"),
    (QWEN3_CODER, "<tool_call><function=f><parameter=q>\nx</function></tool_call>", "not closed"),
    (QWEN3_CODER, "<tool_call><function=f><parameter=q>x</parameter><parameter=q>y</parameter></function></tool_call>", "given twice"),
    (GLM, "<tool_call>\n</tool_call>", "name of a tool"),
    (GLM, "<tool_call>f\n<arg_key>a</arg_key></tool_call>", "not closed"),
    (GLM, "<tool_call>f\n<arg_key>a</arg_key><arg_value>1</tool_call>", "not closed"),
    (LLAMA3, '{"name": "f", "parameters": {', "not valid JSON"),
    (LLAMA3, "<|python_tag|>print(1)", "not valid JSON"),
    (LLAMA3, "<|python_tag|>", "not valid JSON"),
    (DEEPSEEK, BEGIN, "empty"),
    (DEEPSEEK, f"{BEGIN}{END}", "empty"),
    (DEEPSEEK, BEGIN + fenced("f", "{bad") + END, "not valid JSON"),
    (DEEPSEEK, f"{BEGIN}{ONE}f{SEP}{{}}{ONE_END}{END}", "does not name a tool"),
    (DEEPSEEK_V31, f"{BEGIN}{ONE}f{SEP}{{}}{END}", "does not end"),
    (MISTRAL, '[TOOL_CALLS] {"name": "f", "arguments": {}}', "array"),
    (MISTRAL, "[TOOL_CALLS] [", "not valid JSON"),
    (MISTRAL, "[TOOL_CALLS] [1]", "JSON object"),
    (MISTRAL_V11, "[TOOL_CALLS]f{}", "does not name a tool"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "error"), BAD)
def test_bad_calls_are_answered(format: ToolCallFormat, text: str, error: str) -> None:
    parsed = parse_turn(text, format, schemas=SCHEMAS)
    assert runnable(parsed) == []
    assert len(parsed.calls) == 1
    assert error in errors(parsed)[0]
    assert len(errors(parsed)[0]) < 200, "the student reads this"
    assert parsed.calls[0].arguments == {}


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, '<tool_call>{bad}</tool_call><tool_call>{"name":"f"}</tool_call>'),
        (HERMES, '<tool_call>{bad <tool_call>{"name":"f"}</tool_call>'),
        (DEEPSEEK, BEGIN + fenced("g", "{bad") + fenced("f", "{}") + END),
        (MISTRAL, '[TOOL_CALLS] [{"name": 1}, {"name": "f"}]'),
        (MISTRAL_V11, "[TOOL_CALLS]x[TOOL_CALLS]f[ARGS]{}"),
    ],
)
def test_a_bad_call_does_not_spoil_the_next(format: ToolCallFormat, text: str) -> None:
    parsed = parse_turn(text, format)
    assert runnable(parsed) == [("f", {})]
    assert [call.error is None for call in parsed.calls] == [False, True]


def test_a_good_call_does_not_hide_a_bad_one() -> None:
    parsed = parse_turn('{"name": "f", "parameters": {}}; {"name": "g", "parameters": }', LLAMA3)
    assert runnable(parsed) == [("f", {})]
    assert len(errors(parsed)) == 1


def test_text_around_calls_is_the_content() -> None:
    call = '<tool_call>\n{"name": "f"}\n</tool_call>'
    parsed = parse_turn(f"Let me see.\n{call}\nand\n{call}", HERMES)
    assert parsed.content == "Let me see.\n\nand"
    assert [call.id for call in parsed.calls] == ["call_0_0", "call_0_1"]


def test_an_unreadable_call_stays_in_the_content() -> None:
    parsed = parse_turn("So: <tool_call>{bad}</tool_call>", HERMES)
    assert parsed.content == "So: <tool_call>{bad}</tool_call>"


def test_ids_count_turns_and_calls() -> None:
    text = '<tool_call>{"name":"f"}</tool_call>' * 2
    assert [call.id for call in parse_turn(text, HERMES, turn=3).calls] == ["call_3_0", "call_3_1"]


def test_hundreds_of_calls_are_cut_and_answered_once() -> None:
    parsed = parse_turn('<tool_call>{"name":"f"}</tool_call>' * 500, HERMES)
    assert len(runnable(parsed)) == 32
    assert errors(parsed) == ["468 more calls were not run: at most 32 calls in one turn"]
    assert len({call.id for call in parsed.calls}) == 33


def test_reading_stops_at_a_thousand_calls() -> None:
    call, bad = '<tool_call>{"name":"f"}</tool_call>', "<tool_call>{"
    parsed = parse_turn(call + bad * 5000, HERMES)
    assert runnable(parsed) == [("f", {})]
    assert "968 more" in errors(parsed)[-1]
    assert parsed.content == bad * 5000, "what was not read is still there"


def test_lone_surrogates_are_mended() -> None:
    text = r'<tool_call>{"name":"f","arguments":{"a\udc00":["\ud800","\ud83d\ude00"]}}</tool_call>'
    (call,) = parse_turn(text, HERMES).calls
    assert call.arguments == {"a\ufffd": ["\ufffd", "😀"]}


def test_long_names_are_cut() -> None:
    (call,) = parse_turn(f'<tool_call>{{"name":"{"f" * 5000}"}}</tool_call>', HERMES).calls
    assert len(call.name) == tool_calls.MAX_NAME


# --- thinking -----------------------------------------------------------------------------------------------------

HERMES_CALL = '<tool_call>{"name":"f"}</tool_call>'


@pytest.mark.parametrize(
    ("text", "inside", "names", "reasoning"),
    [
        (f"<think>{HERMES_CALL}</think>done", False, [], HERMES_CALL),
        (f"<think>hm</think>{HERMES_CALL}", False, ["f"], "hm"),
        (f"hm {HERMES_CALL}</think>\n{HERMES_CALL}", True, ["f"], f"hm {HERMES_CALL}"),
        (f"hm {HERMES_CALL}", True, [], f"hm {HERMES_CALL}"),
        (f"<think>never closed {HERMES_CALL}", False, [], f"never closed {HERMES_CALL}"),
        (f"{HERMES_CALL}<think>{HERMES_CALL}</think>{HERMES_CALL}", False, ["f", "f"], HERMES_CALL),
        (f"a</think>{HERMES_CALL}", False, ["f"], None),
        ("plain", False, [], None),
    ],
)
def test_calls_in_thinking_are_not_calls(
    text: str, inside: bool, names: list[str], reasoning: str | None
) -> None:
    parsed = parse_turn(text, HERMES, inside_thinking=inside)
    assert [call.name for call in parsed.calls] == names
    assert parsed.reasoning == reasoning
    if not names:
        assert parsed.content == text, "thinking stays in the content, as in a single turn"


def test_a_llama_call_may_follow_thinking() -> None:
    text = '<think>hm</think>\n\n{"name": "f", "parameters": {}}'
    assert runnable(parse_turn(text, LLAMA3)) == [("f", {})]


# --- types of bare text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "7", "7"),
        ({"type": "integer"}, "7", 7),
        ({"type": "integer"}, "seven", "seven"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["string", "null"]}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", "7"),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "number"}, "NaN", "NaN"),
        ({}, "7", "7"),
        (None, "7", "7"),
        ("not a schema", "7", "7"),
        ({"type": 3, "anyOf": 4}, "7", "7"),
    ],
)
def test_bare_text_is_read_as_its_schema_says(schema: Any, text: str, value: Any) -> None:
    schemas = {"f": {"properties": {"x": schema}}}
    written = f"<tool_call><function=f><parameter=x>\n{text}\n</parameter></function></tool_call>"
    (call,) = parse_turn(written, QWEN3_CODER, schemas=schemas).calls
    assert call.arguments["x"] == value
    assert type(call.arguments["x"]) is type(value)


@pytest.mark.parametrize("schema", [None, [], {"properties": []}, {"properties": None}])
def test_odd_schemas_do_no_harm(schema: Any) -> None:
    written = "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>"
    (call,) = parse_turn(written, QWEN3_CODER, schemas={"f": schema}).calls
    assert call.arguments == {"x": "1"}


# --- anything -----------------------------------------------------------------------------------------------------

PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<function=f>", "</function>", "<parameter=q>", "</parameter>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    BEGIN, END, ONE, ONE_END, SEP, "function", "\n```json\n", "```", "{", "}", "[", "]", '"', ":", ",", ";", "\n", " ",
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {}}', '"name"', "f", "\\ud800", "NaN", "1e999",
]  # fmt: skip


@given(
    text=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map("".join),
    format=st.sampled_from(FORMATS),
    inside=st.booleans(),
)
def test_no_text_breaks_the_parser(text: str, format: ToolCallFormat, inside: bool) -> None:
    with patch.object(tool_calls, "MAX_CALLS", 5):
        parsed = parse_turn(text, format, inside_thinking=inside, schemas=SCHEMAS)
    assert len(parsed.calls) <= 6
    for call in parsed.calls:
        assert call.error is None or call.arguments == {}
        assert call.error is not None or call.name
        json.dumps(dict(call.arguments), allow_nan=False).encode()
    if not parsed.calls:
        assert parsed.content == text


arguments = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)  # fmt: skip


@given(written=st.lists(arguments, min_size=1, max_size=4), ascii_only=st.booleans())
def test_any_json_arguments_come_back(written: list[dict[str, Any]], ascii_only: bool) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in written]
    expected = [("f", json.loads(text)) for text in texts]
    turns = {
        HERMES: "\n".join(f'<tool_call>\n{{"name": "f", "arguments": {t}}}\n</tool_call>' for t in texts),
        LLAMA3: "; ".join(f'{{"name": "f", "parameters": {t}}}' for t in texts),
        DEEPSEEK: BEGIN + "\n".join(fenced("f", t) for t in texts) + END,
        DEEPSEEK_V31: BEGIN + "".join(f"{ONE}f{SEP}{t}{ONE_END}" for t in texts) + END,
        MISTRAL: "[TOOL_CALLS] [" + ", ".join(f'{{"name": "f", "arguments": {t}}}' for t in texts) + "]",
        MISTRAL_V11: "".join(f"[TOOL_CALLS]f[ARGS]{t}" for t in texts),
    }  # fmt: skip
    for format, text in turns.items():
        parsed = parse_turn(text, format)
        assert runnable(parsed) == expected, format.name
        assert parsed.content == ""


def test_formats_are_named_apart() -> None:
    assert len({format.name for format in FORMATS}) == len(FORMATS)
    assert set(BY_NAME) >= {"ours", "qwen3", "llama3_1", "mistral", "deepseek_v31"}
