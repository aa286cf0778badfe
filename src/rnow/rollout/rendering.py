"""Messages to token ids, and back. The only place where a chat template runs.

What the student reads is what its template makes of the conversation. Two things are done to that: messages are given the
form which the template prints (``forms``), and no text of the conversation becomes a control token (``controls``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypedDict
from weakref import WeakKeyDictionary

from rnow.protocols import Tokenizer, Tool
from rnow.rollout.controls import Controls, Marks, Tools, change_texts
from rnow.rollout.forms import Forms
from rnow.rollout.template_process import PROCESS, TemplateFault, Written
from rnow.rollout.template_worker import GENERATION_MARKS
from rnow.text.strict_json import mend_surrogates
from rnow.types import Message

THINKING_OFF = frozenset({"disabled", "none"})
"""Reasoning modes that switch thinking off."""

BROKEN = "an invisible space is put into each, so that the student reads them as text"
"""What is done to control tokens that a conversation spells."""

Write = Callable[[Sequence[Message], Tools], str]
"""What a chat template makes of messages and tools."""


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


Conversation = tuple[Sequence[Message], Sequence[ToolDescription] | None]
"""Messages, and the tools that are shown with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation as the student reads it. ``altered``: a control token that a text of it spelled out and that was
    broken, so that it reads as text; None when all is as the template wrote it."""

    text: str
    altered: str | None


def render(
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    reasoning_mode: str | None = None,
    generation_prompt: bool = True,
    generation_marks: tuple[str, str] | None = None,
) -> list[Rendering | TemplateFault]:
    """Each conversation as the chat template writes it, before tokenisation, or why the template refuses it.

    Text of the conversation and of the tools cannot become a control token. Thinking tags in what the assistant said are
    no such text: the template decides what becomes of them.

    Args:
        tokenizer: with a chat template.
        conversations: messages, with descriptions of the tools the student may call; none, or an empty sequence, for a
            prompt without.
        reasoning_mode: passed to the template as ``enable_thinking`` / ``thinking`` / ``reasoning_effort``, where it
            reads them.
        generation_prompt: whether the assistant's next turn is opened.
        generation_marks: written before and after what the template marks as the assistant's (``{% generation %}``).

    Raises:
        InputError: the template takes too long, or writes too much.
    """
    student = _student(tokenizer)
    controls = student.controls
    options = {"add_generation_prompt": generation_prompt, **_reasoning_switches(reasoning_mode)}
    if generation_marks is not None:
        options[GENERATION_MARKS] = list(generation_marks)

    def write(messages: Sequence[Message], tools: Tools) -> str:
        (written,) = _write(tokenizer, student, [(messages, tools)], options)
        if isinstance(written, TemplateFault):
            raise written
        return written

    shown = [
        (
            student.prepare(messages, list(tools) if tools else None, write),
            list(tools or ()) or None,
        )
        for messages, tools in conversations
    ]
    raw = _write(tokenizer, student, shown, options)
    marks = {
        index: controls.marks_for(text)
        for index, text in enumerate(raw)
        if isinstance(text, str) and controls.found_in(text)
    }
    marked = [change_texts(*shown[index], marks[index].mark) for index in marks]
    twins = dict(zip(marks, _write(tokenizer, student, marked, options), strict=True))
    found = [
        _compared(controls, text, twins.get(index), marks.get(index))
        or _settle(controls, write, *shown[index])
        for index, text in enumerate(raw)
    ]
    student.tell_first(found)
    return found


def render_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    reasoning_mode: str | None = None,
    tools: Sequence[ToolDescription] | None = None,
    generation_prompt: bool = True,
) -> str:
    """One conversation: see ``render``.

    Raises:
        TemplateFault: the template refuses this conversation.
    """
    (found,) = render(
        tokenizer,
        [(messages, tools)],
        reasoning_mode=reasoning_mode,
        generation_prompt=generation_prompt,
    )
    if isinstance(found, TemplateFault):
        raise found
    return found.text


def set_template_date(tokenizer: Tokenizer, now: datetime) -> None:
    """What templates of this tokenizer read as the date; without it, the time of the first rendering."""
    _student(tokenizer).now = now


def local_time() -> datetime:
    """The time here, without a zone: what ``strftime_now`` of transformers reads."""
    return datetime.now().astimezone().replace(tzinfo=None)


def template_date(tokenizer: Tokenizer) -> datetime | None:
    """The date in what was rendered so far; None when no template read it."""
    student = _student(tokenizer)
    return student.now if student.dated else None


def tell_of_alterations(tokenizer: Tokenizer, tell: Callable[[str], None]) -> None:
    """From now on, when what is rendered spells a control token, say so with ``tell``, once: after the prompts these are
    the answers of tools."""
    _student(tokenizer).tell = tell


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the text of every control token of the tokenizer; None when there is none."""
    return _student(tokenizer).controls.pattern


