"""Reading jsonl: what is accepted, and the laws of the reader for any bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rnow.config.schema import DatasetSource
from rnow.errors import DataError, InputError
from rnow.project.faults import excerpt
from rnow.project.json_text import JsonFault, parse
from rnow.project.jsonl import read_rows as read_source_rows
from rnow.project.row_file import RowFile
from rnow.project.rows import RowRules
from rnow.text.json_values import to_json_value
from rnow.text.strict_json import position_of

RULES = RowRules(dataset_type="distill", known_rewards={"accuracy"})
GOOD = b'{"messages": [{"role": "user", "content": "Hi"}]}'


def read_rows(path: Path, rules: RowRules) -> RowFile:
    return read_source_rows(path, DatasetSource(path=path.name), rules)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (GOOD, [1]),
        (GOOD + b"\n" + GOOD + b"\n", [1, 2]),
        (b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, [1, 2]),
        (GOOD + b"\r\n" + GOOD + b"\r\n", [1, 2]),
        (b"\n" + GOOD + b"\n\n  \t\n" + GOOD + b"\n\n\n", [2, 5]),
        (b"  " + GOOD + b"  \n", [1]),
    ],
)
def test_accepted_files(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    file = read_rows(write(tmp_path, content), RULES)
    assert [row.line for row in file.rows] == lines
    assert all(row.messages == ({"role": "user", "content": "Hi"},) for row in file.rows)
    assert file.warnings == ()


def test_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x0bd"
    row = json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False)
    (read,) = read_rows(write(tmp_path, row.encode()), RULES).rows
    assert read.messages[0]["content"] == text


def test_all_keys_of_a_row(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Speak $language."},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "assistant", "tool_calls": [{"id": "2"}], "extra": {"kept": True}},
            {"role": "tool", "content": "", "tool_call_id": "1"},
            {"role": "user", "content": [{"type": "text", "text": "$language, $$x$$ and $y$"}]},
        ],
        "rewards": ["accuracy"],
        "tools": [],
        "metadata": {"answer": [1, None]},
        "variables": {"language": "French", "y": "never"},
        "docker": None,
    }
    (read,) = read_rows(write(tmp_path, json.dumps(row).encode()), RULES).rows
    assert [message["content"] for message in read.messages] == [
        "Speak French.",
        "",
        "",
        "",
        [{"type": "text", "text": "French, $$x$$ and $y$"}],
    ]
    assert read.messages[2]["extra"] == {"kept": True}
    assert read.messages[3]["tool_call_id"] == "1"
    assert (read.rewards, read.tools) == (("accuracy",), ())
    assert read.metadata == {"answer": [1, None]}
    assert read.variables == {"language": "French", "y": "never"}


def test_null_stands_for_an_absent_key(tmp_path: Path) -> None:
    keys = dict.fromkeys(("rewards", "tools", "metadata", "variables", "docker_env"))
    row = json.loads(GOOD) | keys
    (read,) = read_rows(write(tmp_path, json.dumps(row).encode()), RULES).rows
    assert (read.rewards, read.tools, read.metadata, read.variables) == ((), None, {}, {})


def test_unknown_keys_are_told_once(tmp_path: Path) -> None:
    row = json.dumps(json.loads(GOOD) | {"reward": 1, "id": 7}).encode()
    file = read_rows(write(tmp_path, row + b"\n" + row), RULES)
    assert file.warnings == (
        'train.jsonl: these keys of its rows are ignored: "id", "reward" (did you mean rewards?)',
    )


def test_tools_are_unchecked_when_they_are_not_known(tmp_path: Path) -> None:
    row = json.dumps(json.loads(GOOD) | {"tools": ["anything"]}).encode()
    rules = RowRules(dataset_type="distill", known_tools=None)
    (read,) = read_rows(write(tmp_path, row), rules).rows
    assert read.tools == ("anything",)


def test_an_unreadable_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "absent.jsonl", RULES)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
plain_messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "tool"]), "content": texts},
    optional={"name": texts},
)
valid_rows = st.fixed_dictionaries(
    {"messages": st.lists(plain_messages, min_size=1, max_size=3)},
    optional={
        "rewards": st.just(["accuracy"]),
        "tools": st.just([]),
        "metadata": st.dictionaries(texts, values, max_size=3),
    },
)


@given(
    rows=st.lists(valid_rows, min_size=1, max_size=4),
    ascii_only=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
    last_end=st.booleans(),
)
def test_valid_rows_come_back_as_they_were(
    rows: list[dict[str, Any]], ascii_only: bool, end: str, bom: bool, last_end: bool
) -> None:
    text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    text += end if last_end else ""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), text.encode("utf-8-sig" if bom else "utf-8"))
        file = read_rows(path, RULES)
    assert [list(row.messages) for row in file.rows] == [row["messages"] for row in rows]
    assert [row.metadata for row in file.rows] == [
        to_json_value(row.get("metadata", {})) for row in rows
    ]
    assert [list(row.rewards) for row in file.rows] == [row.get("rewards", []) for row in rows]
    assert [row.line for row in file.rows] == list(range(1, len(rows) + 1))


@settings(max_examples=300)
@given(
    content=st.binary(max_size=60)
    | st.text('{}[]",:\\u0dD8NaInfity1e9.- \n', max_size=40).map(str.encode)
)
@example(content=b'{"a":{"a":1,"a":')
@example(content=b'{"a\\":NaN":NaN}')
@example(content=b'"\\ud800\\ud800\\udc00"')
@example(content=b"\x00\n\x00")
def test_any_bytes_give_rows_or_an_input_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        try:
            assert read_rows(path, RULES).rows
        except InputError as error:
            for line in error.render().splitlines():
                assert line.isprintable()


@given(row=valid_rows, cut=st.integers(min_value=1, max_value=40))
def test_a_cut_last_line_is_called_cut(row: dict[str, Any], cut: int) -> None:
    text = json.dumps(row)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), GOOD + b"\n" + text[: -min(cut, len(text) - 1)].encode())
        with pytest.raises(DataError) as caught:
            read_rows(path, RULES)
    assert "line 2" in caught.value.details[0]
    assert "cut short" in caught.value.details[0]


@given(value=values)
def test_the_strict_parser_agrees_with_the_standard_one(value: Any) -> None:
    text = json.dumps(value)
    assert parse(text) == json.loads(text) == value


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    found = [(path, value)]
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, child in children:
        found += _paths(child, (*path, step))
    return found


@given(value=values, indent=st.sampled_from([None, 1]))
def test_a_column_points_at_its_value(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    decoder = json.JSONDecoder()
    for path, expected in _paths(value):
        found, _ = decoder.raw_decode(text, position_of(text, path))
        assert found == expected
    assert position_of(text, ("no", "such", "path")) >= 0


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ('{"a": {"b": 1}, "c": {"b": 2}}', None),
        ('{"a": {"b": 1, "b": 2}}', 16),
        ('[{"x": 1}, {"x": [{"y": 1, "y": 1}]}]', 28),
        ('{"\\u0061": 1, "a": 2}', 15),
    ],
)
def test_duplicate_keys(text: str, column: int | None) -> None:
    if column is None:
        parse(text)
        return
    with pytest.raises(JsonFault, match="twice") as caught:
        parse(text)
    assert caught.value.column == column


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ('"\\ud83d\\ude00"', None),
        ('"\\\\ud83d"', None),
        ('"\\ud83d"', 2),
        ('"\\ude00\\ud83d"', 2),
        ('"\\ud83d\\ude00\\uDEAD"', 14),
    ],
)
def test_lone_surrogates(text: str, column: int | None) -> None:
    if column is None:
        parse(text)
        return
    with pytest.raises(JsonFault, match="surrogate") as caught:
        parse(text)
    assert caught.value.column == column


@settings(max_examples=50)
@given(text=st.text(max_size=150), column=st.integers(min_value=1, max_value=320))
def test_excerpts_are_short_and_printable(text: str, column: int) -> None:
    shown = excerpt(text, column)
    assert len(shown) <= 126
    assert shown.isprintable()


def test_an_excerpt_holds_its_column() -> None:
    text = "".join(chr(0x4E00 + n) for n in range(300))
    hidden = "".join(chr(0xE0001 + n) for n in range(100))
    for column in range(1, 301):
        assert text[column - 1] in excerpt(text, column)
    for column in range(1, 101):
        assert f"\\U{ord(hidden[column - 1]):08x}" in excerpt(hidden, column)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    assert parse(opening * 100 + "1" + closing * 100)
    for depth in (101, 500, 900):
        with pytest.raises(JsonFault, match="nested too deeply"):
            parse(opening * depth + "1" + closing * depth)
    assert len(parse("[" + ",".join(["[1]"] * 500) + "]")) == 500
