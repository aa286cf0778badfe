"""config.yml as a JSON Schema, for editors: every key with what it means, and every spelling of it that is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from rnow.config.legacy import OLD_THINKING_MODES, REMOVED, RENAMED
from rnow.config.problems import KeyPath, dotted
from rnow.config.schema import LISTS, SECTIONS, ReasoningMode, Schema, TrackerName, key_of

if TYPE_CHECKING:
    from pydantic import BaseModel

DRAFT = "http://json-schema.org/draft-07/schema#"
"""What editors know."""
MADE_BY = "Written by `rnow schema`."

Node = dict[str, Any]
_NULL: Node = {"type": "null"}
_TEXT: Node = {"type": "string", "minLength": 1}
_TEXTS: Node = {"type": "array", "items": _TEXT, "minItems": 1}
_TOP = ""

OTHER_FORMS: Mapping[str, tuple[Node, ...]] = {
    "trackers": ({"enum": [*get_args(TrackerName)]}, _NULL),
    "model.path": (_TEXTS,),
    "model.lora_targets": (_TEXT,),
    "data.train_file": (
        _TEXT,
        {"$ref": "#/definitions/DatasetSource"},
        {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, {"$ref": "#/definitions/DatasetSource"}]}},
    ),
    "data.train_file[].name": (_NULL,),
    "data.val_split": (_NULL,),
    "algorithm.kl_penalty_coef": (_NULL,),
    "algorithm.reward_coef": (_NULL,),
    "rollout.mcp_url": (_TEXT, _NULL),
    "evals": ({"$ref": "#/definitions/EvalEntry"}, _NULL),
    "teachers": (
        {"type": "object", "additionalProperties": {"anyOf": [_TEXT, {"$ref": "#/definitions/TeacherSection"}]}},
        _NULL,
    ),
    **{f"evals[].{name}": (_NULL,) for name in ("pass1", "pass4", "pass8")},
    **dict.fromkeys(("algorithm", "rollout", "sampler", "trainer", "evaluation"), (_NULL,)),
}  # fmt: skip
"""What a key may be beside the type that it has in the end: what ``config.normalise`` and ``config.load`` turn into it."""

_COUNT: Node = {"type": "integer", "minimum": 1}
_MODE: Node = {"enum": [*get_args(ReasoningMode), *OLD_THINKING_MODES, None]}
OLD_FORMS: Mapping[KeyPath, Node] = {
    ("eval_step",): _COUNT,
    ("trainer", "eval_step"): _COUNT,
    ("thinking_mode",): _MODE,
    ("rollout", "thinking_mode"): _MODE,
    ("rollout", "max_tool_response_chars"): {"anyOf": [_COUNT, _NULL]},
}
"""Of the old keys whose value is another than the new one's."""


def build_schema() -> Node:
    """A JSON Schema (draft 7) that takes every config that ``load_config`` takes; rules between keys are not in it."""
    schema = Schema.model_json_schema(ref_template="#/definitions/{model}")
    definitions = schema.pop("$defs")
    _drop_titles(schema)
    _drop_titles(definitions)
    for path, model, properties in _sections(schema, definitions):
        _describe(model, properties)
        for name in properties:
            if forms := OTHER_FORMS.get(f"{path}{name}"):
                properties[name] = _either(properties[name], forms)
    for old, new, _, note in RENAMED:
        home = _properties_of(old, schema, definitions)
        now = _properties_of(new, schema, definitions)[str(new[-1])]
        home[str(old[-1])] = _old(OLD_FORMS.get(old, now), f"write {dotted(new)}{note}")
    for path, kept in REMOVED.items():
        _properties_of(path, schema, definitions)[str(path[-1])] = _old(
            {"const": kept}, f"leave it out, {kept} is what there is"
        )
    return {
        "$schema": DRAFT,
        "$comment": MADE_BY,
        **schema,
        "title": "config.yml of rnow",
        "description": "What `rnow run` does; docs/configuration.md explains the same keys.",
        "definitions": definitions,
    }


def schema_text() -> str:
    """The same as the text of a file."""
    return json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n"


def _sections(
    schema: Node, definitions: Mapping[str, Node]
) -> Iterator[tuple[str, type[BaseModel], Node]]:
    """What leads to the keys of each section, its model, and its keys."""
    yield _TOP, Schema, schema["properties"]
    for name, model in SECTIONS.items():
        yield f"{name}.", model, definitions[model.__name__]["properties"]
    for name, model in LISTS.items():
        yield f"{name}[].", model, definitions[model.__name__]["properties"]


def _describe(model: type[BaseModel], properties: Node) -> None:
    """Say in words what a default is that depends on something, instead of null."""
    for name, field in model.model_fields.items():
        said = key_of(field)
        if said is not None and said.default_text:
            node = properties[name]
            node.pop("default", None)
            node["description"] = f"{node.get('description', '')} Default: {said.default_text}."


def _either(node: Node, others: tuple[Node, ...]) -> Node:
    """The node with other forms beside its own; what is said of the key stays outside, where editors look."""
    told = {key: node.pop(key) for key in ("description", "default") if key in node}
    return {**told, "anyOf": [*(node["anyOf"] if set(node) == {"anyOf"} else [node]), *others]}


def _properties_of(path: KeyPath, schema: Node, definitions: Mapping[str, Node]) -> Node:
    """The keys beside the last one of a path."""
    if len(path) == 1:
        return schema["properties"]
    return definitions[SECTIONS[str(path[0])].__name__]["properties"]


def _old(node: Node, what: str) -> Node:
    message = f"An old key: {what}."
    told = ("description", "default")
    return {
        **{key: value for key, value in node.items() if key not in told},
        "description": message,
        "deprecated": True,
        "deprecationMessage": message,
        "doNotSuggest": True,
    }


def _drop_titles(node: object) -> None:
    """Take out the titles that pydantic makes of names; an editor would show them in place of the names."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        for value in node.values():
            _drop_titles(value)
    elif isinstance(node, list):
        for value in node:
            _drop_titles(value)
