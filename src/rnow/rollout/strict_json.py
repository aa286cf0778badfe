"""JSON as the student must write it: what the standard library also lets through is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from rnow.rollout.rendering import mend_surrogates

MAX_DEPTH = 32


class JsonError(ValueError):
    """What is wrong with a text, in words for the student."""


def read_json(text: str) -> Any:
    """The value of a text that holds one JSON value and blanks around it.

    Raises:
        JsonError: see ``read_json_at``, or something follows the value.
    """
    start = len(text) - len(text.lstrip())
    value, end = read_json_at(text, start)
    if text[end:].strip():
        raise JsonError(f"something follows the value (character {end})")
    return value


def read_json_at(text: str, position: int) -> tuple[Any, int]:
    """The JSON value that starts at ``position``, and where it ends.

    Raises:
        JsonError: not JSON, a key twice in one object, NaN or infinity, numbers of thousands of digits, or nested more
            than 32 deep.
    """
    try:
        value, end = _DECODER.raw_decode(text, position)
        return _mended(value, 0), end
    except json.JSONDecodeError as error:
        raise JsonError(f"{error.msg} (character {max(0, error.pos - position)})") from error
    except RecursionError as error:
        raise JsonError(f"nested more than {MAX_DEPTH} deep") from error
    except JsonError:
        raise
    except ValueError as error:  # Python's limit on the digits of an integer
        raise JsonError("a number has too many digits") from error


def _mended(value: Any, depth: int) -> Any:
    """Lone surrogates replaced: JSON can spell them, and no tokenizer and no file takes them."""
    if depth > MAX_DEPTH:
        raise JsonError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return mend_surrogates(value)
    if isinstance(value, list):
        return [_mended(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {mend_surrogates(key): _mended(item, depth + 1) for key, item in value.items()}
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise JsonError("a key is given twice in one object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError("a number is too large")
    return value


def _refuse(text: str) -> Any:
    raise JsonError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse)
