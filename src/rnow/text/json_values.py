"""Values as JSON holds them, from tables that hold more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from uuid import UUID

from rnow.text.strict_json import JsonError, JsonPath, read_json


class NoJsonValue(ValueError):
    """``what`` stands at ``path``, and JSON has nothing for it."""

    def __init__(self, path: JsonPath, what: str, fix: str) -> None:
        super().__init__(what)
        self.path = path
        self.what = what
        self.fix = fix


def to_json_value(value: object, path: JsonPath = ()) -> object:
    """``value`` as a JSON file would hold it, keys with null left out: dates, times and UUIDs as text (ISO 8601),
    decimals as numbers.

    Raises:
        NoJsonValue: for bytes, NaN, infinity and anything else.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case float():
            raise NoJsonValue(path, f"{value} is no JSON number", "write null, or leave it out")
        case Mapping():
            return {
                str(key): to_json_value(item, (*path, str(key)))
                for key, item in value.items()
                if item is not None
            }
        case list() | tuple():
            return [to_json_value(item, (*path, index)) for index, item in enumerate(value)]
        case date() | time():  # a datetime is a date
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case UUID():
            return str(value)
        case Decimal() if value.is_finite():
            return int(value) if value == value.to_integral_value() else float(value)
        case bytes():
            raise NoJsonValue(path, "bytes are no JSON value", "store text, e.g. in base64")
    kind = type(value).__name__
    raise NoJsonValue(path, f"a value of type {kind} is no JSON value", "store text or numbers")


def read_arguments(arguments: object) -> dict[str, object] | None:
    """The arguments of a call, given as an object or (as OpenAI has it) as JSON text; None for anything else."""
    if isinstance(arguments, str):
        try:
            arguments = to_json_value(read_json(arguments)) if arguments.strip() else {}
        except JsonError:
            return None
    return arguments if isinstance(arguments, dict) else None
