"""Text of models, tools and users as a page may have it: nothing in it acts, and none of it is long."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rnow.core.messages import message_text
from rnow.disk.files import to_json
from rnow.display.terminal import escape_control, shorten

MESSAGE, MESSAGES = 2_000, 12
"""Characters of a message that are kept, and messages of a prompt."""

_INERT = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def safe(text: object, limit: int = 400) -> str:
    """At most ``limit`` characters of a text, what would control a terminal or turn the line around written out."""
    return escape_control(shorten(str(text), limit))


def to_script(value: object) -> str:
    """JSON that may stand in a ``<script>`` of HTML: plain ASCII, in which no tag can begin or end."""
    return to_json(value, compact=True).translate(_INERT)


def size_of(value: object) -> int:
    """Bytes that a value takes in the page."""
    return len(to_script(value))


def messages(given: Sequence[Any]) -> list[list[str]]:
    """A prompt as pairs of role and text: of a long conversation its beginning and its end."""
    found = [message for message in given if isinstance(message, Mapping)]
    if (left_out := len(found) - MESSAGES) > 0:
        gap = {"role": "", "content": f"[... {left_out:,} more messages]"}
        found = [*found[:2], gap, *found[2 - MESSAGES :]]
    return [[safe(message.get("role", "")), safe(_said(message), MESSAGE)] for message in found]


def _said(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    called = [json.dumps(call, ensure_ascii=False) for call in calls] if calls else []
    return "\n".join(filter(None, [message_text(message.get("content")), *called]))
