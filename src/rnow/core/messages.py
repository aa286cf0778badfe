"""Reading conversations: the text of a message, with and without the model's thinking."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_OPEN, _CLOSE = "<think>", "</think>"
_BLOCK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def message_text(content: object) -> str:
    """The text of a message's ``content``: a string, a list of parts (their texts joined), or None."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def strip_thinking(text: str) -> str:
    """``text`` without ``<think>`` blocks; unchanged when there are none.

    A block that was cut off reaches to the end. A ``</think>`` without its start ends a block which the chat template
    opened in the prompt, so everything before it goes too.
    """
    if _OPEN not in text and _CLOSE not in text:
        return text
    text = _BLOCK.sub("", text)
    return text.rpartition(_CLOSE)[2].strip()


def get_response(messages: Sequence[Mapping[str, object]]) -> str:
    """The text of the last assistant message, without thinking and surrounding blanks; "" when there is none."""
    for message in reversed(messages):
        if message.get("role") == "assistant":
            return strip_thinking(message_text(message.get("content"))).strip()
    return ""
