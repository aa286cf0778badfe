"""Strict JSON for one line of text, with the column of whatever is wrong.

The standard decoder is lenient where a training file should not be (NaN, duplicate keys, lone surrogates) and forgets
positions. The fast path here parses once with hooks that only notice; positions are looked up afterwards, in the few
lines that are faulty.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

JsonPath = tuple[str | int, ...]

_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<hit>NaN|-?Infinity)')
_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<hit>-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)')
_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|(?P<hit>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
_MAX_DEPTH = 100
_TOO_DEEP = "nested too deeply"
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonFault(Exception):
    """The text is not strict JSON. ``column`` counts characters from 1; ``cut`` = it ends too early."""

    def __init__(
        self,
        message: str,
        column: int,
        *,
        fix: str = "write one JSON object per line",
        cut: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.column = column
        self.fix = fix
        self.cut = cut


class _Noticed(Exception):
    """A hook met something which the decoder would let pass."""


def parse(text: str) -> Any:
    """The value of ``text``. Raises JsonFault for anything that is not strict JSON."""
    try:
        value = _STRICT.decode(text)
    except _Noticed as notice:
        raise _located(text, *notice.args) from None
    except json.JSONDecodeError as error:
        body = text.strip()
        at_end = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        # Cut inside a literal or an escape, the decoder points at its start.
        at_end = at_end or (body.startswith("{") and not body.endswith("}"))
        message = error.msg[:1].lower() + error.msg[1:]
        raise JsonFault(message.removesuffix(" starting at"), error.pos + 1, cut=at_end) from None
    except RecursionError:
        raise JsonFault(_TOO_DEEP, 1, fix="nest less deeply") from None
    except ValueError:
        # Python refuses to build integers of thousands of digits.
        raise _located(text, "number", "") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH and _deeper_than(value, _MAX_DEPTH):
        # What the decoder takes, a later recursion (copying, encoding) might not.
        raise JsonFault(_TOO_DEEP, 1, fix="nest less deeply")
    if "\\ud" in text or "\\uD" in text:
        for match in _SURROGATE.finditer(text):
            if match["hit"]:
                message = f"{match['hit']} is half a character (a lone surrogate)"
                fix = "write the whole character, or remove the escape"
                raise JsonFault(message, match.start() + 1, fix=fix)
    return value


def column_of(text: str, path: JsonPath) -> int:
    """The column (from 1) of the value at ``path`` in valid JSON, or of the nearest parent that exists."""
    best = 1
    depth = 0
    try:
        for kind, place, position in _events(text, _skip(text, 0), ()):
            if kind == "value" and len(place) >= depth and place == path[: len(place)]:
                best, depth = position + 1, len(place)
    except RecursionError:
        pass
    return best


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        if not inner:
            return False
        level = inner
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise _Noticed("constant", name)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Noticed("number", digits)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Noticed("duplicate", "")
    return result


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
)


def _located(text: str, kind: str, what: str) -> JsonFault:
    if kind == "duplicate":
        return _first_duplicate(text)
    if kind == "constant":
        for match in _CONSTANT.finditer(text):
            if match["hit"] == what:
                fix = "write null, or leave the key out"
                return JsonFault(f"{what} is not JSON", match.start() + 1, fix=fix)
    for match in _NUMBER.finditer(text):
        digits = match["hit"]
        if digits and (digits == what or (not what and len(digits) > 4000)):
            fix = "write it as a string"
            return JsonFault("the number is too large", match.start() + 1, fix=fix)
    return JsonFault("a value cannot be read", 1)


def _first_duplicate(text: str) -> JsonFault:
    seen: set[JsonPath] = set()
    try:
        for kind, place, position in _events(text, _skip(text, 0), ()):
            if kind == "key":
                if place in seen:
                    key = json.dumps(place[-1], ensure_ascii=False)
                    fix = "keep one of the two"
                    return JsonFault(f"the key {key} appears twice", position + 1, fix=fix)
                seen.add(place)
    except RecursionError:
        pass
    return JsonFault("a key appears twice", 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _events(text: str, start: int, path: JsonPath) -> Iterator[tuple[str, JsonPath, int]]:
    """Every key and value with its path and position, in order; the return value is where the value ends."""
    yield "value", path, start
    return (yield from _inside(text, start, path))


def _inside(text: str, start: int, path: JsonPath) -> Iterator[tuple[str, JsonPath, int]]:
    opening = text[start : start + 1]
    if opening not in ("{", "["):
        return _DECODER.raw_decode(text, start)[1]
    position = _skip(text, start + 1)
    index = 0
    while text[position : position + 1] not in ("}", "]", ""):
        step: str | int = index
        if opening == "{":
            key_start = position
            step, position = scanstring(text, position + 1, True)
            yield "key", (*path, step), key_start
            position = _skip(text, _skip(text, position) + 1)
        position = yield from _events(text, position, (*path, step))
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        index += 1
    return position + 1
