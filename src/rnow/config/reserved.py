"""Values that the schema knows and this version does not implement: refused, never ignored.

Which values those are is said where a key is declared (schema.py), and goes from there when the feature is built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rnow.config.schema import KEYS
from rnow.errors import NotYetSupported

if TYPE_CHECKING:
    from rnow.config.schema import Schema

RESERVED = {name: said.reserved for name, said in KEYS.items() if said.reserved}


def value_at(config: Schema, key: str) -> object:
    """The value of a dotted key; None inside an absent section."""
    value: object = config
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def refuse_value(key: str, value: object, where: str) -> None:
    """Raise NotYetSupported for a value that does nothing yet."""
    reserved = RESERVED.get(key)
    if reserved is not None and reserved.refuses(value):
        raise NotYetSupported(
            f"{key}: {_shown(value)} is not supported yet",
            where=where,
            why="the setting is reserved and would do nothing",
            fix=reserved.instead,
        )


def refuse_reserved(config: Schema, where: Callable[[str], str] = str) -> None:
    """Refuse a setting that does nothing yet.

    Args:
        config: a valid config.
        where: names the place of a key; the key itself by default.

    Raises NotYetSupported for the first such setting.
    """
    for key in RESERVED:
        refuse_value(key, value_at(config, key), where(key))


def _shown(value: object) -> str:
    return "a teacher for one dataset" if isinstance(value, tuple) else str(value)
