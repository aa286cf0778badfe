"""Control tokens, and keeping what a conversation says from becoming one.

Whose a letter is shows a second rendering, in which the letters of every text are replaced by stand-ins of a private
alphabet: what comes out as a stand-in was said, what comes out as a letter was written by the template. A control token
with a stand-in in it is broken by an invisible space, wherever its letters came from: one text, several parts, the name
of a tool between the template's own brackets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rnow.protocols import Tokenizer
from rnow.types import Message

ZERO_WIDTH = "\u200b"

_BREAKERS = (ZERO_WIDTH, "\u2060", " ")
_ROUNDS = 16
_PRIVATE = range(0xF0000, 0x10FFFE)
_THINKING = re.compile("(</?think>)")
# Markers that models were taught, also where the template at hand does not write them; ``<|...|>`` in either bar.
_MARKER = re.compile(
    r"<[|｜].*[|｜]>|</?(?:think|tools?|tool_calls?|tool_response|tool_result|function|arg_key|arg_value)>",
    re.DOTALL,
)
# What templates read in messages and schemas, rather than print.
_WORDS = frozenset(
    [
        "type",
        "function",
        "name",
        "description",
        "parameters",
        "properties",
        "required",
        "items",
        "enum",
        "default",
        "const",
        "title",
        "format",
        "anyOf",
        "allOf",
        "oneOf",
        "not",
        "additionalProperties",
        "$ref",
        "$defs",
        "definitions",
        "strict",
        "nullable",
        "return",
        "minimum",
        "maximum",
        "minItems",
        "maxItems",
        "string",
        "integer",
        "number",
        "boolean",
        "array",
        "object",
        "null",
        "text",
        "id",
        "arguments",
    ]
)

Change = Callable[[str], str]
Tools = Sequence[Mapping[str, object]] | None


@dataclass(frozen=True, slots=True)
class Marks:
    """Letters and their stand-ins, in both directions. ``back`` also knows those of what breaks a token."""

    forth: Mapping[int, str]
    back: Mapping[int, str]
    breakers: tuple[str, ...]

    def mark(self, text: str) -> str:
        """``text`` in stand-ins."""
        return text.translate(self.forth)


@dataclass(frozen=True, slots=True)
class Controls:
    """The control tokens of one tokenizer.

    Attributes:
        pattern: matches the text of each; None when there is none.
        letters: all that they are made of, but blanks, quotes and backslashes (which JSON would write differently).
        normalise: the tokenizer's normaliser, and ``hidden`` what matches the tokens that it looks for behind it; None
            where there is nothing of the kind.
    """

    pattern: re.Pattern[str] | None = None
    letters: str = ""
    normalise: Change | None = None
    hidden: re.Pattern[str] | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Controls:
        """Every added token that is marked special, that a chat template of the tokenizer names, or that reads like a
        marker (Qwen3's ``<tool_call>`` is not marked special). Other added tokens are ordinary text (Gemma's ``<b>``)."""
        texts = [text for text in _control_texts(tokenizer) if len(text.strip()) > 1]
        normalise, hidden = _hidden_controls(tokenizer, frozenset(texts))
        letters = {letter for text in texts for letter in text if not letter.isspace()}
        return cls(_any_of(texts), "".join(sorted(letters - set("\"'\\"))), normalise, hidden)

    def found_in(self, text: str) -> bool:
        """Whether there is a control token in ``text``, whoever wrote it."""
        return bool(self.pattern and self.pattern.search(text)) or self._hidden_count(text) > 0

    def spelled_in(self, messages: Sequence[Message], tools: Tools) -> str | None:
        """A control token that one text spells by itself, or that shows behind the normaliser; None without any."""
        found: list[str] = []

        def look(text: str) -> str:
            if self.pattern is not None:
                found.extend(self.pattern.findall(text))
            if self.hidden is not None and self.normalise is not None:
                found.extend(self.hidden.findall(self.normalise(text)))
            return text

        change_texts(messages, tools, look)
        return found[0] if found else None

    def marks_for(self, text: str) -> Marks:
        """Stand-ins that do not occur in ``text``."""
        return _marks(self.letters, text)

    def own_only(self, raw: str, marked: str, marks: Marks) -> tuple[str, str | None] | None:
        """``raw`` with the control tokens broken that hold a stand-in, and the first of them.

        Args:
            marked: the same conversation rendered with stand-ins.

        Returns None where that cannot be told, because the template reads what the texts say, and there are more control
        tokens than its own.
        """
        broken = None
        if self.pattern is not None:
            if marked.translate(marks.back) == raw:
                raw, broken = _break(marked, marks, self.pattern)
            elif not _count(self.pattern, raw) <= _count(self.pattern, marked):
                return None
        if self._hidden_count(raw) > self._hidden_count(marked):
            return None
        return raw, broken

    def inert(self, text: str) -> str:
        """``text`` by itself with its control tokens broken, also those that only show behind the normaliser."""
        text = neutralise(text, self.pattern)
        if self.normalise is None or self.hidden is None:
            return text
        for _ in range(_ROUNDS):
            normal = self.normalise(text)
            if not self.hidden.search(normal):
                return text
            # The normaliser might drop a zero-width space; it cannot drop the blanks between all letters.
            spaced = self.hidden.sub(lambda match: " ".join(match.group()), normal)
            text = neutralise(spaced, self.pattern)
        return self.scrub(text)

    def scrub(self, text: str) -> str:
        """``text`` without any letter of a control token."""
        return text.translate({ord(letter): None for letter in self.letters})

    def _hidden_count(self, text: str) -> int:
        if self.normalise is None or self.hidden is None:
            return 0
        return len(self.hidden.findall(self.normalise(text)))


def neutralise(text: str, controls: re.Pattern[str] | None) -> str:
    """Break every control token spelled out in ``text`` with a zero-width space after its first character, so that it
    reads the same and encodes as ordinary text. Text without one is returned unchanged."""
    if controls is None or not controls.search(text):
        return text
    marks = _marks("".join(set(text)), text)
    return _break(text.translate(marks.forth), marks, controls)[0]


def change_texts(
    messages: Sequence[Message], tools: Tools, change: Change
) -> tuple[list[dict[str, object]], Tools]:
    """The conversation with ``change`` made to its texts, names and keys included; but not to roles, nor to thinking tags
    in what the assistant said: those are the template's to keep or drop."""

    def said(text: str) -> str:
        pieces = _THINKING.split(text)
        return "".join(piece if _THINKING.fullmatch(piece) else change(piece) for piece in pieces)

    changed: list[dict[str, object]] = []
    for message in messages:
        role = message.get("role")
        changed.append({"role": role})
        for key, value in message.items():
            if key != "role":
                of_assistant = key == "content" and role == "assistant"
                changed[-1][key] = _changed(value, said if of_assistant else change)
    shown = tools and [{str(key): _changed(tool[key], change) for key in tool} for tool in tools]
    return changed, shown


