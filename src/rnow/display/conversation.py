"""A conversation as lines in rich's markup, safe on any terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.markup import escape

from rnow.display.terminal import escape_control, shorten
from rnow.types import EndReason, Message

SHOWN = 4000
"""Characters of a message that are shown; the files have all of it."""

ENDINGS: Mapping[EndReason, str] = {
    "answer": "ended by an answer",
    "max_turns": "ended by rollout.max_turns",
    "length": "cut by rollout.max_tokens",
    "window": "cut by the context window",
    "horizon": "ended by algorithm.kl_horizon",
    "failed": "failed",
}


def safe_markup(value: object, limit: int = SHOWN) -> str:
    """Anything as text that is safe on a terminal and in markup; of a long one the beginning."""
    return escape(escape_control(shorten(str(value), limit)))


def message_lines(
    message: Message, shown: Callable[[object], str] = safe_markup, mark: str = ""
) -> Iterator[str]:
    """What the student or a tool said.

    Args:
        shown: makes text safe, as ``safe_markup`` does.
        mark: follows the name of who speaks.
    """
    text = shown(message.get("content") or "")
    if message["role"] == "tool":
        color = "red" if message.get("failed") else "yellow"
        yield f"  [{color}]{shown(message.get('name', 'tool'))}{mark}[/] -> {text}"
        for line in str(message.get("detail") or "").rstrip().split("\n"):
            if line:
                yield f"    [dim]{shown(line)}[/]"
        return
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, Sequence) else ()
    if text or not calls:
        yield f"  [green]{message['role']}{mark}[/]: {text}"
    for call in calls:
        function = call["function"]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        name = shown(function["name"])
        yield f"  [green]{message['role']}{mark}[/] calls {name}({shown(arguments)})"
