"""``$name`` in message text, filled from a row's ``variables``."""

from __future__ import annotations

import re
from collections.abc import Mapping

# "$$" and "$x$" go first, so that mathematics is stepped over whole: in "$x$y" no variable y is seen.
_NAME = re.compile(r"\$\$|\$[^\W\d]\w*\$|\$(?P<name>[^\W\d]\w*)")


def substitute(text: str, variables: Mapping[str, object]) -> str:
    """``text`` with every ``$name`` that ``variables`` defines replaced; anything else with a ``$`` stays as it is.

    ``$$`` and ``$x$`` are mathematics. Values are not searched again, so a value may hold a ``$``.
    """
    if not variables or "$" not in text:
        return text

    def value(match: re.Match[str]) -> str:
        name = match["name"]
        return str(variables[name]) if name in variables else match.group()

    return _NAME.sub(value, text)


def substitute_message(
    message: Mapping[str, object], variables: Mapping[str, object]
) -> Mapping[str, object]:
    """The message with its text (or the text of its parts) substituted; other keys are kept."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": substitute(content, variables)}
    if isinstance(content, list):
        parts = [
            {**part, "text": substitute(part["text"], variables)}
            if isinstance(part, dict) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
        return {**message, "content": parts}
    return message
