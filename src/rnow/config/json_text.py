"""config.json: the same strictness as YAML, with the same positions."""

from __future__ import annotations

from rnow.config.strict_yaml import Document, Position, fault, parse_document, split_lines
from rnow.errors import ConfigError
from rnow.text.strict_json import JsonError, read_json


def parse_json_document(text: str, name: str) -> Document:
    """Parse a JSON config. The values are JSON's; a YAML pass over the same text finds the places and duplicates.

    A raw tab cannot stand inside a JSON string, so tabs become spaces for that pass without changing any column.
    """
    if not text.strip():
        raise ConfigError(
            "the file is empty", where=name, fix="rnow init writes a config to start from"
        )
    lines = split_lines(text)
    data: object = None
    try:
        data = read_json(text)
    except JsonError as error:
        # A key that is given twice is found again below, with the lines of both.
        if error.kind != "duplicate":
            raise _refusal(error, text, name, lines) from None
    document = parse_document(text.replace("\t", " "), name)
    return Document(
        data=data if isinstance(data, dict) else {},
        keys=document.keys,
        values=document.values,
        lines=lines,
    )


def _refusal(error: JsonError, text: str, name: str, lines: tuple[str, ...]) -> ConfigError:
    if error.kind == "syntax":
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        place = Position(line=line, column=column)
        return fault(f"not valid JSON: {error.what}", name, lines, place)
    if error.kind == "constant":
        return ConfigError(f"{error.what} is not a number in JSON", where=name)
    return ConfigError("nested too deep, or a number too long", where=name)
