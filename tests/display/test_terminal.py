"""The pure pieces of terminal output."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.display.terminal import (
    bar,
    escape_control,
    format_bytes,
    format_clock,
    format_number,
    format_rate,
    format_seconds,
    one_line,
    shorten,
    sparkline,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümlaut 漢字", "plain ümlaut 漢字"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\x9b31mC1", "\\x9b31mC1"),
        ("bell\x07 back\x08 cr\r", "bell\\x07 back\\x08 cr\\x0d"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
    ],
)
def test_escape_control(text: str, shown: str) -> None:
    assert escape_control(text) == shown


def test_what_is_left_out_is_counted() -> None:
    assert shorten("x" * 10, 10) == "x" * 10
    assert shorten("x" * 1_210, 10) == "x" * 10 + " [... 1,200 more characters]"


def test_one_line_is_as_long_as_asked_for() -> None:
    assert one_line(" two\n lines\t", 9) == "two lines"
    assert one_line("two lines and more", 9) == "two li..."
    assert one_line("a" + " " * 100 + "b", 9) == "a..."


@given(st.text(), st.integers(3, 12))
def test_one_line_holds_to_its_limit(text: str, limit: int) -> None:
    shown = one_line(text, limit)
    assert len(shown) <= limit
    assert shown == " ".join(text.split()) or shown.endswith("...")


@given(st.text())
def test_escaped_text_has_no_control_characters_and_encodes(text: str) -> None:
    shown = escape_control(text)
    shown.encode("utf-8")
    assert all(
        character.isprintable() or ord(character) >= 0xA0
        for character in shown
        if character not in "\n\t"
    )


def test_sparkline_spans_its_range() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0], unicode=False) == "#_"
    assert sparkline([1, 1, 1]) == "▁▁▁"
    assert sparkline([math.nan, 0, math.inf, 1]) == " ▁ █"
    assert sparkline([math.nan]) == " "
    assert sparkline([]) == ""
    assert sparkline([5, 0, 1], width=2) == "▁█"
    assert sparkline([5.0], scale=[0, 10]) == "▅"


@given(st.lists(st.floats(), max_size=50), st.integers(0, 30), st.booleans())
def test_sparkline_has_one_mark_per_value(values: list[float], width: int, unicode: bool) -> None:
    assert len(sparkline(values, width=width, unicode=unicode)) == min(len(values), width)


def test_bar() -> None:
    assert bar(0.5, 4) == "██"
    assert bar(1.7, 4) == "████"
    assert bar(-1, 4) == ""
    assert bar(math.nan, 4) == ""
    assert bar(0.5625, 4) == "██▎"
    assert bar(0.5, 4, unicode=False) == "##"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.41236, "0.412"),
        (-0.0271, "-0.027"),
        (12.345, "12.3"),
        (123.4, "123"),
        (0.00034, "3.4e-04"),
        (1e-5, "1e-05"),
        (12345.0, "1.2e+04"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_format_number(value: float, shown: str) -> None:
    assert format_number(value) == shown


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_numbers_fit_their_column(value: float) -> None:
    assert len(format_number(value)) <= 8


def test_rates_and_times() -> None:
    assert format_rate(812.4) == "812"
    assert format_rate(12_345) == "12.3k"
    assert format_rate(123_456) == "123k"
    assert format_rate(math.inf) == "-"
    assert [format_seconds(s) for s in (0.021, 12.34, 250)] == ["0.02s", "12.3s", "250s"]
    assert [format_clock(s) for s in (42, 3723, 180_000, math.nan)] == [
        "0:42",
        "1:02:03",
        "2d 02:00",
        "-:--",
    ]


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (99_910_000_000, "99.9 GB"),
        (99_960_000_000, "100 GB"),
        (65.5e9, "65.5 GB"),
        (3.2e14, "320 TB"),
    ],
)
def test_sizes_are_short(amount: float, text: str) -> None:
    assert format_bytes(amount) == text
