"""Signatures as JSON schemas: what each hint becomes, what is refused, and that the schema accepts what the type holds."""

from __future__ import annotations

import functools
import json
import typing
from collections.abc import Callable
from typing import Annotated, Any, Dict, List, Literal, Optional, Union  # noqa: UP035

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.core import ToolArgs, tool
from rnow.core.tool_schema import ToolSignature, describe


def with_hint(hint: Any, *, default: Any = ...) -> Callable[..., Any]:
    """A function whose one parameter ``x`` has this hint."""

    def f(x):  # type: ignore[no-untyped-def]
        """Do it."""

    f.__annotations__ = {"x": hint}
    if default is not ...:
        f.__defaults__ = (default,)
    return f


def schema_of(hint: Any, **options: Any) -> dict[str, Any]:
    signature = describe(with_hint(hint, **options))
    assert signature.mistakes == ()
    return dict(signature.parameters["properties"]["x"])


def mistake_of(function: Callable[..., Any]) -> str:
    (mistake,) = describe(function).mistakes
    assert mistake.fix
    return mistake.message


HINTS: list[tuple[Any, dict[str, Any]]] = [
    (int, {"type": "integer"}),
    (str, {"type": "string"}),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (None, {"type": "null"}),
    (Any, {}),
    (list, {"type": "array"}),
    (dict, {"type": "object"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (list[Any], {"type": "array"}),
    (List[str], {"type": "array", "items": {"type": "string"}}),  # noqa: UP006
    (List, {"type": "array"}),  # noqa: UP006
    (Dict, {"type": "object"}),  # noqa: UP006
    (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
    (dict[str, Any], {"type": "object"}),
    (Dict[str, list[int]], {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}}),  # noqa: UP006
    (int | None, {"type": ["integer", "null"]}),
    (Optional[str], {"type": ["string", "null"]}),  # noqa: UP045
    (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
    (int | Any, {}),
    (list[str] | None, {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
    (Literal["a", 1, True, None], {"type": ["string", "integer", "boolean", "null"], "enum": ["a", 1, True, None]}),
    (Literal["a"] | None, {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]}),
    (Annotated[int, "how\n many"], {"type": "integer", "description": "how many"}),
    (Annotated[int, 5], {"type": "integer"}),
    (list[Annotated[int, "one of them"]], {"type": "array", "items": {"type": "integer", "description": "one of them"}}),
    (list["int"], {"type": "array", "items": {"type": "integer"}}),
    ("int | None", {"type": ["integer", "null"]}),
    ("Optional[Literal['x']]", {"anyOf": [{"type": "string", "enum": ["x"]}, {"type": "null"}]}),
    ("'int'", {"type": "integer"}),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "schema"), HINTS, ids=[str(hint) for hint, _ in HINTS])
def test_each_hint(hint: Any, schema: dict[str, Any]) -> None:
    assert schema_of(hint) == schema
    jsonschema.Draft202012Validator.check_schema(schema)


class Thing: ...


class Field:
    description = "from a field"


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Thing, "Thing cannot be written as JSON"),
        (tuple[int, str], "cannot be written as JSON"),
        (set[int], "cannot be written as JSON"),
        (bytes, "bytes cannot be written as JSON"),
        (typing.TypeVar("T"), "cannot be written as JSON"),
        (dict[int, str], "JSON objects have str keys"),
        (list[Thing], "Thing cannot be written as JSON"),
        (int | Thing, "Thing cannot be written as JSON"),
        (Literal[b"x"], "Literal[b'x'] cannot be written as JSON"),
        ("Nowhere", "its type Nowhere cannot be read (NameError: name 'Nowhere' is not defined)"),
        ("int |", "cannot be read (SyntaxError"),
        ("list[Nowhere]", "cannot be read (NameError"),
        (5, "5 cannot be written as JSON"),
        ([], "[] is not a type"),
        (ToolArgs, "must be named args"),
        (ToolArgs | None, "cannot be written as JSON"),
    ],
)
def test_what_json_cannot_carry(hint: Any, words: str) -> None:
    message = mistake_of(with_hint(hint))
    assert message.startswith('the parameter "x" of the tool "f": ')
    assert words in message


def test_required_defaults_and_the_hidden_parameter() -> None:
    def search(query: str, args: ToolArgs, limit: int = 5, site: str | None = None, *, deep: bool):
        """Search."""

    signature = describe(search)
    assert signature == ToolSignature(
        description="Search.",
        parameters={
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "limit": {"type": "integer", "default": 5},
                "site": {"type": ["string", "null"]},
                "deep": {"type": "boolean"},
            },
            "required": ["query", "deep"],
        },
        injected=True,
    )


