"""$name substitution, and the mathematics it leaves alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.project.variables import substitute, substitute_message

VALUES = {"name": "Ada", "x": 7, "n_1": "one", "dollar": "$name", "größe": "5"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hi $name!", "Hi Ada!"),
        ("$name$name", "$name$name"),
        ("$name, $name", "Ada, Ada"),
        ("($x)", "(7)"),
        ("$n_1.", "one."),
        ("$names", "$names"),
        ("$unknown", "$unknown"),
        ("$x$", "$x$"),
        ("solve $x$ for $name", "solve $x$ for Ada"),
        ("$$x$$", "$$x$$"),
        ("$$x + 1$$", "$$x + 1$$"),
        ("$x$name", "$x$name"),
        ("costs $5 and $", "costs $5 and $"),
        ("$dollar", "$name"),
        ("\\$ ${x}", "\\$ ${x}"),
        ("$größe", "5"),
    ],
)
def test_substitution(text: str, expected: str) -> None:
    assert substitute(text, VALUES) == expected


@given(st.text("$xa {}"))
def test_text_without_defined_names_is_untouched(text: str) -> None:
    assert substitute(text, {"y": "1"}) == text
    assert substitute(text, {}) == text


def test_messages_keep_their_other_keys_and_are_not_changed_in_place() -> None:
    part = {"type": "text", "text": "$x", "kept": 1}
    message = {"role": "user", "content": [part], "name": "$x"}
    assert substitute_message(message, VALUES) == {
        "role": "user",
        "content": [{"type": "text", "text": "7", "kept": 1}],
        "name": "$x",
    }
    assert part["text"] == "$x"
