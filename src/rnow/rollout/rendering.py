"""Messages to token ids, and back. The only place where a chat template runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rnow.types import Message

ZERO_WIDTH = "\u200b"

_THINKING_OFF = frozenset({"disabled", "none"})


def render_prompt(
    tokenizer: Any, messages: Sequence[Message], *, reasoning_mode: str | None = None
) -> tuple[int, ...]:
    """Token ids of a conversation with the assistant's turn opened.

    Text of the conversation cannot become a control token: see ``neutralise``.

    Args:
        tokenizer: a HuggingFace tokenizer with a chat template.
        messages: the conversation, ending with anything but an assistant message.
        reasoning_mode: passed to the template as ``enable_thinking`` / ``reasoning_effort``, where it reads them.
    """
    text = render_text(tokenizer, messages, reasoning_mode=reasoning_mode)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def render_text(
    tokenizer: Any, messages: Sequence[Message], *, reasoning_mode: str | None = None
) -> str:
    """The conversation as the chat template writes it, before tokenisation."""
    controls = control_pattern(tokenizer)
    safe = [_safe_message(message, controls) for message in messages]
    return tokenizer.apply_chat_template(
        safe, tokenize=False, add_generation_prompt=True, **_reasoning_switches(reasoning_mode)
    )


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the text of every added token of the tokenizer, whether or not it is marked special (Qwen3's
    ``<tool_call>`` and ``<think>`` are not). None when there is none."""
    if not hasattr(tokenizer, "_rnow_control_pattern"):
        texts = sorted((t for t in tokenizer.get_added_vocab() if len(t.strip()) > 1), key=len)
        longest_first = "|".join(map(re.escape, reversed(texts)))
        tokenizer._rnow_control_pattern = re.compile(longest_first) if texts else None
    return tokenizer._rnow_control_pattern


def neutralise(text: str, controls: re.Pattern[str] | None) -> str:
    """Break every control token spelled out in ``text`` with a zero-width space after its first character, so that it
    reads the same and encodes as ordinary text. Text without one is returned unchanged."""
    if controls is None:
        return text
    # Again until none is left: two control tokens may share letters, and one pass breaks only the first of them.
    while controls.search(text):
        text = controls.sub(lambda match: match.group()[0] + ZERO_WIDTH + match.group()[1:], text)
    return text


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of sampled ids, control tokens left out, nothing cleaned up."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def _safe_message(message: Message, controls: re.Pattern[str] | None) -> dict[str, Any]:
    # Templates print more than the content: names, reasoning, the arguments of tool calls.
    safe = {
        key: value if key == "role" else _safe(value, controls) for key, value in message.items()
    }
    return safe | {"content": "" if safe.get("content") is None else safe["content"]}


def _safe(value: Any, controls: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return neutralise(value, controls)
    if isinstance(value, Mapping):
        return {_safe(key, controls): _safe(item, controls) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_safe(item, controls) for item in value]
    return value


def _reasoning_switches(reasoning_mode: str | None) -> dict[str, Any]:
    if reasoning_mode is None:
        return {}
    if reasoning_mode in _THINKING_OFF:
        return {"enable_thinking": False}
    return {"enable_thinking": True, "reasoning_effort": reasoning_mode}