def _changed(value: object, change: Change) -> object:
    if isinstance(value, str):
        return value if value in _WORDS else change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_changed(item, change) for item in value]
    return value


def _break(marked: str, marks: Marks, controls: re.Pattern[str]) -> tuple[str, str | None]:
    """The text of ``marked`` without a control token that holds a stand-in, and the first that was broken.

    Bounded, whatever the tokens are: one may be another with an invisible space inside. In the end what was said goes.
    """
    first = None
    for breaker in marks.breakers:
        for _ in range(_ROUNDS):
            text = marked.translate(marks.back)
            at = [
                match.start() + 1
                for match in controls.finditer(text)
                if marked[match.start() : match.end()] != match.group()
            ]
            if not at:
                return text, first
            if first is None:
                match = controls.match(text, at[0] - 1)
                first = match.group() if match else ""
            pieces = [marked[i:j] for i, j in zip([0, *at], [*at, len(marked)], strict=True)]
            marked = breaker.join(pieces)
    return marked.translate(dict.fromkeys(marks.back)), first


def _marks(letters: str, text: str) -> Marks:
    taken = {letter for letter in set(text) if ord(letter) >= _PRIVATE.start}
    free = (chr(code) for code in _PRIVATE if not taken or chr(code) not in taken)
    meant = [*letters, *_BREAKERS]
    stand_ins = list(islice(free, len(meant)))
    return Marks(
        forth={ord(a): b for a, b in zip(letters, stand_ins, strict=False)},
        back={ord(b): a for a, b in zip(meant, stand_ins, strict=True)},
        breakers=tuple(stand_ins[len(letters) :]),
    )


def _control_texts(tokenizer: Tokenizer) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token.content for token in added.values() if token.special}
    special |= {tokenizer.decode([token]) for token in tokenizer.all_special_ids}
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, Mapping) else (template or "",)
    return {
        text
        for text in tokenizer.get_added_vocab()
        if text in special or _MARKER.fullmatch(text) or any(text in source for source in sources)
    }


def _hidden_controls(
    tokenizer: Tokenizer, controls: frozenset[str]
) -> tuple[Change | None, re.Pattern[str] | None]:
    """The tokenizer's normaliser, and what matches the control tokens that it looks for after normalising."""
    normaliser = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normaliser is None:
        return None, None
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    looked_for = [t.content for t in added if t.normalized and t.content in controls]
    pattern = _any_of([normaliser.normalize_str(text) for text in looked_for])
    return (normaliser.normalize_str, pattern) if pattern else (None, None)


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted({t for t in texts if len(t.strip()) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _count(pattern: re.Pattern[str], text: str) -> Counter[str]:
    return Counter(pattern.findall(text))
