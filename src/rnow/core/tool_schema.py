"""A function's signature as the JSON schema that a model reads."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ForwardRef, Literal, Union

from rnow.core.docstrings import read_docstring
from rnow.core.tool import ToolArgs

Schema = Mapping[str, object]
"""A JSON schema."""

INJECTED = "args"
"""The parameter that receives ToolArgs instead of a value from the model."""

PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
"""Python's plain types as JSON schema names them."""

_UNSUPPORTED = "a tool's parameters may be str, int, float, bool, list[T], dict[str, T], Literal, Optional and Union of these"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """What is wrong with a tool's signature, and how to mend it."""

    message: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSignature:
    """What a model is told of a tool. ``injected``: the function wants ToolArgs as ``args``."""

    description: str
    parameters: Schema
    injected: bool
    mistakes: tuple[Mistake, ...] = ()


class _Unusable(Exception):
    """A type hint that JSON cannot carry."""


def describe(function: Callable[..., object]) -> ToolSignature:
    """The description and the schema of ``function``, with everything that is wrong with it; never raises."""
    name = getattr(function, "__name__", "tool")
    inner = inspect.unwrap(function)
    mistakes: list[Mistake] = []
    documented = read_docstring(inspect.getdoc(function) or "")
    if not documented.description:
        mistakes.append(
            Mistake(
                message=f'the tool "{name}" has no docstring',
                fix="say in one sentence what it does: the model reads it",
            )
        )
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        mistakes.append(
            Mistake(message=f'the tool "{name}" yields', fix="return one value instead")
        )
    properties: dict[str, Schema] = {}
    required: list[str] = []
    injected = False
    for parameter in inspect.signature(function).parameters.values():
        schema = _parameter(parameter, inner, name, documented.parameters)
        if schema is None:
            injected = True
            continue
        if isinstance(schema, Mistake):
            mistakes.append(schema)
            continue
        properties[parameter.name] = schema
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, object] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return ToolSignature(
        description=documented.description,
        parameters=parameters,
        injected=injected,
        mistakes=tuple(mistakes),
    )


def _parameter(
    parameter: inspect.Parameter,
    function: Callable[..., object],
    tool: str,
    documented: Mapping[str, str],
) -> Schema | Mistake | None:
    """The schema of one parameter, or what is wrong with it; None for the one that receives ToolArgs."""
    problem = _check_kind(parameter, tool)
    if problem is not None:
        return problem
    try:
        hint, note = _split_annotated(_resolve(parameter.annotation, function))
        if hint is ToolArgs:
            if parameter.name != INJECTED:
                raise _Unusable(f"a ToolArgs parameter must be named {INJECTED}")
            return None
        schema = dict(_schema(hint, function))
    except _Unusable as unusable:
        message = f'the parameter "{parameter.name}" of the tool "{tool}": {unusable}'
        return Mistake(message=message, fix=_UNSUPPORTED)
    if text := note or documented.get(parameter.name):
        schema["description"] = text
    default = parameter.default
    if default is not parameter.empty and default is not None and _is_json(default):
        schema["default"] = default
    return schema


def _check_kind(parameter: inspect.Parameter, tool: str) -> Mistake | None:
    what = f'the parameter "{parameter.name}" of the tool "{tool}"'
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        return Mistake(
            message=f'the tool "{tool}" takes {stars}{parameter.name}',
            fix="name every parameter and give it a type",
        )
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return Mistake(message=f"{what} is positional-only", fix="remove the / from the signature")
    if parameter.annotation is parameter.empty:
        wanted = "ToolArgs" if parameter.name == INJECTED else "str"
        return Mistake(
            message=f"{what} has no type", fix=f"write {parameter.name}: {wanted}, for example"
        )
    return None


def _resolve(annotation: object, function: Callable[..., object]) -> object:
    """The type behind an annotation that may be text (``from __future__ import annotations``)."""
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    try:
        # The user's own code, which has just been imported: evaluating its hints runs nothing that importing would not.
        return _resolve(eval(annotation, _names(function)), function)
    except Exception as error:
        raise _Unusable(
            f"its type {annotation} cannot be read ({type(error).__name__}: {error})"
        ) from None


def _names(function: Callable[..., object]) -> dict[str, object]:
    """What the text of a hint may name: the function's module, and the variables it closes over."""
    names = dict(getattr(function, "__globals__", {}))
    code = getattr(function, "__code__", None)
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars if code else (), cells, strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:
            continue  # not bound yet
    return names


def _split_annotated(hint: object) -> tuple[object, str | None]:
    """``Annotated[T, "words"]`` -> T and the words; a ``Field(description=...)`` counts as words."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, None
    inner, *extras = typing.get_args(hint)
    for extra in extras:
        words = extra if isinstance(extra, str) else getattr(extra, "description", None)
        if isinstance(words, str) and words.strip():
            return inner, " ".join(words.split())
    return inner, None


def _schema(hint: object, function: Callable[..., object]) -> Schema:
    hint, note = _split_annotated(_resolve(hint, function))
    schema = _bare_schema(hint, function)
    return {**schema, "description": note} if note else schema


def _bare_schema(hint: object, function: Callable[..., object]) -> Schema:
    if hint is None:
        hint = type(None)
    try:
        if hint in PLAIN:
            return {"type": PLAIN[hint]}
    except TypeError:
        raise _Unusable(f"{hint!r} is not a type") from None
    if hint is Any:
        return {}
    if hint in (list, typing.List):  # noqa: UP006
        return {"type": "array"}
    if hint in (dict, typing.Dict):  # noqa: UP006
        return {"type": "object"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        items = _schema(arguments[0], function)
        return {"type": "array", "items": items} if items else {"type": "array"}
    if origin is dict:
        key, value = arguments
        if _resolve(key, function) is not str:
            raise _Unusable(f"{_shown(hint)}: JSON objects have str keys")
        values = _schema(value, function)
        return {"type": "object", "additionalProperties": values} if values else {"type": "object"}
    if origin is Literal:
        return _literal(arguments)
    if origin is Union or origin is types.UnionType:
        return _union([_schema(argument, function) for argument in arguments])
    raise _Unusable(f"{_shown(hint)} cannot be written as JSON")


def _literal(values: tuple[object, ...]) -> Schema:
    for value in values:
        if type(value) not in PLAIN:
            raise _Unusable(f"Literal[{value!r}] cannot be written as JSON")
    kinds = list(dict.fromkeys(PLAIN[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(values)}


def _union(members: list[Schema]) -> Schema:
    """Short where JSON schema allows: ``{"type": ["integer", "null"]}``, and a Literal that may be null."""
    if not all(members):
        return {}  # a union with Any
    plain = [member["type"] for member in members if set(member) == {"type"}]
    if len(plain) == len(members) and all(isinstance(kind, str) for kind in plain):
        kinds = list(dict.fromkeys(plain))
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    return {"anyOf": members}


def _is_json(value: object) -> bool:
    """Whether a default can be shown as it is: JSON has no NaN, tuples or other objects."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return json.loads(text) == value


def _shown(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
