"""YAML 1.2 as config files need it: no guessing, and the place of every key.

Built on PyYAML's composer, whose nodes carry marks. Only ``true``/``false`` are booleans (``no`` and ``on`` are text),
``1e-5`` is a number, ``010`` is ten, dates are text; duplicate keys, tags, several documents and alias bombs are errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rnow.config.problems import KeyPath, dotted
from rnow.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_VALUES = 20_000
MAX_DEPTH = 20
MAX_DIGITS = 400
SHOWN_WIDTH = 100

NULL = re.compile(r"~|null|Null|NULL|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """1-based line and column of a key or value."""

    line: int
    column: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed file: plain data, where each key stands, and the source lines for excerpts."""

    data: dict[str, object]
    keys: dict[KeyPath, Position] = field(default_factory=dict)
    values: dict[KeyPath, Position] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


class _Refused(yaml.MarkedYAMLError):
    """What YAML allows and a config does not."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, with tags refused, and depth and size limited while reading."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused(f"tags ({shown}) are not allowed", event.start_mark)
        self.depth += 1
        self.count += 1
        if self.count > MAX_VALUES:
            raise _Refused(f"more than {MAX_VALUES} values", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def excerpt(lines: tuple[str, ...], position: Position) -> tuple[str, ...]:
    """The offending line with its number, and a caret under the column; tabs shown as spaces."""
    if not 0 < position.line <= len(lines):
        return ()
    label = f"{position.line} | "
    start = max(0, position.column - SHOWN_WIDTH // 2) if position.column > SHOWN_WIDTH else 0
    shown = lines[position.line - 1][start : start + SHOWN_WIDTH]
    shown = "".join(c if c.isprintable() else ("?" if c != "\t" else " ") for c in shown).rstrip()
    return (label + shown, " " * (len(label) + position.column - 1 - start) + "^")


def fault(
    message: str,
    name: str,
    lines: tuple[str, ...],
    position: Position | None,
    *,
    key: str | None = None,
    fix: str | None = None,
) -> ConfigError:
    """A ConfigError at a place of the file, with the line shown."""
    where = name if position is None else f"{name}:{position.line}:{position.column}"
    return ConfigError(
        message,
        where=f"{where} ({key})" if key else where,
        details=excerpt(lines, position) if position else (),
        fix=fix,
    )


def decode(raw: bytes, name: str) -> str:
    """Bytes to text: UTF-8 with or without a byte order mark, any line ends, at most 1 MB."""
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            f"the file has {len(raw):,} bytes; a config has at most {MAX_BYTES:,}",
            where=name,
            fix="check that this is the config and not the training data",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        before = raw[:offset]
        line_start = before.rfind(b"\n") + 1
        line = before.count(b"\n") + 1
        column = len(before[line_start:].decode("utf-8", "replace")) + 1
        raise ConfigError(
            f"the file is not UTF-8 (byte 0x{raw[offset]:02x})",
            where=f"{name}:{line}:{column}",
            fix="save it as UTF-8",
        ) from None


def split_lines(text: str) -> tuple[str, ...]:
    """Lines as the YAML reader counts them."""
    return tuple(re.split("\r\n|[\r\n\x85\u2028\u2029]", text))


def compose(text: str, name: str) -> Node:
    """The node tree of the one document in ``text``."""
    lines = split_lines(text)
    try:
        composer = _Composer(text)
        try:
            node = composer.get_single_node()
        finally:
            composer.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_fault(error, name, lines) from None
    except yaml.reader.ReaderError as error:
        before = split_lines(text[: error.position])
        raise fault(
            f"a control character (#x{ord(text[error.position]):04x}) is not allowed",
            name,
            lines,
            Position(line=len(before), column=len(before[-1]) + 1),
            fix="remove it",
        ) from None
    if node is None or (isinstance(node, ScalarNode) and node.style is None and not node.value):
        raise ConfigError(
            "the file is empty",
            where=name,
            fix="rnow init writes a config to start from",
        )
    return node


def _syntax_fault(error: yaml.MarkedYAMLError, name: str, lines: tuple[str, ...]) -> ConfigError:
    """PyYAML's complaint as ours."""
    mark = error.problem_mark or error.context_mark
    if error.context_mark and mark and not "".join(lines[mark.line : mark.line + 1]).strip():
        mark = error.context_mark  # at the end of the file: show what was left open instead
    position = Position(line=mark.line + 1, column=mark.column + 1) if mark else None
    problem = error.problem or error.context or "not valid YAML"
    context = f" ({error.context})" if error.context and error.context != problem else ""
    message, fix = f"not valid YAML: {problem}{context}", None
    if isinstance(error, _Refused):
        message = problem
    elif "'\\t'" in problem:
        message, fix = "a tab where YAML wants spaces", "replace the tab by spaces"
    elif error.context == "expected a single document in the stream":
        message, fix = "several documents in one file", "keep one document and remove the --- line"
    elif problem.startswith("found undefined alias") or error.context == "while scanning an alias":
        message = "a value starts with *, which YAML reads as an alias"
        fix = "put quotes around the value"
    elif "mapping values are not allowed" in problem:
        fix = "check the indentation, and put quotes around a value that contains ': '"
    return fault(message, name, lines, position, fix=fix)


