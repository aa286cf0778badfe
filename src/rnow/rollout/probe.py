"""Small conversations that show how a chat template writes what it writes."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence

from rnow.types import Message

USER: Message = {"role": "user", "content": "hi"}


def new_mark() -> str:
    """A word that no conversation holds, to be found again in a rendered text. It never reaches a model."""
    return "mark" + secrets.token_hex(8)


def assistant_turns(calls: Sequence[tuple[str, str]], mark: str) -> Iterator[Message]:
    """An assistant's turn with these calls (id, name), ``mark`` being the argument of each, in the forms templates accept:
    arguments as an object or as JSON text; the first call alone, for templates that refuse several; no call, but ``mark``
    as its text."""
    for part in dict.fromkeys((tuple(calls), tuple(calls[:1]))):
        for arguments in ({"value": mark}, json.dumps({"value": mark})):
            yield {
                "role": "assistant",
                "content": "",
                "tool_calls": [_call(call_id, name, arguments) for call_id, name in part],
            }
    yield {"role": "assistant", "content": mark}


def _call(call_id: str, name: str, arguments: object) -> dict[str, object]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
