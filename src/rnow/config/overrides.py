"""``key=value`` settings of the command line, laid over the file."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rnow.config.places import COMMAND_LINE
from rnow.config.problems import KeyPath, dotted
from rnow.config.schema import LISTS, SECTION_NAMES, field_at, key_of
from rnow.config.strict_yaml import NULL, parse_value
from rnow.errors import ConfigError
from rnow.text.redact import without_user_info

SHORTHANDS = {
    "model": "model.path",
    "epochs": "trainer.num_epochs",
    "batch_size": "data.batch_size",
    "lr": "trainer.learning_rate",
    "max_context_window": "rollout.max_context_window",
    "name": "model.name",
}
"""Flags of ``rnow run`` and the keys they set. Put them before the dotted overrides, which win."""


MCP_URL = ("rollout", "mcp_url")
"""One text, or a list: one is taken as it stands, as a command has a colon (``stdio: program``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One setting: the path of its key and the typed value."""

    path: KeyPath
    value: object


def parse_override(text: str) -> Override:
    """``trainer.learning_rate=2e-5`` -> path and value.

    The value is YAML (``[a.jsonl, b.jsonl]`` is a list), except that a key which wants text takes it as it stands:
    ``model.name=2024`` needs no quotes.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    # Lone surrogates are how Python passes on bytes of another encoding.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(
            "an override is not UTF-8", where=COMMAND_LINE, fix="use a UTF-8 terminal"
        )
    if not equals or not all(key.split(".")):
        message = f'"{key}" is not a key' if key else f'"{text}" has no key before the ='
        raise ConfigError(
            message if equals else f'"{text}" is not an override',
            where=COMMAND_LINE,
            fix="write key=value, for example trainer.learning_rate=2e-5",
        )
    path = tuple(key.split("."))
    _refuse_inside_list(path, key)
    plain = not NULL.fullmatch(value) and not value.startswith(('"', "'", "["))
    if plain and (wants_text(path) or path == MCP_URL):
        return Override(path=path, value=value)
    if len(path) > 1 and field_at(path[:1]) is not None and path[0] not in SECTION_NAMES:
        raise ConfigError(f"{path[0]} is not a section", where=f"{COMMAND_LINE} ({key})")
    try:
        return Override(path=path, value=parse_value(value, COMMAND_LINE))
    except ConfigError as error:
        raise ConfigError(
            f"{value} is not a YAML value: {error.message.removeprefix('not valid YAML: ')}",
            where=f"{COMMAND_LINE} ({key})",
            fix=f"put quotes around it: '{key}=\"{value}\"'",
        ) from None


def _refuse_inside_list(path: KeyPath, key: str) -> None:
    """A list is set as a whole: its entries have no names."""
    for name, item in LISTS.items():
        outer = tuple(name.split("."))
        if path[: len(outer)] == outer and len(path) > len(outer):
            first = next(iter(item.model_fields))
            raise ConfigError(
                f"{name} is a list, of which no entry can be set alone",
                where=f"{COMMAND_LINE} ({key})",
                fix=f"give the whole list: {name}='[{{{first}: ...}}]'",
            )


def apply_overrides(data: dict[str, object], overrides: Sequence[Override]) -> dict[str, object]:
    """A copy of ``data`` with the overrides in place; absent sections are created."""
    result = dict(data)
    for override in overrides:
        _set(result, override)
    return result


def _set(data: dict[str, object], override: Override) -> None:
    *outer, last = override.path
    for depth, part in enumerate(outer):
        inner = data.get(str(part))
        if inner is not None and not isinstance(inner, dict):
            raise ConfigError(
                f"{dotted(override.path[: depth + 1])} is not a section, so {dotted(override.path)} cannot be set",
                where=f"{COMMAND_LINE} ({dotted(override.path)})",
            )
        data[str(part)] = data = dict(inner or {})
    data[str(last)] = override.value


def lookup(data: object, path: KeyPath) -> tuple[bool, object]:
    """Whether the path is set, and its value."""
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False, None
        data = data[part]
    return True, data


def dotted_values(data: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The dotted key of each value of a config as plain data, and the value; what is not set is left out."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from dotted_values(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def describe_changes(before: dict[str, object], overrides: Sequence[Override]) -> list[str]:
    """``trainer.learning_rate: 0.0001 (default) -> 2e-5`` for every key whose value the command line changed."""
    last = {override.path: override.value for override in overrides}
    lines = []
    for path, value in last.items():
        known, old = lookup(before, path)
        shown = show(old) if known else show_default(path)
        if shown != show(value):
            lines.append(f"{dotted(path)}: {shown} -> {show(value)}")
    return lines


def show(value: object) -> str:
    """A value as one would write it in YAML, on one line."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return re.sub(r"e([-+])0*", lambda m: "e" + m[1].replace("+", ""), repr(value))
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
    return without_user_info(str(value))


def show_default(path: KeyPath) -> str:
    """The schema's default of a key that the file does not set."""
    field = field_at(path)
    if field is None or field.is_required():
        return "not set"
    said = key_of(field)
    if said is not None and said.default_text is not None:
        return f"{said.default_text.replace('`', '')} (default)"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "not set" if default is None else f"{show(default)} (default)"


def wants_text(path: KeyPath) -> bool:
    """Whether the key holds free text (or text or nothing)."""
    field = field_at(path)
    return field is not None and _is_text(field.annotation)


def _is_text(annotation: object) -> bool:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _is_text(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return all(map(_is_text, inner))
    return annotation is str
