"""Secrets are found however they are spelled, and JSON stays JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.errors import InputError
from rnow.text.redact import Redactor, without_user_info

VALUES = st.text(min_size=4, max_size=20).filter(lambda text: not set(text) & set("[X]"))
SPELL = (
    str,
    repr,
    ascii,
    json.dumps,
    quote_plus,
    lambda text: quote(text, safe=""),
    lambda text: json.dumps({"a": json.dumps({"b": text})}),
    lambda text: json.dumps([repr([text])], ensure_ascii=False),
    lambda text: repr([text, "\"'"]),
)


@given(
    VALUES.filter(lambda text: max(text) < "\ud800" or min(text) > "\udfff"), st.sampled_from(SPELL)
)
def test_every_spelling_is_found(value: str, spell: object) -> None:
    assert callable(spell)
    text = f"before {spell(value)} after"
    changed = Redactor({"X": value})(text)
    assert "[X]" in changed
    assert value not in changed.replace("[X]", "")


@given(VALUES, st.sampled_from(["k", "[", "and more"]))
def test_json_stays_json(value: str, beside: str) -> None:
    text = json.dumps({"name": "add", "arguments": {"a": value, beside: [beside + value]}})
    changed = json.loads(Redactor({"X": value})(text))
    assert changed["arguments"]["a"] == "[X]"


def test_a_quote_at_the_end_of_a_value_does_not_take_the_jsons() -> None:
    redact = Redactor({"X": 'abcd"'})
    assert json.loads(redact('{"a": "abcd"}')) == {"a": "abcd"}
    assert json.loads(redact('{"a": "abcd\\""}')) == {"a": "[X]"}


def test_names_cannot_break_anything() -> None:
    assert Redactor({'my "key"': "abcdef"})('{"a": "abcdef"}') == '{"a": "[my__key_]"}'


def test_lines_of_a_long_value() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nshort\n-----END KEY-----\n"
    assert Redactor({"K": key})("x MIIEvQIBADANBg y short") == "x [K] y short"


@dataclass(frozen=True, kw_only=True)
class Record:
    path: str
    count: int


def test_data_and_records() -> None:
    redact = Redactor({"K": "hushhush"})
    given = {"hushhush": ["hushhush", 1, None], "r": Record(path="a/hushhush", count=2)}
    assert redact.data(given) == {"hushhush": ["[K]", 1, None], "r": Record(path="a/[K]", count=2)}
    assert list(redact.data({"hushhush": 1}, keys=True)) == ["[K]"]


def test_errors_leave_without_them() -> None:
    with pytest.raises(InputError) as caught, Redactor({"K": "hushhush"}).errors():
        raise InputError(
            "hushhush", where="hushhush", why="hushhush", fix="hushhush", details=["hushhush"]
        )
    assert "hush" not in caught.value.render() + str(caught.value) + repr(caught.value)
    assert len(re.findall(r"\[K\]", caught.value.render())) == 5


def test_user_info() -> None:
    assert without_user_info("at http://u:p@h:1/a@b, or u@h") == "at http://h:1/a@b, or u@h"
