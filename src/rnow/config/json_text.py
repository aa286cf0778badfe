"""config.json: the same strictness as YAML, with the same positions."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rnow.config.strict_yaml import Document, Position, fault, parse_document, split_lines
from rnow.errors import ConfigError


def parse_json_document(text: str, name: str) -> Document:
    """Parse a JSON config. The values are JSON's; a YAML pass over the same text finds the places and duplicates.

    A raw tab cannot stand inside a JSON string, so tabs become spaces for that pass without changing any column.
    """
    if not text.strip():
        raise ConfigError(
            "the file is empty", where=name, fix="rnow init writes a config to start from"
        )
    lines = split_lines(text)

    def refuse(constant: str) -> NoReturn:
        raise ConfigError(f"{constant} is not a number in JSON", where=name)

    try:
        data: Any = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise fault(
            f"not valid JSON: {error.msg}",
            name,
            lines,
            Position(line=error.lineno, column=error.colno),
        ) from None
    except (RecursionError, ValueError):
        raise ConfigError("nested too deep, or a number too long", where=name) from None
    document = parse_document(text.replace("\t", " "), name)
    return Document(data=data, keys=document.keys, values=document.values, lines=lines)
