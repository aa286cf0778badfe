"""Different spellings of the same setting, brought to one. Plain data in, plain data out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from rnow.errors import ConfigError

_USER_INFO = re.compile(r"((?:[A-Za-z][A-Za-z0-9+.-]*://)?)([^\s/?#@]+)@(.*)", re.DOTALL)


class Address(str):
    """An address without its ``user:password@``, which goes into no file: ``full`` has it, for requests."""

    full: str


def hide_user_info(value: str) -> str:
    """An address as an ``Address`` where it names a user; anything else, a command too, as it is."""
    match = _USER_INFO.fullmatch(value)
    if match is None:
        return value
    address = Address(match[1] + match[3])
    address.full = value
    return address


def full_address(value: str) -> str:
    """An address of the config as requests need it."""
    return value.full if isinstance(value, Address) else value


def plain_path(value: object) -> object:
    """A pathlib path as text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def text_or_list(value: object) -> object:
    """One text becomes a list of one, nothing an empty list, a list a tuple."""
    value = plain_path(value)
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(value)
    return (value,)


def none_is(default: object) -> BeforeValidator:
    """Null as another way of leaving a key out, where projects of the hosted service have it."""
    return BeforeValidator(lambda value: default if value is None else value)


def name_sources(value: object) -> object:
    """``train_file`` as a tuple of {path, name, ...} with every source named."""
    if value is None:
        return value
    entries = list(value) if isinstance(value, list | tuple) else [value]
    sources: list[object] = []
    for index, entry in enumerate(entries):
        entry = plain_path(entry)
        if isinstance(entry, str):
            entry = {"path": entry}
        if isinstance(entry, Mapping):
            entry = {**entry, "path": plain_path(entry["path"])} if "path" in entry else dict(entry)
            if entry.get("name") is None:
                entry["name"] = f"dataset_{index}"
        sources.append(entry)
    return tuple(sources)


def one_path(value: object) -> object:
    """A list of one student is that student.

    Raises ConfigError for several: each is a run of its own.
    """
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise several_students(value)
        return plain_path(value[0]) if value else value
    return plain_path(value)


def several_students(paths: Sequence[object]) -> ConfigError:
    """The error for a list of students where there can be one."""
    return ConfigError(
        f"model.path lists {len(paths)} students, and this takes one",
        where="model.path",
        why="`rnow run` and `rnow check` take each of them in turn; what else there is takes one",
        fix=f"name one with -m, e.g. -m {paths[0]}; from Python, make a Config for each",
    )


def path_is_section(value: object) -> object:
    """A path as the section that says no more than that."""
    value = plain_path(value)
    return {"path": value} if isinstance(value, str) else value


def auto_or_bool(value: object) -> object:
    """Refuse 0 and 1, which equal false and true and would pass for them."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError(
            "literal_error", "not one of the choices", {"expected": "'auto', True or False"}
        )
    return value
