"""What a judge's answer must look like, and the score in it."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rnow.core.judge_errors import JudgeError
from rnow.core.messages import strip_thinking

_SCORES = frozenset({"number", "integer", "boolean", "string"})
"""Types of JSON schema that a score may have."""
_MAX_BRACES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The schema of an answer, which of its properties is the score, and the score's range.

    ``own``: it is the user's schema, so that a bare number is no answer.
    """

    schema: Mapping[str, Any]
    key: str
    minimum: float
    maximum: float
    own: bool

    def instruction(self) -> str:
        """What the judge is told of it: not every server makes its model keep to a schema."""
        if not self.own:
            what = f'{{"{self.key}": number from {self.minimum:g} to {self.maximum:g}}}'
        else:
            what = f"of this JSON schema: {json.dumps(self.schema, ensure_ascii=False)}"
        return f"You are a judge. Answer with JSON only, {what}."

    def response_format(self) -> dict[str, object]:
        """The field of a chat completion that asks for it. OpenAI's strict form takes closed objects only, whose properties are all
        required."""
        closed = self.schema.get("additionalProperties") is False
        strict = closed and {*_required(self.schema)} >= self.schema["properties"].keys()
        return {
            "type": "json_schema",
            "json_schema": {"name": "judge_score", "strict": strict, "schema": self.schema},
        }

    def read(self, text: str) -> float:
        """The score in the judge's answer.

        Raises:
            JudgeError: there is none, or one outside the schema or the range.
        """
        answer = _read_json(text, self.key)
        if isinstance(answer, dict):
            if self.key not in answer:
                raise JudgeError(f"the judge gave no {self.key}: {text!r:.200}")
            if missing := [name for name in _required(self.schema) if name not in answer]:
                raise JudgeError(f"the judge's answer lacks {', '.join(missing)}: {text!r:.200}")
            answer = answer[self.key]
        elif self.own:
            raise JudgeError(f"the judge's answer is no JSON object: {text!r:.200}")
        number = _number(answer, self.schema["properties"][self.key])
        if not self.minimum <= number <= self.maximum:
            raise JudgeError(
                f"the judge's {self.key} {number:g} is not between {self.minimum:g} and {self.maximum:g}"
            )
        return number


def read_rule(schema: object, key: str, *, minimum: float | None, maximum: float | None) -> Rule:
    """The rule of a schema; without one, of a single number from ``minimum`` (0) to ``maximum`` (1).

    Raises:
        JudgeError: it is no schema of an object that has ``key``, or nothing lies in the range.
    """
    own = schema is not None
    low = (-math.inf if own else 0.0) if minimum is None else minimum
    high = (math.inf if own else 1.0) if maximum is None else maximum
    if schema is None:
        schema = _number_schema(key, low, high)
    if not low <= high:
        raise JudgeError(f"llm_judge has minimum {low:g} above maximum {high:g}")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping) or not isinstance(properties, Mapping):
        raise JudgeError("llm_judge's schema is not that of an object: it has no properties")
    if key not in properties:
        there = ", ".join(map(str, properties))
        raise JudgeError(
            f"llm_judge's schema has no property {key!r}: say with score_key= which of {there} is the score"
        )
    try:
        json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise JudgeError(f"llm_judge's schema is not JSON: {error}") from None
    if not _kinds(properties[key]) & _SCORES:
        raise JudgeError(
            f"property {key!r} of llm_judge's schema is no number: score_key= names one that is"
        )
    return Rule(schema=schema, key=key, minimum=low, maximum=high, own=own)


def _number_schema(key: str, minimum: float, maximum: float) -> dict[str, object]:
    return {
        "type": "object",
        "properties": {key: {"type": "number", "description": f"from {minimum:g} to {maximum:g}"}},
        "required": [key],
        "additionalProperties": False,
    }


def _required(schema: Mapping[str, Any]) -> Sequence[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _read_json(text: str, key: str) -> object:
    """JSON alone, or the one object with the score in a code fence or among words."""
    text = strip_thinking(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        found = [*_objects(text)]
    chosen = [answer for answer in found if key in answer] or found
    if not chosen:
        raise JudgeError(f"the judge gave no score: {text!r:.200}")
    if any(other != chosen[0] for other in chosen):
        raise JudgeError(f"the judge gave more than one answer: {text!r:.200}")
    return chosen[0]


def _objects(text: str) -> Iterator[dict[str, object]]:
    """The JSON objects in a text that are in no other, of those that begin at one of its first braces."""
    decoder, end = json.JSONDecoder(), 0
    for _ in range(_MAX_BRACES):
        start = text.find("{", end)
        if start < 0:
            return
        try:
            found, end = decoder.raw_decode(text, start)
            yield found
        except (ValueError, RecursionError):
            end = start + 1


def _kinds(declared: object) -> set[str]:
    """The types that the score's own part of the schema allows; a number where it names none (``anyOf``, ``$ref``)."""
    named = declared.get("type") if isinstance(declared, Mapping) else None
    if isinstance(named, list):
        return {kind for kind in named if isinstance(kind, str)}
    return {named} if isinstance(named, str) else {"number"}


def _number(score: object, declared: object) -> float:
    """The score as a number; ``declared`` is its own part of the schema."""
    kinds = _kinds(declared)
    if not _fits(score, kinds):
        what = "a number" if kinds == {"number"} else f"of type {' or '.join(sorted(kinds))}"
        raise JudgeError(f"the judge's score is not {what}: {score!r:.200}")
    try:
        number = float(score)  # pyright: ignore[reportArgumentType]
    except (ValueError, OverflowError):  # a word; an integer of hundreds of digits
        number = math.nan
    if not math.isfinite(number):
        raise JudgeError(f"the judge's score is not a number: {score!r:.200}")
    if isinstance(declared, Mapping) and (fault := _outside(score, number, declared)):
        raise JudgeError(f"the judge's score {score!r:.50} is outside its schema: {fault}")
    return number


def _fits(score: object, kinds: set[str]) -> bool:
    if isinstance(score, bool):
        return "boolean" in kinds
    if isinstance(score, str):
        return "string" in kinds
    if "number" in kinds:
        return isinstance(score, int | float)
    whole = isinstance(score, int) or (isinstance(score, float) and score.is_integer())
    return "integer" in kinds and whole


def _outside(score: object, number: float, declared: Mapping[str, Any]) -> str | None:
    """The bound that it breaks, if any."""
    bounds = {
        "minimum": operator.ge,
        "maximum": operator.le,
        "exclusiveMinimum": operator.gt,
        "exclusiveMaximum": operator.lt,
    }
    for name, holds in bounds.items():
        bound = declared.get(name)
        if isinstance(bound, int | float) and not holds(number, bound):
            return f"{name} {bound:g}"
    allowed = [declared["const"]] if "const" in declared else declared.get("enum")
    if isinstance(allowed, list) and score not in allowed:
        return f"one of {', '.join(map(repr, allowed))[:100]}"
    return None
