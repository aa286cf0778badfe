"""Which tokens of a conversation the assistant wrote, its end-of-turn tokens included: those that sft trains on.

A chat template that marks what the assistant wrote (``{% generation %}``) says so itself. Any other is rendered turn by turn: up
to an answer with the next turn opened, and up to the end of the answer. Each must begin the next one, and the last the whole
conversation; what lies between an opening and its end is what the student will have to write there. A template that writes
earlier turns anew when more follows, or an answer otherwise than it opens one, does not allow that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

from rnow.protocols import Tokenizer
from rnow.rollout.rendering import (
    Conversation,
    Rendering,
    decode_all,
    render,
    template_text,
)
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE = range(0xE000, 0xF8FF)
"""Letters that no text has to have: two of them mark what the template marks."""

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to token ids, without any that the tokenizer would add."""
Spans = tuple[tuple[int, int], ...]
"""Stretches ``[start, end)`` of a text or of a sequence of tokens, in order."""


class MaskFault(Exception):
    """The assistant's tokens in a conversation cannot be told from the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedConversation:
    """A conversation as tokens, up to the last that the assistant wrote.

    Attributes:
        loss_mask: True exactly on the tokens that the assistant wrote, the end of each of its turns included.
        altered: a control token that a text spelled and that was broken; see ``rendering.Rendering``.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    altered: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A conversation as text; ``spans`` of it are the assistant's. ``whole``: each span is a whole turn, rather than what a mark
    says of one."""

    text: str
    spans: Spans
    whole: bool
    altered: str | None


def mask_conversations(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    encode: Encode,
    *,
    stop_ids: Sequence[int],
    reasoning_mode: str | None = None,
) -> list[MaskedConversation | MaskFault | TemplateFault]:
    """Each conversation as tokens with its mask, or why there is none.

    Args:
        conversations: messages, and the tools shown with them.
        stop_ids: every id that ends a turn. Where a template writes none after the last answer, the tokenizer's own is added.
        reasoning_mode: as in ``render``.

    Raises:
        InputError: the template takes too long, or writes too much.
    """
    ending = _Ending(tokenizer=tokenizer, stops=tuple(stop_ids))
    found = _by_marks(tokenizer, conversations, reasoning_mode)
    others = [index for index in range(len(conversations)) if index not in found]
    turns = _by_turns(tokenizer, [conversations[i] for i in others], ending.texts, reasoning_mode)
    found |= dict(zip(others, turns, strict=True))
    found = {i: _with_calls(one, conversations[i][0]) for i, one in found.items()}
    read = {index: one for index, one in found.items() if isinstance(one, _Read)}
    tokens = dict(zip(read, _tokenise(tokenizer, encode, [*read.values()]), strict=True))
    masked: list[MaskedConversation | MaskFault | TemplateFault] = []
    for index in range(len(conversations)):
        one, cut = found[index], tokens.get(index)
        if not isinstance(one, _Read):
            masked.append(one)
        elif isinstance(cut, MaskFault):
            masked.append(cut)
        else:
            assert cut is not None, "every text is tokenised"
            masked.append(ending.close(one, *cut))
    return masked


# --- text -----------------------------------------------------------------------------------------------------------


def _by_marks(
    tokenizer: Tokenizer, conversations: Sequence[Conversation], mode: str | None
) -> dict[int, _Read | MaskFault | TemplateFault]:
    """Those whose template marks the assistant's text, by index."""
    marking = {
        tools: bool(_MARKED.search(template_text(tokenizer, tools=tools)))
        for tools in {bool(tools) for _, tools in conversations}
    }
    asked = [i for i, (_, tools) in enumerate(conversations) if marking[bool(tools)]]
    chosen = [conversations[index] for index in asked]
    marks = _unused_letters(chosen)
    texts = render(
        tokenizer,
        chosen,
        reasoning_mode=mode,
        generation_prompt=False,
        generation_marks=marks,
    )
    found: dict[int, _Read | MaskFault | TemplateFault] = {}
    for index, text in zip(asked, texts, strict=True):
        if isinstance(text, TemplateFault):
            found[index] = text
        elif (read := _between(text, marks)) is not None:
            found[index] = read
    return found


def _unused_letters(conversations: Sequence[Conversation]) -> tuple[str, str]:
    """Two letters that occur in none of these."""
    used = set(json.dumps([*map(list, conversations)], ensure_ascii=False, default=str))
    first, second = islice((chr(code) for code in _PRIVATE if chr(code) not in used), 2)
    return first, second


