"""The arguments of a call against the JSON schema of its tool: gently coerced, then checked.

The schema may come from a stranger (an MCP server), so only a subset of JSON Schema is looked at, and that within a budget of
steps: types, enums, numeric and length bounds, required and additional properties, items, combinations, and ``$ref`` inside
the schema. Regular expressions are never run (one of them can take for ever), references to other documents are never fetched.
What is not looked at is left to the tool, which checks its arguments itself.
"""

from __future__ import annotations

import graphlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable

from rnow.core.tool_schema import PLAIN, Schema
from rnow.text.strict_json import JsonError, read_json
from rnow.text.suggest import hint

MAX_NODES = 5_000
"""Schemas and list entries in one tool's schema."""
MAX_DEPTH = 40
"""Levels of nesting of a schema, and of arguments."""
MAX_STEPS = 20_000
"""Keywords evaluated for one call. Beyond it the arguments pass as they are."""

Part = dict[str, Any]
"""A JSON object: arguments, or a schema, whose kinds of values the check against the meta-schema has made sure of."""

_Check = Callable[[object, object, object, object], Iterable[ValidationError] | None]
"""Of one keyword, as jsonschema has them: validator, value of the keyword, instance, schema."""

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_VALUES = frozenset(("type", "const", *_BOUNDS, *_SIZES))
_ONE = frozenset(("additionalProperties", "items", "not", "if", "then", "else", "contains"))
_MANY = frozenset(("anyOf", "oneOf", "allOf", "prefixItems"))
_NAMED = frozenset(("properties", "$defs", "definitions"))
_IN_PLACE = ("anyOf", "oneOf", "allOf", "not", "if", "then", "else")
_OPEN = frozenset(("anyOf", "oneOf", "allOf", "if", "$ref", "additionalProperties"))

_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_MAX_EXACT = 2**53
_MAX_PROBLEMS = 5
_SHOWN = 80

_KINDS = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class SchemaProblem(ValueError):
    """A schema that arguments cannot be checked against: not JSON Schema, too large, or without end."""


class _OutOfSteps(Exception):
    pass


class ArgumentChecker:
    """Checks calls against one schema.

    Raises:
        SchemaProblem: the schema is not usable; says why.
    """

    def __init__(self, schema: Schema) -> None:
        try:
            self._schema = _Subset(schema).document
            Draft202012Validator.check_schema(self._schema)
        except SchemaError as error:
            where = "/".join(str(part) for part in error.absolute_path)
            raise SchemaProblem(f"{where or 'schema'}: {_short(error.message, 200)}") from None
        except RecursionError:
            raise SchemaProblem("it is nested too deeply") from None
        self._steps = 0
        self._validator = validators.extend(
            Draft202012Validator,
            {word: self._counted(check) for word, check in Draft202012Validator.VALIDATORS.items()},
        )(self._schema, registry=Registry())

    def check(self, arguments: object) -> dict[str, object] | str:
        """The arguments to call with, or what is wrong with them in a few lines for the model.

        Coerced, where the schema does not take the value as it is and nothing is lost: ``"5"`` to 5, ``3.0`` to 3,
        ``"true"`` to true, ``5`` to ``"5"``, a JSON string to the object or list it spells, null for an optional
        parameter to no parameter. A single value does not become a list: ``"a, b"`` may mean two. The given arguments are
        not changed. Unknown parameters are refused unless the schema speaks of additional ones or is not a plain object.
        """
        if not isinstance(arguments, Mapping):
            return f"the arguments must be an object, not {_kind(arguments)}"
        if not _shallow(arguments, MAX_DEPTH):
            return f"the arguments are nested more than {MAX_DEPTH} levels deep"
        given = dict(arguments)
        problems = self._names(given)
        if problems:
            return self._refusal(problems)
        self._steps = 0
        try:
            coerced = self._coerce(given, self._schema)
            errors = list(islice(self._validator.iter_errors(coerced), _MAX_PROBLEMS))
        except (_OutOfSteps, RecursionError, Unresolvable):
            return given  # the schema is at fault, not the model: let the tool decide
        if errors:
            return self._refusal([_problem(error) for error in errors])
        return coerced if isinstance(coerced, dict) else given

    def _counted(self, check: _Check) -> _Check:
        def counted(
            validator: object, value: object, instance: object, schema: object
        ) -> Iterator[ValidationError]:
            self._step()
            yield from check(validator, value, instance, schema) or ()

        return counted

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _OutOfSteps

    def _names(self, given: Part) -> list[str]:
        """Missing and unknown parameters; nulls that stand for an absent one are taken out of ``given``."""
        schema = self._schema
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return []
        required = schema.get("required", ())
        for name, value in list(given.items()):
            if (
                value is None
                and name not in required
                and not self._accepts(None, properties.get(name))
            ):
                del given[name]
        missing = [name for name in required if name not in given]
        unknown = [name for name in given if name not in properties]
        if schema.get("additionalProperties") is not False and not _OPEN.isdisjoint(schema):
            unknown = []
        problems = [f"{_short(name)} is missing" for name in missing[:_MAX_PROBLEMS]]
        for name in unknown[:_MAX_PROBLEMS]:
            problems.append(f"there is no parameter {_short(name)}{hint(name, properties)}")
        return problems

    def _refusal(self, problems: Sequence[str]) -> str:
        properties = self._schema.get("properties")
        text = "; ".join(problems)
        if not isinstance(properties, dict):
            return text
        required = self._schema.get("required", ())
        known = [
            f"{_short(name)} ({_wanted(schema)}{'' if name in required else ', optional'})"
            for name, schema in islice(properties.items(), 20)
        ]
        return f"{text}. Parameters: {', '.join(known) if known else 'none'}"

    def _accepts(self, value: object, schema: object) -> bool:
        if schema is None:
            return True
        try:
            return self._validator.evolve(schema=schema).is_valid(value)
        except (_OutOfSteps, RecursionError, Unresolvable):
            return True

    def _coerce(self, value: object, schema: object) -> object:
        self._step()
        schema = self._resolved(schema)
        if not isinstance(schema, dict):
            return value
        for part in schema.get("allOf", ()):
            value = self._coerce(value, part)
        branches = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
        if branches and not any(self._accepts(value, branch) for branch in branches):
            for branch in branches:
                candidate = self._coerce(value, branch)
                if self._accepts(candidate, branch):
                    value = candidate
                    break
        value = self._coerce_here(value, schema)
        if isinstance(value, dict):
            properties = schema.get("properties", {})
            others = schema.get("additionalProperties", True)
            return {
                name: self._coerce(item, properties.get(name, others))
                for name, item in value.items()
            }
        if isinstance(value, list):
            first = schema.get("prefixItems", ())
            rest = schema.get("items", True)
            return [
                self._coerce(item, first[index] if index < len(first) else rest)
                for index, item in enumerate(value)
            ]
        return value

    def _coerce_here(self, value: object, schema: Part) -> object:
        if "type" in schema:
            types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        elif "enum" in schema and not any(_same(value, item) for item in schema["enum"]):
            types = list(dict.fromkeys(map(_type, schema["enum"])))
        else:
            return value
        if any(self._validator.is_type(value, kind) for kind in types):
            # A float that is a whole number is an integer to JSON Schema, and not to Python.
            if isinstance(value, float) and "integer" in types and "number" not in types:
                return int(value) if abs(value) <= _MAX_EXACT else value
            return value
        for kind in types:
            converted = _as(kind, value)
            if converted is not _NO:
                return converted
        return value

    def _resolved(self, schema: object) -> object:
        # Ends: a chain of references without end was refused when the schema was read.
        while isinstance(schema, dict) and "$ref" in schema:
            target = _at(self._schema, schema["$ref"])
            siblings = {key: value for key, value in schema.items() if key != "$ref"}
            if siblings.keys() & (_MANY | {"type", "properties", "items"}):
                return {"allOf": [target], **siblings}
            schema = target
            self._step()
        return schema