def decode_all(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of these ids, control tokens and blanks as they are."""
    return tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def as_text(tokenizer: Tokenizer, text: str) -> Rendering:
    """A text of the data as it is read without a chat template: no control token comes out of it."""
    controls = _student(tokenizer).controls
    spelled = controls.spelled_in([{"role": "user", "content": text}], None)
    return Rendering(text=controls.inert(text) if spelled else text, altered=spelled)


def template_text(tokenizer: Tokenizer, *, tools: bool) -> str:
    """The source of the chat template that is used for prompts with, or without, tools: a tokenizer may have two."""
    return str(tokenizer.get_chat_template(tools=[{}] if tools else None))


def template_shows_tools(tokenizer: Tokenizer, tools: Sequence[ToolDescription]) -> bool:
    """Whether a prompt names every tool. A template that ignores ``tools`` leaves the student ignorant of them."""
    messages = [{"role": "user", "content": "hi"}]
    try:
        without = render_text(tokenizer, messages)
        shown = render_text(tokenizer, messages, tools=tools)
    except TemplateFault:  # a template that refuses tools does not show them
        return False
    inert = _student(tokenizer).controls.inert
    names = [inert(str(tool["function"]["name"])) for tool in tools]
    return all(shown.count(name) > without.count(name) for name in names)


@dataclass(slots=True)
class _Student:
    """What is known of one tokenizer and its chat template."""

    template: object
    controls: Controls
    # Of its template for prompts without tools, and with: it may have two.
    forms: tuple[Forms, Forms] = field(default_factory=lambda: (Forms(), Forms()))
    now: datetime = field(default_factory=local_time)
    dated: bool = False
    tell: Callable[[str], None] | None = None

    def prepare(self, messages: Sequence[Message], tools: Tools, write: Write) -> list[Message]:
        """The messages in the form that the template prints."""
        return self.forms[tools is not None].prepare(messages, lambda probe: write(probe, tools))

    def tell_first(self, found: Sequence[Rendering | TemplateFault]) -> None:
        """Say the first alteration, once."""
        altered = [one.altered for one in found if isinstance(one, Rendering) and one.altered]
        if altered and self.tell is not None:
            tell, self.tell = self.tell, None
            tell(f"what a tool answered spells the control token {altered[0]!r}; {BROKEN}")


_STUDENTS: WeakKeyDictionary[Tokenizer, _Student] = WeakKeyDictionary()


def _student(tokenizer: Tokenizer) -> _Student:
    known = _STUDENTS.get(tokenizer)
    if known is None or known.template != tokenizer.chat_template:
        known = _Student(tokenizer.chat_template, Controls.of(tokenizer))
        _STUDENTS[tokenizer] = known
    return known


def _write(
    tokenizer: Tokenizer,
    student: _Student,
    conversations: Sequence[tuple[Sequence[Message], Tools]],
    options: Mapping[str, object],
) -> list[str | TemplateFault]:
    """What the template writes, as ``apply_chat_template`` has it."""
    from transformers import PreTrainedTokenizerBase

    usual = getattr(type(tokenizer), "apply_chat_template", None)
    if usual is not PreTrainedTokenizerBase.apply_chat_template:
        return [_write_itself(tokenizer, *one, options) for one in conversations]
    fixed = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
    fixed |= {"documents": None, **options}
    written = PROCESS.render(
        [
            (
                tokenizer.get_chat_template(tools=tools),
                {**fixed, "messages": messages, "tools": tools},
            )
            for messages, tools in conversations
        ],
        now=student.now,
        name=str(getattr(tokenizer, "name_or_path", "") or "this model"),
    )
    student.dated = student.dated or any(isinstance(w, Written) and w.dated for w in written)
    return [w if isinstance(w, TemplateFault) else mend_surrogates(w.text) for w in written]


def _write_itself(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools, options: Mapping[str, object]
) -> str | TemplateFault:
    """As the model's own code has it."""
    options = {name: value for name, value in options.items() if name != GENERATION_MARKS}
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)
    except Exception as error:
        return TemplateFault(str(error) or type(error).__name__)
    return mend_surrogates(str(text))


def _compared(
    controls: Controls,
    raw: str | TemplateFault,
    twin: str | TemplateFault | None,
    marks: Marks | None,
) -> Rendering | None:
    """What ``raw`` and its twin in stand-ins settle at once; without marks there is no control token in it."""
    if isinstance(raw, TemplateFault):
        return None
    if marks is None:
        return Rendering(text=raw, altered=None)
    own = controls.own_only(raw, twin, marks) if isinstance(twin, str) else None
    return None if own is None else Rendering(text=own[0], altered=own[1])


def _settle(
    controls: Controls,
    write: Write,
    messages: Sequence[Message],
    tools: Tools,
) -> Rendering | TemplateFault:
    """The text in which every control token is the template's own: as it is where that holds, with those broken that a
    text spells where the template takes texts as they come, else made of texts broken one by one."""
    fault: TemplateFault | None = None
    spelled: str | None = None
    for strength in (None, controls.inert, controls.scrub):
        if strength is not None:
            spelled = spelled or controls.spelled_in(messages, tools)
            messages, tools = change_texts(messages, tools, strength)
        try:
            raw = write(messages, tools)
        except TemplateFault as error:
            fault = fault or error
            if spelled is None and controls.spelled_in(messages, tools) is None:
                break  # no text that could be broken is to blame
            continue
        safe = _own_only(controls, write, raw, messages, tools)
        if safe is not None:
            return Rendering(text=safe[0], altered=spelled or safe[1])
    return fault or TemplateFault("its texts spell control tokens that cannot be told from its own")


def _own_only(
    controls: Controls, write: Write, raw: str, messages: Sequence[Message], tools: Tools
) -> tuple[str, str | None] | None:
    """See ``Controls.own_only``."""
    if not controls.found_in(raw):
        return raw, None
    marks = controls.marks_for(raw)
    try:
        marked = write(*change_texts(messages, tools, marks.mark))
    except TemplateFault:  # it reads what it is told, and refuses stand-ins
        return None if controls.spelled_in(messages, tools) else (raw, None)
    return controls.own_only(raw, marked, marks)


def _reasoning_switches(reasoning_mode: str | None) -> dict[str, object]:
    # Qwen reads `enable_thinking`, DeepSeek V3.1 `thinking`, others the effort.
    if reasoning_mode is None:
        return {}
    if reasoning_mode in THINKING_OFF:
        return {"enable_thinking": False, "thinking": False}
    return {"enable_thinking": True, "thinking": True, "reasoning_effort": reasoning_mode}