def _between(rendered: Rendering, marks: tuple[str, str]) -> _Read | None:
    """What the marks enclose, and the text without them; None where they mark nothing."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    at = start = 0
    for piece in re.split(f"([{marks[0]}{marks[1]}])", rendered.text):
        if piece == marks[0]:
            start = at
        elif piece == marks[1]:
            spans.append((start, at))
        else:
            pieces.append(piece)
            at += len(piece)
    if all(a == b for a, b in spans):
        return None
    return _Read(text="".join(pieces), spans=tuple(spans), whole=False, altered=rendered.altered)


def _by_turns(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    stops: Sequence[str],
    mode: str | None,
) -> list[_Read | MaskFault | TemplateFault]:
    """The text and spans of each, from renderings that end before and after every answer. ``stops``: what ends a turn."""
    answers = [
        [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for messages, _ in conversations
    ]
    opened = [
        (messages[:index], tools)
        for (messages, tools), own in zip(conversations, answers, strict=True)
        for index in own
    ]
    ends = [
        [*dict.fromkeys([*(index + 1 for index in own), len(messages)])]
        for (messages, _), own in zip(conversations, answers, strict=True)
    ]
    closed = [
        (messages[:end], tools)
        for (messages, tools), own in zip(conversations, ends, strict=True)
        for end in own
    ]
    openings = iter(render(tokenizer, opened, reasoning_mode=mode))
    endings = iter(render(tokenizer, closed, reasoning_mode=mode, generation_prompt=False))
    return [
        _spans_of(own, [*islice(openings, len(own))], [*islice(endings, len(ending))], stops)
        for own, ending in zip(answers, ends, strict=True)
    ]


def _spans_of(
    answers: Sequence[int],
    openings: Sequence[Rendering | TemplateFault],
    endings: Sequence[Rendering | TemplateFault],
    stops: Sequence[str],
) -> _Read | MaskFault | TemplateFault:
    """Where each answer lies in the whole conversation, which is the last of ``endings``."""
    *_, whole = endings
    if isinstance(whole, TemplateFault):
        return whole
    spans: list[tuple[int, int]] = []
    for index, opening, ending in zip(answers, openings, endings[: len(answers)], strict=True):
        for found in (opening, ending):
            if isinstance(found, TemplateFault):
                return MaskFault(
                    f"the chat template refuses the conversation up to message {index + 1} by itself: {found}"
                )
        assert isinstance(opening, Rendering)
        assert isinstance(ending, Rendering)
        if not ending.text.startswith(opening.text):
            return MaskFault(
                f"the chat template writes message {index + 1} otherwise than it opens an answer there: "
                + _difference(opening.text, ending.text)
            )
        end = _end_in(whole.text, ending.text, len(opening.text), stops)
        if end is None:
            return MaskFault(
                f"the chat template writes message {index + 1} anew when others follow it: "
                + _difference(ending.text, whole.text)
            )
        spans.append((len(opening.text), end))
    return _Read(text=whole.text, spans=tuple(spans), whole=True, altered=whole.altered)


def _end_in(whole: str, ending: str, start: int, stops: Sequence[str]) -> int | None:
    """Where the answer from ``start`` on ends in the whole conversation; None where that has another answer there. What ends a
    conversation besides its last turn (Phi-3's ``<|endoftext|>``) goes when others follow."""
    if whole.startswith(ending):
        return len(ending)
    pattern = re.compile("|".join(map(re.escape, stops)) or "(?!)")
    ends = [match.end() for match in pattern.finditer(ending, start)]
    for end in reversed(ends):
        if not pattern.sub("", ending[end:]).strip() and whole.startswith(ending[:end]):
            return end
    return None


def _with_calls(
    read: _Read | MaskFault | TemplateFault, messages: Sequence[Message]
) -> _Read | MaskFault | TemplateFault:
    """What was read, if the tool calls of every answer are in it: one that is not printed would teach to answer nothing."""
    if not isinstance(read, _Read):
        return read
    said = "".join(read.text[start:end] for start, end in read.spans)
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        for call in calls if isinstance(calls, list) else ():
            name = str(call.get("function", call).get("name") or "")
            if name not in said:
                return MaskFault(
                    f"the chat template does not print the tool calls of message {index + 1}"
                )
    return read


def _difference(one: str, other: str) -> str:
    """The first place where two texts part."""
    at = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return f"{one[at : at + 24]!r} becomes {other[at : at + 24]!r}"


# --- tokens ---------------------------------------------------------------------------------------------------------


def _tokenise(
    tokenizer: Tokenizer, encode: Encode, read: Sequence[_Read]
) -> Iterator[tuple[list[int], Spans] | MaskFault]:
    """The ids of each text, cut where an answer begins and ends, and the spans among them.

    As the sampler would have them, an answer's tokens never share one with what is before them: in most conversations the ids
    of the whole text are those of its pieces. Where they are not (a newline that closes the opening and one that begins the
    answer are one token together), the pieces are what is trained, if they mean the same text.
    """
    cuts = [sorted({0, len(one.text), *(at for span in one.spans for at in span)}) for one in read]
    wholes = encode([one.text for one in read])
    pieces = iter(
        encode([one.text[a:b] for one, at in zip(read, cuts, strict=True) for a, b in pairwise(at)])
    )
    for one, at, whole in zip(read, cuts, wholes, strict=True):
        own = [list(piece) for piece in islice(pieces, len(at) - 1)]
        ids, places = [token for piece in own for token in piece], [0, *accumulate(map(len, own))]
        if ids != list(whole):
            found = _prefixes(encode, one.text, at, whole)
            if found is not None:
                ids, places = list(whole), found
            elif decode_all(tokenizer, ids) != decode_all(tokenizer, whole):
                yield MaskFault(
                    "its tokenizer joins an answer and the text around it into one token"
                )
                continue
        place = dict(zip(at, places, strict=True))
        yield ids, tuple((place[start], place[end]) for start, end in one.spans)


def _prefixes(
    encode: Encode, text: str, cuts: Sequence[int], whole: Sequence[int]
) -> list[int] | None:
    """How many ids the text up to each cut has, where they are the first of the whole's: of a tokenizer that puts a blank before
    every text it is given."""
    prefixes = encode([text[:cut] for cut in cuts])
    if any(list(ids) != list(whole[: len(ids)]) for ids in prefixes):
        return None
    return [len(ids) for ids in prefixes]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """Where the turns of a conversation end, in tokens."""

    tokenizer: Tokenizer
    stops: tuple[int, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """What ends a turn, as templates write it: the longest first."""
        texts = {decode_all(self.tokenizer, [token]) for token in self.stops} - {""}
        return tuple(sorted(texts, key=lambda text: (-len(text), text)))

    def close(
        self, read: _Read, token_ids: list[int], spans: Spans
    ) -> MaskedConversation | MaskFault:
        """Each span up to the end of its turn, and no further."""
        ends: list[tuple[int, int]] = []
        for start, end in spans:
            closed = self._end_of(token_ids, start, end)
            if closed is None and start == end and not read.whole:
                continue  # a mark around nothing, and no end of a turn behind it
            more = self._last_stop(token_ids, start, end) if closed is None and read.whole else None
            if more is not None:
                return MaskFault(
                    f"the chat template writes more behind the end of an answer: {more[1][:24]!r}"
                )
            if closed is None and not decode_all(self.tokenizer, token_ids[end:]).strip():
                stop = self._own_stop
                if stop is None:
                    return MaskFault("the model has no token that ends a turn")
                # The template leaves the last turn open: the student has to learn where it ends all the same.
                token_ids, closed = [*token_ids[:end], stop], end + 1
            elif closed is None and read.whole:
                return MaskFault("the chat template ends no answer with a token of its own")
            ends.append((start, closed or end))
        mask = [False] * len(token_ids)
        for start, end in ends:
            mask[start:end] = [True] * (end - start)
        if mask:
            mask[0] = False  # nothing comes before it that could predict it
        if True not in mask:
            return MaskFault("the chat template writes nothing of what the assistant says")
        last = len(mask) - mask[::-1].index(True)
        return MaskedConversation(
            token_ids=tuple(token_ids[:last]), loss_mask=tuple(mask[:last]), altered=read.altered
        )

    def _end_of(self, ids: Sequence[int], start: int, end: int) -> int | None:
        """After the last stop token of a span, where nothing but blanks follows it inside; after the one that follows the span,
        where the span has none; None without either."""
        found = self._last_stop(ids, start, end)
        if found is not None and not found[1].strip():
            return found[0]
        return end + 1 if end < len(ids) and ids[end] in self.stops else None

    def _last_stop(self, ids: Sequence[int], start: int, end: int) -> tuple[int, str] | None:
        """The place after the last stop token of a span, and what follows it inside; None where it has none."""
        after = [at + 1 for at in range(start, end) if ids[at] in self.stops]
        return (after[-1], decode_all(self.tokenizer, ids[after[-1] : end])) if after else None

    @property
    def _own_stop(self) -> int | None:
        own = self.tokenizer.eos_token_id
        return own if own is not None else next(iter(self.stops), None)
