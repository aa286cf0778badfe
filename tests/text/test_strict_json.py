"""Strict JSON: what is refused, where it stands, and that the rest is what the standard library reads."""

from __future__ import annotations

import json

import pytest

from rnow.text.strict_json import JsonError, position_of_fault, read_json, read_json_at


@pytest.mark.parametrize(
    ("text", "kind", "message", "place"),
    [
        ("", "syntax", "Expecting value (character 0)", 0),
        ("  {1}", "syntax", "Expecting property name", 3),
        ("{} x", "syntax", "something follows the value (character 2)", 3),
        ('{"a": 1, "b": [1], "a": 2}', "duplicate", "a key is given twice", 19),
        ('["NaN", NaN]', "constant", "NaN is no JSON number", 8),
        ('{"-Infinity": -Infinity}', "constant", "-Infinity is no JSON number", 14),
        ('["1e999", 1e999]', "number", "a number is too large", 10),
        ("[1, " + "9" * 5000 + "]", "digits", "a number has too many digits", 4),
        ("[" * 101 + "1" + "]" * 101, "depth", "nested more than 100 deep", 0),
        ("[" * 100_000, "depth", "nested more than 100 deep", 0),
    ],
)
def test_refused(text: str, kind: str, message: str, place: int) -> None:
    with pytest.raises(JsonError) as caught:
        read_json(text)
    assert caught.value.kind == kind
    assert message in str(caught.value)
    assert position_of_fault(text, caught.value)[0] == place


def test_reading_at_a_position() -> None:
    text = 'call: {"a": [1, "}"]} and more'
    assert read_json_at(text, 6) == ({"a": [1, "}"]}, 21)
    with pytest.raises(JsonError, match=r"\(character 6\)"):
        read_json_at('x {"a": }', 2)


def test_depth_is_given_and_exact() -> None:
    assert read_json("[[1]]", max_depth=2) == [[1]]
    with pytest.raises(JsonError, match="nested more than 1 deep"):
        read_json("[[1]]", max_depth=1)
    assert read_json("[" + ",".join(["[1]"] * 50) + "]", max_depth=2) == [[1]] * 50


def test_lone_surrogates_are_replaced_and_pairs_stay() -> None:
    text = '{"a\\ud800": ["\\ud83d\\ude00", "\\udead", "\\\\ud83d"]}'
    assert read_json(text) == {"a\ufffd": ["\U0001f600", "\ufffd", "\\ud83d"]}


def test_blanks_are_json_blanks() -> None:
    assert read_json("\t\r\n 1 \n") == 1
    with pytest.raises(JsonError):
        read_json("\u00a01")
    assert read_json(json.dumps({"a": [None, True, 1.5]})) == {"a": [None, True, 1.5]}