class _Subset:
    """Copies the part of a schema that is looked at, and makes sure that it ends."""

    def __init__(self, schema: object) -> None:
        if not isinstance(schema, Mapping):
            raise SchemaProblem("it is not an object")
        self._nodes = 0
        self._references: list[Part] = []
        document = self._copy(schema, 0)
        assert isinstance(document, dict)
        if document.get("type", "object") != "object":
            raise SchemaProblem(f'its type is {_short(str(document["type"]))}, not "object"')
        self.document = document
        schemas = {id(node) for node in _nodes(document)}
        for node in self._references:
            if id(_at(document, node["$ref"])) not in schemas:
                del node["$ref"]  # it names nothing, or something that is no schema
        _refuse_endless(document)

    def _copy(self, schema: object, depth: int) -> Part | bool:
        self._count(1)
        if depth > MAX_DEPTH:
            raise SchemaProblem(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise SchemaProblem(f"a part of it is {_kind(schema)}, not an object")
        copy: Part = {}
        for key, value in schema.items():
            if key == "items" and isinstance(value, list):
                copy["prefixItems"] = [self._copy(item, depth + 1) for item in value]  # draft 7
            elif key in _ONE:
                copy[key] = self._copy(value, depth + 1)
            elif key in _MANY and isinstance(value, list):
                copy[key] = [self._copy(item, depth + 1) for item in value]
            elif key in _NAMED and isinstance(value, Mapping):
                copy[key] = {str(name): self._copy(part, depth + 1) for name, part in value.items()}
            elif key in ("required", "enum") and isinstance(value, list):
                self._count(len(value))
                copy[key] = list(value)
            elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
                copy[key] = value
                self._references.append(copy)
            elif key in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
                continue  # draft 4
            elif key in _VALUES or key in _MANY or key in _NAMED or key in ("required", "enum"):
                copy[key] = (
                    value  # a wrong kind of value is found by the check against the meta-schema
                )
        if "patternProperties" in schema:
            copy.pop("additionalProperties", None)
            copy["additionalProperties"] = True
        return copy

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise SchemaProblem(f"it has more than {MAX_NODES:,} parts")


def _refuse_endless(document: Part) -> None:
    """Raise for a schema that leads back to itself without going into the value: checking it would never end."""

    def below(node: Part) -> Iterator[object]:
        if "$ref" in node:
            yield _at(document, node["$ref"])
        for key in _IN_PLACE:
            parts = node.get(key)
            yield from parts if isinstance(parts, list) else (parts,)

    graph = {
        id(node): [id(part) for part in below(node) if isinstance(part, dict)]
        for node in _nodes(document)
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        raise SchemaProblem("a part of it refers to itself without end") from None


def _nodes(schema: object) -> Iterator[Part]:
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in _ONE:
            yield from _nodes(value)
        elif key in _MANY and isinstance(value, list):
            for item in value:
                yield from _nodes(item)
        elif key in _NAMED and isinstance(value, dict):
            for item in value.values():
                yield from _nodes(item)


def _at(document: object, reference: str) -> Part | None:
    """What a reference inside the document names when that is an object, else None."""
    pointer = reference[1:]
    node = document
    if pointer and not pointer.startswith("/"):
        return None
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node if isinstance(node, dict) else None


_NO = object()


def _as(kind: str, value: object) -> object:
    """``value`` as the JSON type ``kind`` when nothing is lost, else ``_NO``."""
    match kind, value:
        case "integer", str() if _INTEGER.fullmatch(value.strip()):
            return int(value)
        case (("integer" | "number"), str()):
            number = _number(value)
            if number is None or kind == "number":
                return _NO if number is None else number
            whole = isinstance(number, float) and number.is_integer()
            return int(number) if whole and abs(number) <= _MAX_EXACT else _NO
        case "boolean", str() if value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
        case "null", str() if value.strip().lower() in ("null", "none"):
            return None
        case "string", bool():
            return _NO
        case "string", int() | float():
            return json.dumps(value)
        case (("object" | "array"), str()):
            return _parsed(value, dict if kind == "object" else list)
    return _NO


def _number(text: str) -> int | float | None:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if len(text) > 300 or not re.fullmatch(r"[+-]?[0-9.eE+-]+", text):
        return None  # "nan", "inf" and "1_000" are floats to Python alone
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _parsed(text: str, kind: type) -> object:
    try:
        value = read_json(text, max_depth=MAX_DEPTH)
    except JsonError:
        return _NO
    return value if isinstance(value, kind) else _NO


def _shallow(value: object, levels: int) -> bool:
    if not isinstance(value, Mapping | list):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return levels > 0 and all(_shallow(item, levels - 1) for item in items)


def _same(left: object, right: object) -> bool:
    return left == right and isinstance(left, bool) == isinstance(right, bool)


def _type(value: object) -> str:
    return PLAIN.get(type(value)) or ("array" if isinstance(value, list) else "object")


def _kind(value: object) -> str:
    return _KINDS[_type(value)]


def _wanted(schema: object) -> str:
    """A schema in a word or two."""
    if not isinstance(schema, dict):
        return "any"
    if "enum" in schema:
        values = ", ".join(_short(json.dumps(item, default=str), 30) for item in schema["enum"][:8])
        return f"one of {values}{', ...' if len(schema['enum']) > 8 else ''}"
    if "const" in schema:
        return _short(json.dumps(schema["const"], default=str), 30)
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return " or ".join(kinds)
    if isinstance(kinds, str):
        return kinds
    branches = schema.get("anyOf") or schema.get("oneOf")
    if (
        branches
        and len(branches) <= 5
        and not any(isinstance(b, dict) and "anyOf" in b for b in branches)
    ):
        return " or ".join(dict.fromkeys(map(_wanted, branches)))
    return "object" if "$ref" in schema else "any"


def _problem(error: ValidationError) -> str:
    """One line for the model about one fault; the library's words where ours would say no more."""
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{_short(str(part), 40)}"
        for part in error.absolute_path
    ).lstrip(".")
    value = _short(json.dumps(error.instance, ensure_ascii=False, default=str))
    match error.validator:
        case "type" | "enum" | "const" | "anyOf" | "oneOf":
            limit = error.validator_value
            wanted = _KINDS.get(limit) if isinstance(limit, str) else None
            wanted = wanted or _wanted({str(error.validator): limit})
            return f"{where or 'the arguments'} must be {wanted}, not {value}"
        case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf":
            sign = {
                "minimum": "at least",
                "maximum": "at most",
                "exclusiveMinimum": "more than",
                "exclusiveMaximum": "less than",
                "multipleOf": "a multiple of",
            }[str(error.validator)]
            return f"{where} must be {sign} {error.validator_value}, not {value}"
        case "minLength" | "maxLength" | "minItems" | "maxItems":
            bound = "at least" if str(error.validator).startswith("min") else "at most"
            unit = "characters" if str(error.validator).endswith("Length") else "items"
            return f"{where} must have {bound} {error.validator_value} {unit}"
    return f"{where or 'the arguments'}: {_short(error.message)}"


def _short(text: str, limit: int = _SHOWN) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
