"""pydantic's errors in plain words: what was expected, what was given, at which key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rnow.config.problems import KeyPath, Problem
from rnow.config.schema import SECTION, TEXT
from rnow.config.suggest import suggest
from rnow.text.redact import without_user_info

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

# A strict schema of sections gives no other kinds of wrong type.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a section of names, each with a section of its own",
    "model_type": "a section of key: value lines",
}

MISSING: dict[KeyPath, str] = {
    ("dataset_type",): "add the line dataset_type: distill",
    ("model",): "add a model section with path: <HuggingFace id or local folder>",
}

LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ValidationError) -> list[Problem]:
    """One Problem per fault, in the order of the schema; unknown keys come with a suggestion."""
    problems = []
    items = error.errors(include_url=False, include_context=True)
    for item in items:
        path: KeyPath = tuple(part for part in item["loc"] if part not in (TEXT, SECTION))
        inside = any(other["loc"][: len(path)] == path != other["loc"] for other in items)
        if item["type"] == "too_short" and inside:
            continue  # not an empty list: pydantic counts only the entries that were valid
        if item["type"] == "extra_forbidden":
            hint = suggest(path)
            problems.append(Problem(path=path, message="unknown key", hint=hint, unknown=True))
        else:
            problems.append(explain_value(path, item))
    return problems


def explain_value(path: KeyPath, item: ErrorDetails) -> Problem:
    """A wrong value in words."""
    kind, given, context = item["type"], item["input"], item.get("ctx", {})
    message, hint = f"{item['msg']}, got {in_words(given)}", None
    if kind == "missing":
        message, hint = "required, but missing", MISSING.get(path)
    elif kind in EXPECTED:
        expected = EXPECTED[kind]
        if kind == "model_type" and path[:2] == ("data", "train_file"):
            names = "path" if path[-1] == "teacher" else "path and name"
            expected = f"a path, or a section with {names}"
        message = f"expected {expected}, got {in_words(given)}"
        hint = hint_for(path, kind, given)
    elif kind in LIMITS:
        name, words = LIMITS[kind]
        message = f"must be {words} {context[name]:g}, got {in_words(given)}"
    elif kind == "literal_error":
        message = f"expected one of {plain(context['expected'])}, got {in_words(given)}"
        hint = right_case(context["expected"], given)
    elif kind in ("string_too_short", "too_short"):
        message = "must not be empty"
    return Problem(path=path, message=message, hint=hint)


def plain(expected: str) -> str:
    """pydantic's ``'a', 'b' or True`` as ``a, b or true``."""
    return expected.replace("'", "").replace("True", "true").replace("False", "false")


def right_case(expected: str, given: object) -> str | None:
    """The choice that differs from what was given only in its case."""
    for choice in plain(expected).replace(" or ", ", ").split(", "):
        if isinstance(given, str) and given.strip().lower() == choice.lower():
            return f"write {choice}"
    return None


def in_words(value: object) -> str:
    """A value as the user would recognise it, with its type where that is the surprise."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        shown = without_user_info(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f'the text "{shown}"'
    if isinstance(value, int | float):
        shown = str(value)
        return f"the number {shown if len(shown) <= 40 else shown[:37] + '...'}"
    if isinstance(value, Mapping):
        return "a section of key: value lines"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a {type(value).__name__}"


def hint_for(path: KeyPath, kind: str, given: object) -> str | None:
    """What to write instead, when the given value makes it plain."""
    if kind == "string_type" and isinstance(given, bool | int | float):
        word = in_words(given).removeprefix("the number ")
        return f'for text, write "{word}" with quotes'
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f"write {int(given)}"
    if kind == "bool_type" and isinstance(given, str):
        word = given.strip().lower()
        if word in ("yes", "on", "true"):
            return "write true"
        if word in ("no", "off", "false"):
            return "write false"
    if kind == "model_type" and path in (("model",), ("teacher",)) and isinstance(given, str):
        return f"the model belongs to the key {path[0]}.path"
    if (
        kind in ("int_type", "float_type")
        and isinstance(given, str)
        and given.strip().lower() in ("inf", "+inf", "-inf", "infinity", "nan")
    ):
        return "write a finite number"
    if kind in ("int_type", "float_type") and isinstance(given, str) and is_number(given):
        if "_" in given:
            return f"write {given.strip().replace('_', '')}"
        return f"write {given.strip()} without quotes"
    return None


def is_number(text: str) -> bool:
    """Whether the text reads as a plain, finite number, which has ASCII digits in YAML."""
    try:
        return text.isascii() and math.isfinite(float(text))
    except ValueError:
        return False
