"""What a docstring says of a function and of its parameters, in the three styles that people write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_PARAMETERS = frozenset(
    {"args", "arguments", "parameters", "params", "keyword args", "keyword arguments", "other parameters"}
)  # fmt: skip
_LEFT_OUT = frozenset({"returns", "return", "raises", "yields", "yield"})
_HEADING = re.compile(r"(?P<name>[A-Za-z]+(?: [A-Za-z]+)?):?\s*")
_GOOGLE_ITEM = re.compile(r"\*{0,2}(?P<name>\w+)\s*(?:\([^)]*\))?\s*:\s*(?P<text>.*)")
_NUMPY_ITEM = re.compile(r"\*{0,2}(?P<names>\w+(?:\s*,\s*\w+)*)\s*(?::.*)?")
_REST_ITEM = re.compile(
    r":(?P<what>param|parameter|arg|argument|key|keyword|type|raises?|except|exception|returns?|rtype)"
    r"\b(?P<rest>[^:]*):\s*(?P<text>.*)"
)


@dataclass(slots=True)
class Docstring:
    """``description`` is everything but the sections on parameters, results and exceptions."""

    description: str = ""
    parameters: dict[str, str] = field(default_factory=dict)


def read_docstring(text: str) -> Docstring:
    """Read a docstring whose indentation is cleaned (``inspect.getdoc``). Never raises."""
    found = Docstring()
    kept: list[str] = []
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        line = lines[index]
        if item := _REST_ITEM.fullmatch(line.strip()):
            end = _end_of_item(lines, index)
            words = [item["text"], *lines[index + 1 : end]]
            names = item["rest"].split()
            if item["what"].startswith(("param", "arg", "key")) and names:
                found.parameters[names[-1].lstrip("*")] = _joined(words)
            index = end
            continue
        section = _section(lines, index)
        if section is None:
            kept.append(line)
            index += 1
            continue
        name, body, underlined = section
        end = _end_of_section(lines, body, underlined)
        if name in _PARAMETERS:
            read = _numpy_items if underlined else _google_items
            found.parameters.update(read(lines[body:end]))
        index = end
    found.description = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return found


def _section(lines: list[str], index: int) -> tuple[str, int, bool] | None:
    """(name, first line of the body, whether it is underlined) when a known section starts at ``index``."""
    line = lines[index]
    heading = _HEADING.fullmatch(line)
    if heading is None or (name := heading["name"].lower()) not in _PARAMETERS | _LEFT_OUT:
        return None
    following = lines[index + 1] if index + 1 < len(lines) else ""
    if re.fullmatch(r"-{3,}\s*", following):
        return name, index + 2, True
    if line.rstrip().endswith(":") and (following.startswith((" ", "\t")) or not following.strip()):
        return name, index + 1, False
    return None


def _end_of_section(lines: list[str], start: int, underlined: bool) -> int:
    for index in range(start, len(lines)):
        line = lines[index]
        if underlined:
            following = lines[index + 1] if index + 1 < len(lines) else ""
            if line.strip() and re.fullmatch(r"[-=]{3,}\s*", following):
                return index
        elif line.strip() and not line.startswith((" ", "\t")):
            return index
    return len(lines)


def _end_of_item(lines: list[str], start: int) -> int:
    for index in range(start + 1, len(lines)):
        if not lines[index].startswith((" ", "\t")):
            return index
    return len(lines)


def _google_items(lines: list[str]) -> Iterator[tuple[str, str]]:
    indents = [len(line) - len(line.lstrip()) for line in lines if line.strip()]
    least = min(indents, default=0)
    name, words = "", []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        item = _GOOGLE_ITEM.fullmatch(line.strip()) if line.strip() and indent == least else None
        if item is None:
            words.append(line)
            continue
        if name:
            yield name, _joined(words)
        name, words = item["name"], [item["text"]]
    if name:
        yield name, _joined(words)


def _numpy_items(lines: list[str]) -> Iterator[tuple[str, str]]:
    names: list[str] = []
    words: list[str] = []
    for line in [*lines, "end_"]:
        if line.startswith((" ", "\t")) or not line.strip():
            words.append(line)
            continue
        for name in names:
            yield name, _joined(words)
        item = _NUMPY_ITEM.fullmatch(line.strip())
        names = re.split(r"\s*,\s*", item["names"]) if item else []
        words = []


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())
