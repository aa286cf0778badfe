"""Finding the calls in what the student wrote.

The format is taken from the student's chat template, never guessed from its text. Text is only ever parsed as JSON, or cut
at the format's own markers; whatever is wrong with a call becomes ``ToolCall.error``, and nothing here raises for it. Why
no library does this: docs/adr/0010.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rnow.errors import InputError
from rnow.protocols import Tokenizer
from rnow.rollout.probe import USER, assistant_turns, new_mark
from rnow.rollout.rendering import ToolDescription, render_text
from rnow.rollout.template_process import TemplateFault
from rnow.text.strict_json import JsonError, read_json, read_json_at
from rnow.types import ToolCall

# Calls of one turn that run; those beyond it are answered by one error.
MAX_CALLS = 32
MAX_NAME = 200
MAX_DEPTH = 32
# Calls and thoughts of a turn that are read: one of nothing but openings must not hold up the other rollouts.
MAX_READ = 1000
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

Schemas = Mapping[str, Mapping[str, object]]
"""Tool name -> JSON schema of its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What a turn holds.

    Attributes:
        content: the text without the calls that could be read; thinking, and calls that could not be read, stay in it.
        reasoning: the thinking, or None when there is none.
        calls: in the order written; those that cannot be run have ``error``.
    """

    content: str
    reasoning: str | None
    calls: tuple[ToolCall, ...]


def _plain_id(turn: int, index: int) -> str:
    return f"call_{turn}_{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallFormat:
    """How one family of models writes calls.

    Attributes:
        name: for error messages and tests.
        markers: control tokens of the format, which decoding must keep; the first opens a call, or a list of them.
        reader: (text, where it opens, schemas) -> what was written there; _Malformed when it cannot be read.
        closer: what ends a call; "" when only the next opening does.
        call_id: (turn, index) -> the id of a call.
        unmarked: (text, position) -> whether a turn that begins there is a call without a marker.
    """

    name: str
    markers: tuple[str, ...]
    reader: Callable[[str, int, Schemas], _Block]
    closer: str = ""
    call_id: Callable[[int, int], str] = _plain_id
    unmarked: Callable[[str, int], bool] = lambda text, position: False

    def find(self, text: str, position: int, blank: bool) -> int:
        """Where the next call opens, or -1. ``blank``: only blanks precede ``position``."""
        start = _skip_blank(text, position) if blank else position
        if blank and self.unmarked(text, start):
            return start
        return text.find(self.markers[0], position)

    def read(self, text: str, start: int, schemas: Schemas) -> _Block:
        """What is written where a call opens."""
        try:
            return self.reader(text, start, schemas)
        except _Malformed as error:
            return _broken(error, text, start, self.closer, self.markers[0])


@dataclass(frozen=True, slots=True)
class _Call:
    """One call as written: either readable, or with what is wrong and the text itself."""

    name: str = ""
    arguments: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None
    raw: str = ""


@dataclass(frozen=True, slots=True)
class _Block:
    calls: tuple[_Call, ...]
    end: int


class _Malformed(Exception):
    """What is wrong with a call, in words for the student."""

    def __init__(self, error: str, name: str = "") -> None:
        super().__init__(error)
        self.name = name


def parse_turn(
    text: str,
    format: ToolCallFormat,
    *,
    turn: int = 0,
    inside_thinking: bool = False,
    schemas: Schemas | None = None,
) -> ParsedTurn:
    """The calls of one turn. Never raises for what the text holds.

    Args:
        text: the decoded turn with the format's markers, without the end-of-turn token.
        turn: number of the turn in its rollout, for the ids of the calls.
        inside_thinking: whether the prompt ended with an open ``<think>``. Calls inside thinking are not calls.
        schemas: of the tools; formats that write arguments as bare text take their types from here.
    """
    content: list[str] = []
    thoughts: list[str] = []
    written: list[_Call] = []
    position, think, blank = 0, -1, True
    if inside_thinking:
        position = _end_of_thinking(text, 0)
        thoughts.append(text[:position].removesuffix(THINK_CLOSE))
        content.append(text[:position])
    for _ in range(MAX_READ):
        if think < position:
            think = text.find(THINK_OPEN, position)
            think = len(text) if think < 0 else think
        opens = format.find(text, position, blank)
        if 0 <= opens < think:
            content.append(text[position:opens])
            block = format.read(text, opens, schemas or {})
            written += block.calls
            content += [call.raw for call in block.calls if call.error]
            position, blank = block.end, False
        elif think < len(text):
            end = _end_of_thinking(text, think)
            thoughts.append(text[think + len(THINK_OPEN) : end].removesuffix(THINK_CLOSE))
            blank = blank and not text[position:think].strip()
            content.append(text[position:end])
            position = end
        else:
            break
    content.append(text[position:])
    said = "".join(content)
    return ParsedTurn(
        content=said.strip() if written else said,
        reasoning="\n\n".join(thought.strip() for thought in thoughts) if thoughts else None,
        calls=_numbered(written, format, turn),
    )


def detect_format(tokenizer: Tokenizer, tools: Sequence[ToolDescription] = ()) -> ToolCallFormat:
    """The format in which the student's chat template writes calls.

    Raises:
        InputError: the template writes none, or in a format that rnow does not read.
    """
    for text in _written_calls(tokenizer, tools):
        for pattern, format in _SIGNS:
            if pattern.search(text):
                return format
    raise InputError(
        "the student's chat template writes tool calls in no format that rnow reads",
        title="Unsupported tool format",
        where="model.path",
        why="the calls in the student's answers could not be found",
        fix="use a model of the Qwen, Llama 3, DeepSeek, Mistral or GLM families, or give a local copy of the model a "
        'chat_template.jinja that writes calls as <tool_call>{"name": ..., "arguments": ...}</tool_call>',
    )


def _written_calls(tokenizer: Tokenizer, tools: Sequence[ToolDescription]) -> Iterator[str]:
    """What the template makes of a call, in every form of message it takes."""
    for length in (1, 9):  # Mistral's templates want ids of nine letters
        mark = new_mark()
        for turn in assistant_turns([("c" * length, "lookup")], mark):
            if "tool_calls" not in turn:
                continue
            try:
                text = render_text(tokenizer, [USER, turn], tools=tools, generation_prompt=False)
                start = len(render_text(tokenizer, [USER], tools=tools, generation_prompt=False))
            except TemplateFault:
                continue
            # Templates explain the format before the conversation; only what follows it is a call.
            if mark in text[start:]:
                yield text[start:]


def _end_of_thinking(text: str, start: int) -> int:
    end = text.find(THINK_CLOSE, start)
    return len(text) if end < 0 else end + len(THINK_CLOSE)


def _numbered(written: Sequence[_Call], format: ToolCallFormat, turn: int) -> tuple[ToolCall, ...]:
    calls = [
        ToolCall(
            id=format.call_id(turn, index),
            name=call.name[:MAX_NAME],
            arguments=call.arguments,
            error=call.error,
        )
        for index, call in enumerate(written[:MAX_CALLS])
    ]
    extra = len(written) - MAX_CALLS
    if extra > 0:
        refused = f"{extra} more calls were not run: at most {MAX_CALLS} calls in one turn"
        calls.append(ToolCall(id=format.call_id(turn, MAX_CALLS), name="", error=refused))
    return tuple(calls)


def _nine_letters(turn: int, index: int) -> str:
    return f"c{turn % 10_000:04d}{index % 10_000:04d}"


# --- JSON objects -------------------------------------------------------------------------------------------------


def _call_of(value: object, *keys: str) -> _Call:
    """A call from ``{"name": ..., <one of keys>: {...}}``; arguments left out are none."""
    if not isinstance(value, dict):
        raise _Malformed('a call must be a JSON object with "name" and "arguments"')
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise _Malformed('the call has no "name"')
    given = [value[key] for key in keys if key in value]
    if not given and value.keys() - {"name", "id", "type"}:
        raise _Malformed(f'the call has no "{keys[0]}"', name)
    return _Call(name, _object(given[0] if given else None, name, keys[0]))


def _object(value: object, name: str, key: str = "arguments") -> Mapping[str, object]:
    if value is None:
        return {}
    if isinstance(value, str):  # JSON inside JSON, as some models write it
        try:
            value = read_json(value.strip(), max_depth=MAX_DEPTH)
        except JsonError as error:
            raise _Malformed(f"the call is not valid JSON: {error}", name) from error
    if not isinstance(value, dict):
        raise _Malformed(f'"{key}" must be a JSON object', name)
    return value


def _json_at(text: str, position: int, name: str = "") -> tuple[object, int]:
    try:
        return read_json_at(text, position, max_depth=MAX_DEPTH)
    except JsonError as error:
        raise _Malformed(f"the call is not valid JSON: {error}", name) from error


def _headed_call(head: re.Pattern[str], text: str, position: int) -> tuple[_Call, int]:
    """A call whose ``head`` names the tool and whose arguments follow as a JSON object, and where that ends."""
    match = head.match(text, position)
    if match is None:
        raise _Malformed("the call does not name a tool where it should")
    name = match.group(1).strip()
    value, end = _json_at(text, _skip_blank(text, match.end()), name)
    return _Call(name, _object(value, name)), end


def _skip_blank(text: str, position: int, also: str = "") -> int:
    while position < len(text) and (text[position].isspace() or text[position] in also):
        position += 1
    return position


def _expect(text: str, position: int, token: str, name: str = "") -> int:
    """The position after ``token``, blanks before it left out."""
    position = _skip_blank(text, position)
    if not text.startswith(token, position):
        raise _Malformed("the call does not end where its JSON ends", name)
    return position + len(token)


def _broken(error: _Malformed, text: str, start: int, closer: str, opener: str) -> _Block:
    """A block for a call that cannot be read: up to the end of its ``closer``, or to the next ``opener``, which is left for
    the next round."""
    following = text.find(opener, start + 1)
    end = len(text) if following < 0 else following
    if closer and (at := text.find(closer, start, end)) >= 0:
        end = at + len(closer)
    return _Block((_Call(name=error.name, error=str(error), raw=text[start:end]),), end)


# --- Hermes, Qwen 2.5, Qwen 3 -------------------------------------------------------------------------------------

_CALL, _END_CALL = "<tool_call>", "</tool_call>"


def _read_hermes(text: str, start: int, schemas: Schemas) -> _Block:
    value, end = _json_at(text, _skip_blank(text, start + len(_CALL)))
    call = _call_of(value, "arguments", "parameters")
    return _Block((call,), _expect(text, end, _END_CALL, call.name))


# --- Qwen 3 Coder, Qwen 3.5; GLM: arguments as tagged text --------------------------------------------------------

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>")
_CLOSE_FUNCTION = re.compile(r"\s*</function>\s*</tool_call>")
_GLM_NAME = re.compile(r"\s*([^\s<]+)")
_GLM_KEY = re.compile(r"\s*<arg_key>([^<]+)</arg_key>\s*<arg_value>")
_GLM_CLOSE = re.compile(r"\s*</tool_call>")


def _read_tagged(
    head: re.Pattern[str],
    key: re.Pattern[str],
    value_end: str,
    close: re.Pattern[str],
) -> Callable[[str, int, Schemas], _Block]:
    """A reader of calls whose head names the tool, and whose arguments are a key and text up to ``value_end``."""

    def read(text: str, start: int, schemas: Schemas) -> _Block:
        match = head.match(text, start + len(_CALL))
        if match is None:
            raise _Malformed("the call does not start with the name of a tool")
        name = match.group(1).strip()
        known = _mapping(_mapping(schemas.get(name)).get("properties"))
        arguments: dict[str, object] = {}
        position = match.end()
        while match := key.match(text, position):
            argument = match.group(1).strip()
            end = text.find(value_end, match.end())
            if end < 0:
                raise _Malformed("an argument is not closed", name)
            if argument in arguments:
                raise _Malformed(f"the argument {argument[:MAX_NAME]!r} is given twice", name)
            # The format puts line breaks around a value.
            value = text[match.end() : end].removeprefix("\n").removesuffix("\n")
            arguments[argument] = _typed(value, known.get(argument))
            position = end + len(value_end)
        match = close.match(text, position)
        if match is None:
            raise _Malformed("the call is not closed where its arguments end", name)
        return _Block((_Call(name, arguments),), match.end())

    return read


def _typed(text: str, schema: object) -> object:
    """A value written as bare text, as the type its schema names; text where the two do not fit."""
    types = _types(schema)
    word = text.strip()
    if "null" in types and word in {"null", "None"}:
        return None
    if "string" in types or not types:
        return text
    if "boolean" in types and word in {"True", "False"}:
        return word == "True"
    try:
        return read_json(word, max_depth=MAX_DEPTH)
    except JsonError:
        return text


def _types(schema: object) -> set[str]:
    """The types a JSON schema allows; empty when it does not say."""
    schema = _mapping(schema)
    named = schema.get("type")
    found = {named} if isinstance(named, str) else set()
    if isinstance(named, list | tuple):
        found |= {item for item in named if isinstance(item, str)}
    for key in ("anyOf", "oneOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, list | tuple) else ():
            found |= _types(part)
    return found


def _mapping(value: object) -> Mapping[str, object]:
    """Schemas come from the outside: what should be an object may be anything."""
    return value if isinstance(value, Mapping) else {}


# --- Llama 3 ------------------------------------------------------------------------------------------------------

_PYTHON_TAG = "<|python_tag|>"
_LOOKS_LIKE_A_CALL = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"function"|"name")\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments)"'
)


def _is_llama_call(text: str, start: int) -> bool:
    """Whether a JSON object of a call's keys begins there: without a tag the format has no other sign, and a JSON answer is
    no call."""
    if not text.startswith("{", start):
        return False
    try:
        value, _ = read_json_at(text, start, max_depth=MAX_DEPTH)
    except JsonError:
        return _LOOKS_LIKE_A_CALL.match(text, start) is not None
    return isinstance(value, dict) and "name" in value and bool({"parameters", "arguments"} & value.keys())  # fmt: skip


def _read_llama(text: str, start: int, schemas: Schemas) -> _Block:
    tagged = text.startswith(_PYTHON_TAG, start)
    position = _skip_blank(text, start + len(_PYTHON_TAG)) if tagged else start
    calls: list[_Call] = []
    end = position
    try:
        while (
            not calls
            or (tagged and text.startswith("{", position))
            or _is_llama_call(text, position)
        ):
            value, end = _json_at(text, position)
            calls.append(_call_of(value, "parameters", "arguments"))
            position = _skip_blank(text, end, also=";,")
        return _Block(tuple(calls), end)
    except _Malformed as error:
        # The rest of the turn belongs to it: there is no mark to go on from.
        raw = text[position if calls else start :]
        calls.append(_Call(name=error.name, error=str(error), raw=raw))
        return _Block(tuple(calls), len(text))


# --- DeepSeek -----------------------------------------------------------------------------------------------------

_CALLS_BEGIN, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEP = "<｜tool▁sep｜>"
_FENCED_HEAD = re.compile(rf"\w+{_SEP}([^\n<]+)\n```json\n")
_BARE_HEAD = re.compile(rf"\s*([^\n<]+){_SEP}")


def _read_deepseek(head: re.Pattern[str], fence: str) -> Callable[[str, int, Schemas], _Block]:
    def read(text: str, start: int, schemas: Schemas) -> _Block:
        calls: list[_Call] = []
        position = start + len(_CALLS_BEGIN)
        while text.startswith(_CALL_BEGIN, at := _skip_blank(text, position)):
            call, position = _read_deepseek_call(text, at, head, fence)
            calls.append(call)
        # A list whose end is missing at the end of the turn is whole all the same: each of its calls was closed.
        at = _skip_blank(text, position)
        position = at + len(_CALLS_END) if text.startswith(_CALLS_END, at) else position
        if not calls:
            calls.append(_Call(error="the list of calls is empty", raw=text[start:position]))
        return _Block(tuple(calls), position)

    return read


def _read_deepseek_call(
    text: str, start: int, head: re.Pattern[str], fence: str
) -> tuple[_Call, int]:
    try:
        call, end = _headed_call(head, text, start + len(_CALL_BEGIN))
        if fence:
            end = _expect(text, end, fence, call.name)
        return call, _expect(text, end, _CALL_END, call.name)
    except _Malformed as error:
        block = _broken(error, text, start, _CALL_END, _CALL_BEGIN)
        end = text.find(_CALLS_END, start)
        if 0 <= end < block.end:  # never over the end of the list
            raw = text[start:end]
            return _Call(name=error.name, error=str(error), raw=raw), end
        return block.calls[0], block.end


# --- Mistral ------------------------------------------------------------------------------------------------------

_TOOL_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_V11_HEAD = re.compile(r"\s*([^\s\[{]+)\s*(?:\[CALL_ID\][^\s\[{]*\s*)?\[ARGS\]")


def _read_mistral(text: str, start: int, schemas: Schemas) -> _Block:
    values, end = _json_at(text, _skip_blank(text, start + len(_TOOL_CALLS)))
    if not isinstance(values, list) or not values:
        raise _Malformed("calls must be a JSON array of objects")
    calls: list[_Call] = []
    for value in values:
        try:
            calls.append(_call_of(value, "arguments"))
        except _Malformed as error:
            calls.append(_Call(name=error.name, error=str(error)))
    return _Block(tuple(calls), end)


def _read_mistral_v11(text: str, start: int, schemas: Schemas) -> _Block:
    call, end = _headed_call(_V11_HEAD, text, start + len(_TOOL_CALLS))
    return _Block((call,), end)


# --- the formats, and how a rendered call is told -----------------------------------------------------------------


_TAGGED = (_CALL, _END_CALL, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_LISTED = (_CALLS_BEGIN, _CALLS_END, _CALL_BEGIN, _CALL_END, _SEP)
_BRACKETED = (_TOOL_CALLS, _ARGS, "[CALL_ID]")

HERMES = ToolCallFormat(
    name="hermes", markers=(_CALL, _END_CALL), reader=_read_hermes, closer=_END_CALL
)
QWEN3_CODER = ToolCallFormat(
    name="qwen3_coder",
    markers=_TAGGED,
    reader=_read_tagged(_FUNCTION, _PARAMETER, "</parameter>", _CLOSE_FUNCTION),
    closer=_END_CALL,
)
GLM = ToolCallFormat(
    name="glm",
    markers=_TAGGED,
    reader=_read_tagged(_GLM_NAME, _GLM_KEY, "</arg_value>", _GLM_CLOSE),
    closer=_END_CALL,
)
LLAMA3 = ToolCallFormat(
    name="llama3", markers=(_PYTHON_TAG,), reader=_read_llama, unmarked=_is_llama_call
)
DEEPSEEK = ToolCallFormat(
    name="deepseek", markers=_LISTED, reader=_read_deepseek(_FENCED_HEAD, "```")
)
DEEPSEEK_V31 = ToolCallFormat(
    name="deepseek_v3.1", markers=_LISTED, reader=_read_deepseek(_BARE_HEAD, "")
)
MISTRAL = ToolCallFormat(
    name="mistral", markers=_BRACKETED, reader=_read_mistral, call_id=_nine_letters
)
MISTRAL_V11 = ToolCallFormat(
    name="mistral_v11", markers=_BRACKETED, reader=_read_mistral_v11, call_id=_nine_letters
)

_SIGNS: tuple[tuple[re.Pattern[str], ToolCallFormat], ...] = (
    (re.compile(rf"{_SEP}lookup\s*```json"), DEEPSEEK),
    (re.compile(rf"lookup{_SEP}"), DEEPSEEK_V31),
    (re.compile(r"\[TOOL_CALLS\]\s*lookup.*\[ARGS\]", re.DOTALL), MISTRAL_V11),
    (re.compile(r"\[TOOL_CALLS\]\s*\["), MISTRAL),
    (re.compile(r"<tool_call>\s*<function=lookup>\s*<parameter=value>"), QWEN3_CODER),
    (re.compile(r"<tool_call>\s*lookup\s*<arg_key>value</arg_key>"), GLM),
    (re.compile(r'<tool_call>\s*\{"name":\s*"lookup",\s*"arguments":\s*\{'), HERMES),
    (re.compile(r'(?<!\w)\{"name":\s*"lookup",\s*"parameters":\s*\{'), LLAMA3),
)
