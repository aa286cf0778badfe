"""JSON as it must be written in files and by models: what the standard library also lets through is refused.

The text is decoded once, by the standard decoder with hooks that only notice. Where something stands is looked up
afterwards, in the few texts that are faulty (``position_of_fault``, ``position_of``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Literal, NoReturn

MAX_DEPTH = 100

JsonPath = tuple[str | int, ...]
JsonFaultKind = Literal["syntax", "duplicate", "constant", "number", "digits", "depth"]

_BLANK = re.compile(r"[ \t\n\r]*")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)
_SURROGATE = re.compile("\\\\u[dD]|[\ud800-\udfff]")
_LONGEST_INTEGER = 4000


class JsonError(ValueError):
    """A text is not strict JSON.

    Attributes:
        kind: ``syntax`` (what the standard library refuses), ``duplicate`` (a key twice in one object), ``constant`` (NaN,
            Infinity), ``number`` (beyond a float), ``digits`` (an integer of thousands of digits), ``depth``.
        what: the decoder's words for ``syntax``, the text at fault for ``constant`` and ``number``, else "".
        position: index into the text for ``syntax``; 0 for the others, see ``position_of_fault``.
    """

    def __init__(
        self, message: str, kind: JsonFaultKind, *, what: str = "", position: int = 0
    ) -> None:
        super().__init__(message)
        self.kind: JsonFaultKind = kind
        self.what = what
        self.position = position


def read_json(text: str, *, max_depth: int = MAX_DEPTH) -> object:
    """The value of a text that holds one JSON value and JSON's blanks around it.

    Raises:
        JsonError: see ``read_json_at``, or something follows the value.
    """
    value, end = read_json_at(text, _skip(text, 0), max_depth=max_depth)
    rest = _skip(text, end)
    if rest < len(text):
        message = f"something follows the value (character {end})"
        raise JsonError(message, "syntax", what="Extra data", position=rest)
    return value


def read_json_at(text: str, start: int, *, max_depth: int = MAX_DEPTH) -> tuple[object, int]:
    """The JSON value that starts at ``start``, and where it ends. Lone surrogates come out as U+FFFD: JSON can spell them,
    and no tokenizer and no file takes them.

    Raises:
        JsonError: not JSON, a key twice in one object, NaN or infinity, a number that no float or integer holds, or
            nested more than ``max_depth`` deep.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        message = f"{error.msg} (character {max(0, error.pos - start)})"
        raise JsonError(message, "syntax", what=error.msg, position=error.pos) from error
    except RecursionError as error:
        raise _too_deep(max_depth) from error
    except JsonError:
        raise
    except ValueError as error:  # Python's limit on the digits of an integer
        raise JsonError("a number has too many digits", "digits") from error
    # What the decoder takes, a later recursion (copying, encoding) might not.
    if text.count("[", start, end) + text.count("{", start, end) > max_depth:
        _check_depth(value, max_depth)
    return (_mended(value) if _SURROGATE.search(text, start, end) else value), end


def mend_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined and lone ones replaced by U+FFFD; other text unchanged."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def position_of(text: str, path: JsonPath) -> int:
    """Where the value at ``path`` begins in valid JSON, or the nearest parent that exists."""
    best, depth = 0, 0
    for is_key, place, position in _walk(text):
        if not is_key and len(place) >= depth and place == path[: len(place)]:
            best, depth = position, len(place)
    return best


def position_of_fault(text: str, error: JsonError) -> tuple[int, str]:
    """Where ``text`` is at fault, and the token that stands there ("" for ``depth``, which has no one place)."""
    if error.kind in ("syntax", "depth"):
        return error.position, ""
    seen: set[JsonPath] = set()
    for is_key, place, position in _walk(text):
        token = _token_at(text, position)
        if is_key and error.kind == "duplicate":
            if place in seen:
                return position, token
            seen.add(place)
        elif not is_key and (token == error.what or _is_long(token, error.kind)):
            return position, token
    return 0, ""


def _walk(text: str) -> Iterator[tuple[bool, JsonPath, int]]:
    """Every key (True) and value (False) with its path and position, in order. The text is JSON but for its faults."""
    open_with: list[str] = []
    path: list[str | int] = []
    at_key = False
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in ("}", "]"):
            if open_with:
                open_with.pop()
                path.pop()
        elif token == ",":
            at_key = open_with[-1:] == ["{"]
            if path and not at_key:
                path[-1] = int(path[-1]) + 1
        elif token == ":":
            at_key = False
        elif at_key and token[0] == '"':
            path[-1] = json.loads(token, strict=False)
            yield True, tuple(path), match.start()
        else:
            yield False, tuple(path), match.start()
            if token in ("{", "["):
                open_with.append(token)
                path.append("" if token == "{" else 0)
                at_key = token == "{"


def _is_long(token: str, kind: JsonFaultKind) -> bool:
    return kind == "digits" and token[0] != '"' and len(token) > _LONGEST_INTEGER


def _token_at(text: str, position: int) -> str:
    match = _TOKEN.match(text, position)
    return match.group() if match else ""


def _skip(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


def _too_deep(limit: int) -> JsonError:
    return JsonError(f"nested more than {limit} deep", "depth")


def _check_depth(value: object, limit: int) -> None:
    level = [value]
    for _ in range(limit + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise _too_deep(limit)


def _mended(value: object) -> object:
    if isinstance(value, str):
        return mend_surrogates(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {mend_surrogates(key): _mended(item) for key, item in value.items()}
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise JsonError("a key is given twice in one object", "duplicate")
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonError("a number is too large", "number", what=digits)
    return value


def _refuse(name: str) -> NoReturn:
    raise JsonError(f"{name} is no JSON number", "constant", what=name)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
