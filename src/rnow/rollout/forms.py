"""Giving a message the form that its chat template prints.

Templates differ in what they take: a text or a list of parts as content, an object or JSON text as a call's arguments. One
that is given the other form prints nothing, or Python's notation of it. So each is asked once, with words that no
conversation holds, and messages are written as it prints them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rnow.core.messages import message_text
from rnow.rollout.probe import USER, new_mark
from rnow.rollout.template_process import TemplateFault
from rnow.text.json_values import read_arguments
from rnow.types import Message

Probe = Callable[[Sequence[Message]], str]
"""What the template writes, or TemplateFault."""

_ID = "call00000"  # nine letters: Mistral's templates want that many


@dataclass(slots=True)
class Forms:
    """What one chat template prints, as far as it was asked."""

    _joined: dict[str, bool] = field(default_factory=dict)
    _parted: dict[str, bool] = field(default_factory=dict)
    _as_text: bool | None = None

    def prepare(self, messages: Sequence[Message], write: Probe) -> list[Message]:
        """The messages as the template prints them; one that it prints as it is stays so."""
        return [self._message(message, write) for message in messages]

    def _message(self, message: Message, write: Probe) -> Message:
        role, content, calls = (
            message.get("role"),
            message.get("content"),
            message.get("tool_calls"),
        )
        if content is None:
            message = {**message, "content": ""}
        elif isinstance(content, list) and _all_text(content):
            if self._wants_text(str(role), write):
                message = {**message, "content": message_text(content)}
        elif isinstance(content, str) and content and self._wants_parts(str(role), write):
            message = {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(calls, list) and calls:
            message = {**message, "tool_calls": [self._call(call, write) for call in calls]}
        return message

    def _call(self, call: object, write: Probe) -> object:
        if not isinstance(call, dict):
            return call
        function = call.get("function")
        if isinstance(function, dict):
            return {**call, "function": self._function(function, write)}
        return self._function(call, write)

    def _function(self, function: dict[str, object], write: Probe) -> dict[str, object]:
        arguments = read_arguments(function.get("arguments"))
        if arguments is None:
            return function
        if not self._wants_json_text(write):
            return {**function, "arguments": arguments}
        if isinstance(function["arguments"], str):
            return function
        return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}

    def _wants_text(self, role: str, write: Probe) -> bool:
        """Whether this role's content must be a text: a list of parts is printed otherwise than the same as one text."""
        if role not in self._joined:
            first, second = new_mark(), new_mark()
            parts = [{"type": "text", "text": mark} for mark in (first, second)]
            shown = _squeezed(_try(write, role, parts), first, second)
            self._joined[role] = shown is None or (
                shown != _squeezed(_try(write, role, first + second), first, second)
                and not self._wants_parts(role, write)
            )
        return self._joined[role]

    def _wants_parts(self, role: str, write: Probe) -> bool:
        """Whether this role's content must be a list of parts: a text is not printed."""
        if role not in self._parted:
            mark = new_mark()
            as_text = _try(write, role, mark)
            as_parts = _try(write, role, [{"type": "text", "text": mark}])
            self._parted[role] = mark not in (as_text or "") and mark in (as_parts or "")
        return self._parted[role]

    def _wants_json_text(self, write: Probe) -> bool:
        if self._as_text is None:
            mark = new_mark()
            given = {"value": mark}
            as_object = _try_call(write, given)
            clean = mark in (as_object or "") and str(given) not in (as_object or "")
            self._as_text = not clean and mark in (_try_call(write, json.dumps(given)) or "")
        return self._as_text


def _all_text(parts: Sequence[object]) -> bool:
    return all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts)


def _try(write: Probe, role: str, content: object) -> str | None:
    """The shortest conversation with such a message that the template takes; None when it takes none."""
    message: Message = {"role": role, "content": content}
    match role:
        case "system":
            tries = [[message, USER]]
        case "assistant":
            tries = [[USER, message], [USER, message, USER]]
        case "tool":
            answer = {**message, "name": "lookup", "tool_call_id": _ID}
            tries = [[USER, _calling(given), answer] for given in ({"value": 1}, '{"value": 1}')]
        case _:
            tries = [[message]]
    for messages in tries:
        try:
            return write(messages)
        except TemplateFault:
            continue
    return None


def _try_call(write: Probe, arguments: object) -> str | None:
    answer: Message = {
        "role": "tool", "name": "lookup", "tool_call_id": _ID, "content": "done",
    }  # fmt: skip
    for messages in ([USER, _calling(arguments)], [USER, _calling(arguments), answer]):
        try:
            return write(messages)
        except TemplateFault:
            continue
    return None


def _calling(arguments: object) -> Message:
    function = {"name": "lookup", "arguments": arguments}
    calls = [{"id": _ID, "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _squeezed(text: str | None, first: str, second: str) -> str | None:
    """What is written around the marks, without blanks; None when they are not written, each once and in order."""
    if text is None or text.count(first) != 1 or text.count(second) != 1:
        return None
    before, _, rest = text.partition(first)
    between, found, after = rest.partition(second)
    return "".join(f"{before}|{between}|{after}".split()) if found else None