def parse_document(text: str, name: str) -> Document:
    """Parse a config file.

    Args:
        text: the whole file.
        name: how the file is called in errors.
    """
    node = compose(text, name)
    lines = split_lines(text)
    if not isinstance(node, MappingNode):
        raise fault(
            "a config is a list of key: value lines",
            name,
            lines,
            _position(node),
            fix="start with dataset_type: distill",
        )
    reader = _Reader(name, lines)
    data = reader.read(node, ())
    assert isinstance(data, dict), "read from a mapping"
    return Document(data=data, keys=reader.keys, values=reader.values, lines=lines)


def parse_value(text: str, name: str) -> object:
    """Parse one YAML value, as an override gives it; an empty text is null."""
    if not text.strip():
        return None
    return _Reader(name, split_lines(text)).read(compose(text, name), ())


def _position(node: Node) -> Position:
    return Position(line=node.start_mark.line + 1, column=node.start_mark.column + 1)


class _Reader:
    """Turns nodes into plain data and remembers where each key stood."""

    def __init__(self, name: str, lines: tuple[str, ...]) -> None:
        self.name = name
        self.lines = lines
        self.keys: dict[KeyPath, Position] = {}
        self.values: dict[KeyPath, Position] = {}
        self.count = 0

    def fault(
        self, message: str, node: Node, *, key: str | None = None, fix: str | None = None
    ) -> ConfigError:
        """A ConfigError at a node."""
        return fault(message, self.name, self.lines, _position(node), key=key, fix=fix)

    def read(self, node: Node, path: KeyPath) -> object:
        """The data of one node. Aliases are followed anew each time, so the count bounds the expansion."""
        self.count += 1
        if self.count > MAX_VALUES:
            raise self.fault(
                f"more than {MAX_VALUES} values after following aliases",
                node,
                fix="write the values out instead of using & and *",
            )
        if len(path) > MAX_DEPTH:
            raise self.fault(f"nested more than {MAX_DEPTH} deep", node)
        self.values[path] = _position(node)
        if isinstance(node, MappingNode):
            return self.read_mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return scalar(node.value) if node.style is None else self.text(node)

    def text(self, node: ScalarNode) -> str:
        """A text; a character written as two escaped halves (JSON does) is put together."""
        try:
            return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self.fault("half a character (a lone surrogate)", node) from None

    def read_mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        """One mapping, with text keys that occur once."""
        result: dict[str, object] = {}
        seen: dict[str, Position] = {}
        for key_node, value_node in node.value:
            position = _position(key_node)
            if not isinstance(key_node, ScalarNode) or not key_node.value:
                raise self.fault("a key must be a word", key_node)
            key = self.text(key_node)
            if key in seen:
                first = seen[key]
                raise self.fault(
                    f'the key "{key}" is given twice, {_lines(first, position)}',
                    key_node,
                    key=dotted((*path, key)),
                    fix="keep one of them",
                )
            seen[key] = position
            self.keys[(*path, key)] = position
            result[key] = self.read(value_node, (*path, key))
        return result


def scalar(text: str) -> object:
    """A plain scalar by the rules of YAML 1.2's core schema."""
    if NULL.fullmatch(text):
        return None
    if BOOL.fullmatch(text):
        return text.lower() == "true"
    if len(text) > MAX_DIGITS:
        return text
    if INT.fullmatch(text):
        if text.startswith("0o"):
            return int(text[2:], 8)
        if text.startswith("0x"):
            return int(text, 16)
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _lines(first: Position, second: Position) -> str:
    if first.line == second.line:
        return f"both times on line {first.line}"
    return f"on lines {first.line} and {second.line}"
