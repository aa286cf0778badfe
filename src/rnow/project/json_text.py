"""Strict JSON for one line of text, with the column of whatever is wrong."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from rnow.text.strict_json import JsonError, position_of_fault, read_json

_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<hit>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)


@dataclass(eq=False)
class JsonFault(Exception):
    """The text is not strict JSON. ``column`` counts characters from 1; ``cut`` = it ends too early."""

    message: str
    column: int
    fix: str = "write one JSON object per line"
    cut: bool = False


def parse(text: str) -> object:
    """The value of ``text``. Raises JsonFault for anything that is not strict JSON, lone surrogates included."""
    try:
        value = read_json(text)
    except JsonError as error:
        raise _fault(text, error) from None
    if "\\ud" in text or "\\uD" in text:
        for match in _SURROGATE.finditer(text):
            if match["hit"]:
                message = f"{match['hit']} is half a character (a lone surrogate)"
                fix = "write the whole character, or remove the escape"
                raise JsonFault(message, match.start() + 1, fix=fix)
    return value


def _fault(text: str, error: JsonError) -> JsonFault:
    position, token = position_of_fault(text, error)
    column = position + 1
    match error.kind:
        case "syntax":
            return _syntax_fault(text, error, column)
        case "duplicate":
            key = json.dumps(json.loads(token), ensure_ascii=False)
            return JsonFault(f"the key {key} appears twice", column, fix="keep one of the two")
        case "constant":
            fix = "write null, or leave the key out"
            return JsonFault(f"{token} is not JSON", column, fix=fix)
        case "number" | "digits":
            return JsonFault("the number is too large", column, fix="write it as a string")
        case "depth":
            return JsonFault("nested too deeply", column, fix="nest less deeply")


def _syntax_fault(text: str, error: JsonError, column: int) -> JsonFault:
    body = text.strip()
    at_end = error.position >= len(text.rstrip()) or error.what.startswith("Unterminated string")
    # Cut inside a literal or an escape, the decoder points at its start.
    at_end = at_end or (body.startswith("{") and not body.endswith("}"))
    message = error.what[:1].lower() + error.what[1:]
    return JsonFault(message.removesuffix(" starting at"), column, cut=at_end)
