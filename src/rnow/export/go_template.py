"""Go's ``text/template``, as far as the templates written here use it: what Ollama will make of one, without Ollama.

Text, fields (``.Role``), variables (``$before := ""``, ``$before = .Role``), string constants, ``if`` with ``else`` and ``else if``, ``range``
over a list, parentheses, and the functions ``eq``, ``ne``, ``not``, ``and`` and ``or``. Anything else is refused, so that nothing is read
otherwise than Go reads it. The language: https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

_TOKEN = re.compile(
    r"""\s+|:=|=|\(|\)|"(?:[^"\\\n]|\\.)*"|\$\w*(?:\.\w+)*|(?:\.\w+)+|\.|\w+|\}\}"""
)
_NAME = re.compile(r"\$\w+")
Value: TypeAlias = "str | bool | Sequence[Value] | Mapping[str, Value]"


class TemplateError(ValueError):
    """What of a template is not understood here, or would fail in Go."""


@dataclass(slots=True)
class _Scope:
    """Variables of a block, and of those around it."""

    values: dict[str, Value]
    outer: _Scope | None = None

    def find(self, name: str) -> dict[str, Value]:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values
            scope = scope.outer
        raise TemplateError(f"undefined variable {name}")


Expression = Callable[[Value, _Scope], Value]
Node = Callable[[Value, _Scope], Iterator[str]]


@dataclass(frozen=True, slots=True)
class GoTemplate:
    """A parsed template."""

    nodes: Sequence[Node]

    def execute(self, data: Mapping[str, Value]) -> str:
        """What the template writes for ``data``. Raises TemplateError where Go would fail."""
        return "".join(_write(self.nodes, data, _Scope({"$": data})))


def parse(text: str) -> GoTemplate:
    """
    Raises:
        TemplateError: it is no template, or uses what is not understood here.
    """
    parts = _Parts(text)
    nodes, ended = parts.block()
    if ended is not None:
        raise TemplateError(f"unexpected {{{{{ended[0]}}}}}")
    return GoTemplate(nodes)


@dataclass(slots=True)
class _Parts:
    """A template's text and actions, read from the front."""

    text: str
    at: int = field(default=0)

    def block(self) -> tuple[list[Node], list[str] | None]:
        """Nodes up to an ``else`` or ``end``, and that action; up to the end of the text, and None."""
        nodes: list[Node] = []
        while True:
            start = self.text.find("{{", self.at)
            piece = self.text[self.at : len(self.text) if start < 0 else start]
            if piece:
                nodes.append(_text(piece))
            if start < 0:
                self.at = len(self.text)
                return nodes, None
            self.at = start + 2
            action = self._action()
            if action[:1] in (["else"], ["end"]):
                return nodes, action
            nodes.append(self._node(action))

    def _action(self) -> list[str]:
        """The tokens up to the closing braces."""
        tokens = []
        while True:
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                raise TemplateError(f"not understood: {self.text[self.at : self.at + 20]!r}")
            self.at = match.end()
            if match[0] == "}}":
                return tokens
            if not match[0].isspace():
                tokens.append(match[0])

    def _node(self, action: Sequence[str]) -> Node:
        if not action:
            raise TemplateError("an action without content")
        if action[0] == "range":
            body, ended = self.block()
            if ended != ["end"]:
                raise TemplateError("a range ends with {{end}} here")
            return _range(_pipeline(action[1:]), body)
        if action[0] == "if":
            return self._if(action[1:])
        if len(action) > 2 and _NAME.fullmatch(action[0]) and action[1] in (":=", "="):
            return _assign(action[0], _pipeline(action[2:]), new=action[1] == ":=")
        return _print(_pipeline(action))

    def _if(self, condition: Sequence[str]) -> Node:
        test = _pipeline(condition)
        body, ended = self.block()
        otherwise: list[Node] = []
        if ended is not None and ended[:2] == ["else", "if"]:
            return _choose(test, body, [self._if(ended[2:])])  # one {{end}} for both
        if ended == ["else"]:
            otherwise, ended = self.block()
        if ended != ["end"]:
            raise TemplateError("an if without its {{end}}")
        return _choose(test, body, otherwise)


