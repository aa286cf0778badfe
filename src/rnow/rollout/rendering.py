"""Messages to token ids, and back. The only place where a chat template runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict
from weakref import WeakKeyDictionary

from rnow.protocols import Tokenizer, Tool
from rnow.text.strict_json import mend_surrogates
from rnow.types import Message

ZERO_WIDTH = "\u200b"

_THINKING_OFF = frozenset({"disabled", "none"})
_ROUNDS = 8
_INERT_TEXT: WeakKeyDictionary[Tokenizer, Callable[[str], str]] = WeakKeyDictionary()


class ToolFunction(TypedDict):
    """``parameters`` is a JSON schema, an object."""

    name: str
    description: str
    parameters: Mapping[str, object]


class ToolDescription(TypedDict):
    """What a chat template is told of a tool; ``type`` is ``function``."""

    type: str
    function: ToolFunction


def describe_tools(tools: Iterable[Tool]) -> tuple[ToolDescription, ...]:
    """The tools as chat templates read them."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in tools
    )


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    reasoning_mode: str | None = None,
    tools: Sequence[ToolDescription] | None = None,
    generation_prompt: bool = True,
) -> str:
    """The conversation as the chat template writes it, before tokenisation.

    Text of the conversation and of the tools cannot become a control token: see ``neutralise``.

    Args:
        tokenizer: with a chat template.
        reasoning_mode: passed to the template as ``enable_thinking`` / ``thinking`` / ``reasoning_effort``, where it
            reads them.
        tools: descriptions of the tools the student may call; none, or an empty sequence, for a prompt without.
        generation_prompt: whether the assistant's next turn is opened.
    """
    inert = _inert_text(tokenizer)
    text = tokenizer.apply_chat_template(
        [_safe_message(message, inert) for message in messages],
        tools=[_safe(tool, inert) for tool in tools] if tools else None,
        tokenize=False,
        add_generation_prompt=generation_prompt,
        **_reasoning_switches(reasoning_mode),
    )
    return str(text)


def decode_all(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of these ids, control tokens and blanks as they are."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def template_text(tokenizer: Tokenizer, *, tools: bool) -> str:
    """The source of the chat template that is used for prompts with, or without, tools: a tokenizer may have two."""
    return str(tokenizer.get_chat_template(tools=[{}] if tools else None))


def template_shows_tools(tokenizer: Tokenizer, tools: Sequence[ToolDescription]) -> bool:
    """Whether a prompt names every tool. A template that ignores ``tools`` leaves the student ignorant of them."""
    messages = [{"role": "user", "content": "hi"}]
    inert = _inert_text(tokenizer)
    try:
        without = render_text(tokenizer, messages)
        shown = render_text(tokenizer, messages, tools=tools)
    except Exception:  # a template that refuses tools does not show them
        return False
    names = [inert(str(tool["function"]["name"])) for tool in tools]
    return all(shown.count(name) > without.count(name) for name in names)


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the text of every added token of the tokenizer, whether or not it is marked special (Qwen3's
    ``<tool_call>`` and ``<think>`` are not). None when there is none."""
    texts = sorted((t for t in tokenizer.get_added_vocab() if len(t.strip()) > 1), key=len)
    return re.compile("|".join(map(re.escape, reversed(texts)))) if texts else None


def neutralise(text: str, controls: re.Pattern[str] | None) -> str:
    """Break every control token spelled out in ``text`` with a zero-width space after its first character, so that it
    reads the same and encodes as ordinary text. Text without one is returned unchanged."""
    if controls is None:
        return text
    # Repeated until none is left: two control tokens may share letters, and one pass breaks only the first of them.
    while controls.search(text):
        text = controls.sub(lambda match: match.group()[0] + ZERO_WIDTH + match.group()[1:], text)
    return text


def _inert_text(tokenizer: Tokenizer) -> Callable[[str], str]:
    """``neutralise`` for one tokenizer, made once. Also mends what only shows after the tokenizer's normaliser ran (it may
    turn look-alike letters into a control token), and lone surrogates, which no tokenizer takes."""
    if tokenizer not in _INERT_TEXT:
        _INERT_TEXT[tokenizer] = _make_inert_text(tokenizer)
    return _INERT_TEXT[tokenizer]


def _make_inert_text(tokenizer: Tokenizer) -> Callable[[str], str]:
    controls = control_pattern(tokenizer)
    normalise, hidden = _normalised_controls(tokenizer)

    def inert(text: str) -> str:
        text = neutralise(mend_surrogates(text), controls)
        if normalise is None or hidden is None:
            return text
        for _ in range(_ROUNDS):
            normal = normalise(text)
            if not hidden.search(normal):
                return text
            # The normaliser might drop a zero-width space; it cannot drop the blanks between all letters.
            text = neutralise(hidden.sub(lambda match: " ".join(match.group()), normal), controls)
        return hidden.sub("", normalise(text))

    return inert


def _normalised_controls(
    tokenizer: Tokenizer,
) -> tuple[Callable[[str], str] | None, re.Pattern[str] | None]:
    """The tokenizer's normaliser, and what matches the added tokens that it looks for after normalising."""
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normaliser is None:
        return None, None
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    texts = {normaliser.normalize_str(token.content) for token in added if token.normalized}
    longest_first = sorted((text for text in texts if len(text.strip()) > 1), key=len, reverse=True)
    if not longest_first:
        return None, None
    return normaliser.normalize_str, re.compile("|".join(map(re.escape, longest_first)))


def _safe_message(message: Message, inert: Callable[[str], str]) -> dict[str, object]:
    # Templates print more than the content: names, reasoning, the arguments of tool calls.
    safe = {key: value if key == "role" else _safe(value, inert) for key, value in message.items()}
    return safe | {"content": "" if safe.get("content") is None else safe["content"]}


def _safe(value: object, inert: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return inert(value)
    if isinstance(value, Mapping):
        return {_safe(key, inert): _safe(item, inert) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_safe(item, inert) for item in value]
    return value


def _reasoning_switches(reasoning_mode: str | None) -> dict[str, object]:
    # Qwen reads `enable_thinking`, DeepSeek V3.1 `thinking`, others the effort.
    if reasoning_mode is None:
        return {}
    if reasoning_mode in _THINKING_OFF:
        return {"enable_thinking": False, "thinking": False}
    return {"enable_thinking": True, "thinking": True, "reasoning_effort": reasoning_mode}
