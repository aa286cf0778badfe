"""YAML is read by the rules of 1.2, with the place of every key."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnow.config.output import dump_yaml
from rnow.config.strict_yaml import Position, decode, parse_document, parse_value
from rnow.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.", 2.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("0b11", "0b11"),
        ("-.inf", float("-inf")),
        ("'1'", "1"),
        ('"true"', "true"),
        ("[1, no, 1e-5]", [1, "no", 1e-5]),
        ("{a: 010}", {"a": 10}),
        ("1" * 401, "1" * 401),
    ],
)
def test_scalars(text: str, value: object) -> None:
    parsed = parse_value(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_date_is_text() -> None:
    assert not isinstance(parse_value("2024-01-31", "test"), date)


def test_keys_are_text_whatever_they_look_like() -> None:
    assert parse_document("no: 1\n3: 2\nnull: 3\n", "c").data == {"no": 1, "3": 2, "null": 3}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_line_ends(newline: str, mark: bytes) -> None:
    raw = mark + newline.join(["a:", "  b: 1", "c: [x, {d: 2}]", ""]).encode()
    document = parse_document(decode(raw, "c"), "c")
    assert document.data == {"a": {"b": 1}, "c": ["x", {"d": 2}]}
    assert document.keys["a", "b"] == Position(line=2, column=3)
    assert document.keys["c", 1, "d"] == Position(line=3, column=9)
    assert document.values["c", 0] == Position(line=3, column=5)


def test_two_escaped_halves_are_one_character() -> None:
    assert parse_document('a: "\\ud83d\\ude00"\n', "c").data == {"a": "\U0001f600"}


def test_an_honest_alias_is_followed() -> None:
    assert parse_document("a: &x [1]\nb: *x\n", "c").data == {"a": [1], "b": [1]}


def test_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 15)]
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="aliases"):
        parse_document("\n".join(lines), "c")
    assert time.perf_counter() - start < 5


def test_a_flood_of_values_is_refused_while_reading() -> None:
    with pytest.raises(ConfigError, match=r"more than 20000 values \[c:"):
        parse_document("a: [" + "x, " * 30_000 + "]\n", "c")


def test_a_long_line_is_cut_in_the_excerpt() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document("a: [" + "x, " * 500 + "*nope, " + "x, " * 500 + "]\n", "c")
    line, caret = caught.value.details
    assert len(line) < 120
    assert line[caret.index("^") :].startswith("*nope")


def test_control_characters_do_not_reach_the_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document("a: \x1b[31mred\n", "c")
    assert "\x1b" not in caught.value.render()


def place_of_refusal(parse: Callable[[], object]) -> str | None:
    """None when the text is read; any other exception than ConfigError fails the test."""
    try:
        parse()
    except ConfigError as error:
        return error.where or ""
    return None


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["no", "1e-5", "0o7", "010", "null", "1:30", "2024-01-01", "- a", "*x", ".5"]
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(data=st.dictionaries(st.text(min_size=1), plain, min_size=1, max_size=4))
def test_what_is_dumped_is_read_back(data: dict[str, Any]) -> None:
    read = parse_document(dump_yaml(data), "c").data
    assert read == data
    assert repr(read) == repr(data)


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    assert place_of_refusal(lambda: parse_document(decode(raw, "c"), "c")) != ""


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab:-[]{}&*!|>'\"%@`#?,\n\t \r<=~.0123", max_size=60))
def test_any_syntax_is_read_or_refused(text: str) -> None:
    assert place_of_refusal(lambda: parse_document(text, "c")) != ""
