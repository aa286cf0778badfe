"""What is appended to the context after the student's turn.

Nothing that was sampled is rendered again. A short conversation with a turn like the student's is, and what its template
writes after the end of that turn is the observation: the newline behind the end-of-turn token, the tool messages, the
opening of the next turn. That holds for templates that write earlier turns anew (Qwen3 drops their thinking), too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from rnow.errors import InputError
from rnow.protocols import Tokenizer
from rnow.rollout.probe import USER, assistant_turns, new_mark
from rnow.rollout.rendering import ToolDescription, decode_all, render_text, template_text
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

CONTINUE: Message = {"role": "user", "content": "Continue."}
"""Follows an answer without a call where the template cannot open two assistant turns in a row."""

_READ_BY_TEMPLATES = ("role", "name", "tool_call_id", "content")
_UNNAMED = "unknown"


@dataclass(frozen=True, slots=True)
class _Tail:
    """What follows the student's turn. ``end`` is the end-of-turn token's text as the template writes it, or "" when it writes
    none; ``text`` is what comes after it."""

    end: str
    text: str


class Observations:
    """Token ids of what follows a turn, for one tokenizer and one set of tools.

    Args:
        tokenizer: the student's, with its chat template.
        tools: descriptions, as in the prompt.
        call_id: (turn, index) -> id, in the shape the template takes.
        stop_token_ids: every id that ends the student's turn.
        reasoning_mode: as in ``render_text``.

    Raises:
        InputError: the template cannot express the answers of tools.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[ToolDescription],
        *,
        call_id: Callable[[int, int], str],
        stop_token_ids: Sequence[int],
        reasoning_mode: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._mode = reasoning_mode
        self._source = template_text(tokenizer, tools=bool(tools))
        self._added = frozenset(tokenizer.get_added_vocab().values())
        # A stop id that is ordinary text (a newline) does not show where the template ends a turn.
        stops = [token for token in stop_token_ids if token in self._added] or stop_token_ids
        self._stops = tuple(decode_all(tokenizer, [token]) for token in stops)
        self._mark = new_mark()
        self._answer: tuple[_Tail, tuple[Message, ...]] | None = None
        # For turns with so many calls: the first form of them that the template takes, and the end it writes.
        self._forms: dict[int, tuple[int, str]] = {}
        for count in (1, 2):
            self._check(call_id, count)

    def after_tools(self, messages: Sequence[Message], ended_by: int | None) -> tuple[int, ...]:
        """The ids after a turn whose calls these tool messages answer, in order.

        Args:
            messages: with ``role`` tool, ``name``, ``tool_call_id`` and ``content``.
            ended_by: the stop id that the student's turn ended with; it is in the context already.
        """
        tail = self._tail_of_tools(messages)
        if tail is None:
            raise RuntimeError("the chat template refuses the answers of tools")
        return self._encode(tail, ended_by)

    def after_answer(self, ended_by: int | None) -> tuple[tuple[int, ...], tuple[Message, ...]]:
        """The ids after an answer without a call that is not the last turn, and the messages in them.

        The next assistant turn is opened, with no message between. A template that cannot do that is given one:
        ``CONTINUE``.
        """
        if self._answer is None:
            self._answer = self._tail_of_answer()
        tail, messages = self._answer
        return self._encode(tail, ended_by), messages

    # --- what the template writes ---------------------------------------------------------------------------------

    def _check(self, call_id: Callable[[int, int], str], count: int) -> None:
        contents = [new_mark() for _ in range(count)]
        messages = [
            {
                "role": "tool",
                "name": "lookup",
                "tool_call_id": call_id(0, index),
                "content": content,
            }
            for index, content in enumerate(contents)
        ]
        tail = self._tail_of_tools(messages)
        places = [tail.text.find(content) if tail else -1 for content in contents]
        if places != sorted(places) or places[0] < 0:
            raise InputError(
                "the student's chat template cannot express the answers of tools",
                title="Template without tools",
                where="model.path",
                why="the student would never see what a tool returned",
                fix="use a model that was made for tools, or give a local copy of it a chat_template.jinja with the role "
                "tool",
            )

    def _tail_of_tools(self, messages: Sequence[Message]) -> _Tail | None:
        answers = [self._plain(message) for message in messages]
        calls = [(str(m.get("tool_call_id", "")), str(m["name"])) for m in answers]
        first, end = self._forms.get(len(calls), (0, ""))
        turns = enumerate(assistant_turns(calls, self._mark))
        for number, turn in islice(turns, first, None):
            tail = self._after_end(turn, answers, end) if end else self._tail(turn, answers)
            if tail is not None:
                self._forms[len(calls)] = number, tail.end
                return tail
        return None

    def _tail_of_answer(self) -> tuple[_Tail, tuple[Message, ...]]:
        turn = {"role": "assistant", "content": self._mark}
        tail = self._tail(turn, ())
        if tail is not None and tail.text.strip():
            return tail, ()
        tail = self._tail(turn, (CONTINUE,))
        if tail is None or not tail.text.strip():
            raise RuntimeError("the chat template cannot open a turn after an answer")
        return tail, (CONTINUE,)

    def _tail(self, turn: Message, added: Sequence[Message]) -> _Tail | None:
        """What follows ``turn`` when ``added`` comes after it; None when the template refuses."""
        closed = self._after_mark([USER, turn], generation_prompt=False)
        if closed is None:
            return None
        found = [(at, stop) for stop in self._stops if stop and (at := closed.find(stop)) >= 0]
        if found:
            return self._after_end(turn, added, min(found, key=lambda at: (at[0], -len(at[1])))[1])
        # The opening of the next turn ends this one (GLM).
        after = self._after_mark([USER, turn, *added], generation_prompt=True)
        if after is None or not after.startswith(closed):
            return None
        return _Tail("", after[len(closed) :])

    def _after_end(self, turn: Message, added: Sequence[Message], end: str) -> _Tail | None:
        after = self._after_mark([USER, turn, *added], generation_prompt=True)
        _, found, text = (after or "").partition(end)
        return _Tail(end, text) if found else None

    def _after_mark(self, messages: Sequence[Message], *, generation_prompt: bool) -> str | None:
        """What is written behind the mark; None when it is not written, or the template refuses."""
        try:
            text = render_text(
                self._tokenizer,
                messages,
                reasoning_mode=self._mode,
                tools=self._tools,
                generation_prompt=generation_prompt,
            )
        except TemplateFault:
            return None
        _, found, after = text.rpartition(self._mark)
        return after if found else None

    @staticmethod
    def _plain(message: Message) -> dict[str, object]:
        """What a template may read of a tool message: not what is kept for transcripts."""
        plain = {key: message[key] for key in _READ_BY_TEMPLATES if key in message}
        return plain | {"name": plain.get("name") or _UNNAMED}

    # --- ids ------------------------------------------------------------------------------------------------------

    def _encode(self, tail: _Tail, ended_by: int | None) -> tuple[int, ...]:
        """The ids of ``tail`` behind a turn that ended with ``ended_by``.

        An end-of-turn token that the template knows stands for the template's own (``<|eom_id|>`` and ``<|eot_id|>`` of
        Llama 3). Behind one that it does not know (Qwen's ``<|endoftext|>``) the template's own follows, as observation,
        so that every turn closes the way the model was taught.
        """
        end = decode_all(self._tokenizer, [ended_by]) if ended_by is not None else ""
        text = tail.text
        if tail.end and end != tail.end and (not end or end not in self._source):
            text = tail.end + text
        elif not tail.end:
            text = text.removeprefix(end)
        if not text:
            return ()
        # Encoded behind the token that it follows: that decides how the first letters are split, and whether a newline
        # is swallowed.
        if ended_by in self._added:
            ids = self._tokenizer.encode(end + text, add_special_tokens=False)
            if ended_by in ids[:2]:
                return tuple(ids[ids.index(ended_by) + 1 :])
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