def _write(nodes: Sequence[Node], dot: Value, scope: _Scope) -> Iterator[str]:
    for node in nodes:
        yield from node(dot, scope)


def _text(piece: str) -> Node:
    return lambda dot, scope: iter([piece])


def _print(pipeline: Expression) -> Node:
    def run(dot: Value, scope: _Scope) -> Iterator[str]:
        value = pipeline(dot, scope)
        if not isinstance(value, str):
            raise TemplateError(f"only texts are printed here, not {value!r}")
        yield value

    return run


def _assign(name: str, pipeline: Expression, *, new: bool) -> Node:
    def run(dot: Value, scope: _Scope) -> Iterator[str]:
        holder = scope.values if new else scope.find(name)
        holder[name] = pipeline(dot, scope)
        yield ""

    return run


def _choose(test: Expression, body: Sequence[Node], otherwise: Sequence[Node]) -> Node:
    def run(dot: Value, scope: _Scope) -> Iterator[str]:
        chosen = body if test(dot, scope) else otherwise
        yield from _write(chosen, dot, _Scope({}, scope))

    return run


def _range(pipeline: Expression, body: Sequence[Node]) -> Node:
    def run(dot: Value, scope: _Scope) -> Iterator[str]:
        items = pipeline(dot, scope)
        if isinstance(items, str | bool | Mapping):
            raise TemplateError("only lists are ranged over here")
        for item in items:
            yield from _write(body, item, _Scope({}, scope))

    return run


def _pipeline(tokens: Sequence[str]) -> Expression:
    expression, rest = _command(list(tokens))
    if rest:
        raise TemplateError(f"unexpected {rest[0]!r}")
    return expression


def _command(tokens: list[str]) -> tuple[Expression, list[str]]:
    """A function with its arguments, or one operand, and what follows."""
    if not tokens:
        raise TemplateError("an action without content")
    if tokens[0] in _FUNCTIONS:
        function, arguments, rest = _FUNCTIONS[tokens[0]], [], tokens[1:]
        while rest and rest[0] != ")":
            argument, rest = _operand(rest)
            arguments.append(argument)
        return lambda dot, scope: function([a(dot, scope) for a in arguments]), rest
    return _operand(tokens)


def _operand(tokens: list[str]) -> tuple[Expression, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        inner, rest = _command(rest)
        if rest[:1] != [")"]:
            raise TemplateError("a parenthesis is not closed")
        return inner, rest[1:]
    if first.startswith('"'):
        constant: str = json.loads(first)
        return lambda dot, scope: constant, rest
    if first == ".":
        return lambda dot, scope: dot, rest
    if first.startswith("."):
        return lambda dot, scope: _field(dot, first), rest
    if first.startswith("$"):
        name, point, path = first.partition(".")
        return lambda dot, scope: _field(scope.find(name)[name], point + path), rest
    raise TemplateError(f"{first!r} is not understood here")


def _field(value: Value, path: str) -> Value:
    for name in path.split(".")[1:]:
        if not isinstance(value, Mapping) or name not in value:
            raise TemplateError(f"there is no field {name}")
        value = value[name]
    return value


def _equal(arguments: Sequence[Value]) -> Value:
    if len(arguments) < 2:
        raise TemplateError("eq compares two values or more")
    return any(arguments[0] == other for other in arguments[1:])


def _different(arguments: Sequence[Value]) -> Value:
    if len(arguments) != 2:
        raise TemplateError("ne compares two values")
    return arguments[0] != arguments[1]


def _not(arguments: Sequence[Value]) -> Value:
    if len(arguments) != 1:
        raise TemplateError("not takes one value")
    return not arguments[0]


def _and(arguments: Sequence[Value]) -> Value:
    return next((value for value in arguments if not value), arguments[-1])


def _or(arguments: Sequence[Value]) -> Value:
    return next((value for value in arguments if value), arguments[-1])


_FUNCTIONS: Mapping[str, Callable[[Sequence[Value]], Value]] = {
    "eq": _equal,
    "ne": _different,
    "not": _not,
    "and": _and,
    "or": _or,
}