def test_no_parameters() -> None:
    def now() -> str:
        """The time."""
        return ""

    assert describe(now).parameters == {"type": "object", "properties": {}}


@pytest.mark.parametrize("default", [float("nan"), (1, 2), object(), {1: 2}])
def test_a_default_that_json_has_not_is_left_out(default: Any) -> None:
    assert schema_of(Any, default=default) == {}


def test_signatures_that_are_refused() -> None:
    def stars(*words: str) -> None:
        """Do it."""

    def keywords(**words: str) -> None:
        """Do it."""

    def positional(x: int, /) -> None:
        """Do it."""

    def bare(x) -> None:  # type: ignore[no-untyped-def]
        """Do it."""

    def bare_args(args) -> None:  # type: ignore[no-untyped-def]
        """Do it."""

    def wordless(x: int) -> None: ...

    def only_sections(x: int) -> None:
        """
        Args:
            x: a number
        """

    def yields(x: int) -> Any:
        """Do it."""
        yield x

    async def yields_async(x: int) -> Any:
        """Do it."""
        yield x

    assert mistake_of(stars) == 'the tool "stars" takes *words'
    assert mistake_of(keywords) == 'the tool "keywords" takes **words'
    assert "is positional-only" in mistake_of(positional)
    assert mistake_of(bare) == 'the parameter "x" of the tool "bare" has no type'
    assert describe(bare_args).mistakes[0].fix == "write args: ToolArgs, for example"
    assert mistake_of(wordless) == 'the tool "wordless" has no docstring'
    assert mistake_of(only_sections) == 'the tool "only_sections" has no docstring'
    assert mistake_of(yields) == 'the tool "yields" yields'
    assert mistake_of(yields_async) == 'the tool "yields_async" yields'


def test_all_mistakes_are_told() -> None:
    def f(a, b: bytes, *c: int):  # type: ignore[no-untyped-def]
        pass

    assert len(describe(f).mistakes) == 4


def test_hints_of_a_function_inside_a_function() -> None:
    choices = Literal["red", "green"]

    @tool
    def paint(color: choices, layers: list[choices]) -> str:  # type: ignore[valid-type]
        """Paint."""
        return str((color, layers, choices))

    assert describe(paint).parameters["properties"]["color"]["enum"] == ["red", "green"]


def test_a_decorated_function_is_seen_through() -> None:
    def retry(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @tool
    @retry
    def f(n: int) -> int:
        """Do it."""
        return n

    signature = describe(f)
    assert signature.mistakes == ()
    assert signature.parameters["required"] == ["n"]


def test_annotated_wins_over_the_docstring() -> None:
    def f(a: Annotated[int, "from the hint"], b: Annotated[int, Field()], c: int) -> None:
        """Do it.

        Args:
            a: from the docstring
            c: also there
        """

    properties = describe(f).parameters["properties"]
    assert [item["description"] for item in properties.values()] == [
        "from the hint",
        "from a field",
        "also there",
    ]


# For any type: its schema is valid, serialisable, and accepts the values of the type.

SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers()),
    (str, st.text()),
    (bool, st.booleans()),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (type(None), st.none()),
    (Any, st.integers() | st.text()),
    (Literal["a", "b", 3], st.sampled_from(["a", "b", 3])),
]


def _extend(
    inner: st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]],
) -> st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]]:
    return st.one_of(
        inner.map(lambda item: (list[item[0]], st.lists(item[1], max_size=3))),
        inner.map(lambda item: (dict[str, item[0]], st.dictionaries(st.text(), item[1], max_size=3))),
        inner.map(lambda item: (Optional[item[0]], st.none() | item[1])),  # noqa: UP045
        st.tuples(inner, inner).map(
            lambda pair: (Union[pair[0][0], pair[1][0]], pair[0][1] | pair[1][1])  # noqa: UP007
        ),
    )  # fmt: skip


TYPES = st.recursive(st.sampled_from(SCALARS), _extend, max_leaves=6)


@given(TYPES, st.data())
def test_a_schema_accepts_the_values_of_its_type(
    pair: tuple[Any, st.SearchStrategy[Any]], data: st.DataObject
) -> None:
    hint, values = pair
    signature = describe(with_hint(hint))
    assert signature.mistakes == ()
    schema = json.loads(json.dumps(signature.parameters))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate({"x": data.draw(values)}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema)


@given(TYPES)
def test_hints_written_as_text_give_the_same_schema(
    pair: tuple[Any, st.SearchStrategy[Any]],
) -> None:
    hint, _ = pair
    scope: dict[str, Any] = {"hint": hint, "__builtins__": __builtins__}
    exec("def f(x: 'hint'):\n    'Do it.'\n", scope)
    assert describe(scope["f"]).parameters == describe(with_hint(hint)).parameters
