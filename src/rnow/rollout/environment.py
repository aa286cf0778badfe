"""Episodes around a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from rnow.errors import InputError
from rnow.protocols import Environment, Tokenizer
from rnow.rollout.observation import Observations
from rnow.rollout.rendering import ToolDescription, decode_all, template_shows_tools
from rnow.rollout.tool_calls import (
    THINK_CLOSE,
    THINK_OPEN,
    ParsedTurn,
    detect_format,
    parse_turn,
)
from rnow.tasks import first_cause
from rnow.types import (
    Completion,
    EndReason,
    EnvironmentStep,
    Message,
    Prompt,
    ToolCall,
    ToolResult,
    rollout_id,
)

RunCall = Callable[[ToolCall], Awaitable[ToolResult]]
TerminationPolicy = Literal["last_tool", "max_turns"]

# Enough ids to spell an open <think> and the blanks after it, one letter each.
_OPENING = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """A fresh episode for every rollout of a run's prompts.

    Attributes:
        prompt_token_ids: prompt id -> its rendered ids, tools included.
        decode: token ids to the text of an answer without tools.
        dialogues: prompt id -> how its tools are shown and called; prompts without tools are left out.
        run_call: prompt and index of its rollout -> what runs the calls of that rollout.
        max_turns, termination_policy: see ``ToolEnvironment``.
        release: called with the rollout's id when an episode with tools is over.
    """

    prompt_token_ids: Mapping[str, tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    dialogues: Mapping[str, Dialogue] = field(default_factory=dict)
    run_call: Callable[[Prompt, int], RunCall] | None = None
    max_turns: int = 1
    termination_policy: TerminationPolicy = "last_tool"
    release: Callable[[str], Awaitable[None]] | None = None

    def __call__(self, prompt: Prompt, index: int) -> Environment:
        """The episode of one rollout."""
        ids, dialogue = self.prompt_token_ids[prompt.id], self.dialogues.get(prompt.id)
        if dialogue is None or self.run_call is None:
            return SingleTurn(ids, self.decode)
        release = self.release and partial(self.release, rollout_id(prompt.id, index))
        return ToolEnvironment(
            ids,
            dialogue,
            self.run_call(prompt, index),
            max_turns=self.max_turns,
            termination_policy=self.termination_policy,
            release=release,
        )


class SingleTurn:
    """One question, one answer.

    Args:
        prompt_token_ids: the rendered prompt.
        decode: token ids to text.
    """

    def __init__(
        self, prompt_token_ids: tuple[int, ...], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._prompt_token_ids = prompt_token_ids
        self._decode = decode

    async def start(self) -> tuple[int, ...]:
        """See ``Environment.start``."""
        return self._prompt_token_ids

    async def step(self, completion: Completion) -> EnvironmentStep:
        """See ``Environment.step``."""
        answer = {"role": "assistant", "content": self._decode(list(completion.token_ids))}
        return _end(answer, "length" if completion.finish_reason == "length" else "answer")

    async def close(self) -> None:
        """Nothing is held."""


class Dialogue:
    """How the student and one set of tools talk: shared by all rollouts that have these tools.

    Args:
        tokenizer: the student's, with a chat template.
        tools: as rendered in the prompts that this is for: see ``describe_tools``. May be empty.
        stop_token_ids: every id that ends the student's turn.
        reasoning_mode: as in ``render_text``.

    Raises:
        InputError: the template does not show tools, writes calls in a format that rnow does not read, or has no way
            to express the answers of tools.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[ToolDescription],
        *,
        stop_token_ids: Sequence[int],
        reasoning_mode: str | None = None,
    ) -> None:
        if not template_shows_tools(tokenizer, tools):
            raise InputError(
                "the student's chat template does not show tools to the student",
                title="Template without tools",
                where="model.path",
                why="the student would never learn which tools it has",
                fix="use a model that was made for tools, or give a local copy of it a chat_template.jinja that prints `tools`",
            )
        self._tokenizer = tokenizer
        self.format = detect_format(tokenizer, tools)
        self.observations = Observations(
            tokenizer,
            tools,
            call_id=self.format.call_id,
            stop_token_ids=stop_token_ids,
            reasoning_mode=reasoning_mode,
        )
        self._schemas: Mapping[str, Mapping[str, object]] = {
            str(tool["function"]["name"]): tool["function"]["parameters"] for tool in tools
        }
        self._hidden = _special_ids(tokenizer) - {
            tokenizer.convert_tokens_to_ids(marker)
            for marker in (*self.format.markers, THINK_OPEN, THINK_CLOSE)
        }

    def text_of(self, completion: Completion) -> str:
        """What the student wrote: control tokens left out but those that mark calls and thinking."""
        ids = completion.token_ids
        ids = ids[:-1] if completion.finish_reason == "stop" else ids
        shown = [token for token in ids if token not in self._hidden]
        return decode_all(self._tokenizer, shown)

    def parse(self, text: str, *, turn: int, inside_thinking: bool) -> ParsedTurn:
        """The calls of one turn: see ``parse_turn``."""
        return parse_turn(
            text,
            self.format,
            turn=turn,
            inside_thinking=inside_thinking,
            schemas=self._schemas,
        )

    def opens_thinking(self, token_ids: Sequence[int]) -> bool:
        """Whether a context that ends with these ids has the student begin inside ``<think>``."""
        return decode_all(self._tokenizer, token_ids[-_OPENING:]).rstrip().endswith(THINK_OPEN)


class ToolEnvironment:
    """A conversation in which the student may call tools, over several turns; single use.

    The calls of one turn run at the same time and are answered in the order they were written. A turn that was cut by
    length runs none, and neither does the last turn that is allowed: nobody would read the answers.

    Args:
        prompt_token_ids: the rendered prompt, tools included.
        dialogue: of these tools; shared.
        run_call: runs a call that could be read. What the tool or the student did wrong is in its result; what it raises
            fails the rollout.
        max_turns: turns of the student, at least 1.
        termination_policy: ``last_tool`` ends with an answer without a call; ``max_turns`` goes on until there were
            ``max_turns`` turns (``Observations.after_answer`` says how).
        release: called when the episode is over, however it ended.
    """

    def __init__(
        self,
        prompt_token_ids: tuple[int, ...],
        dialogue: Dialogue,
        run_call: RunCall,
        *,
        max_turns: int,
        termination_policy: TerminationPolicy = "last_tool",
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._prompt_token_ids = prompt_token_ids
        self._dialogue = dialogue
        self._run_call = run_call
        self._max_turns = max_turns
        self._to_the_end = termination_policy == "max_turns"
        self._release = release
        self._turn = 0
        self._observed: Sequence[int] = prompt_token_ids

    async def start(self) -> tuple[int, ...]:
        """See ``Environment.start``."""
        return self._prompt_token_ids

    async def step(self, completion: Completion) -> EnvironmentStep:
        """See ``Environment.step``."""
        text = self._dialogue.text_of(completion)
        if completion.finish_reason == "length":
            return _end({"role": "assistant", "content": text}, "length")
        parsed = self._dialogue.parse(
            text,
            turn=self._turn,
            inside_thinking=self._dialogue.opens_thinking(self._observed),
        )
        self._turn += 1
        said = assistant_message(parsed)
        if not parsed.calls and not self._to_the_end:
            return _end(said, "answer")
        if self._turn >= self._max_turns:
            return _end(said, "max_turns")
        ended_by = completion.token_ids[-1]
        if not parsed.calls:
            observed, between = self._dialogue.observations.after_answer(ended_by)
            return self._go_on(observed, (said, *between))
        answers = await answer_calls(parsed.calls, self._run_call)
        observed = self._dialogue.observations.after_tools(answers, ended_by)
        return self._go_on(observed, (said, *answers))

    async def close(self) -> None:
        """See ``Environment.close``. What runs a call holds its tool."""
        if self._release is not None:
            await self._release()

    def _go_on(self, observed: tuple[int, ...], messages: tuple[Message, ...]) -> EnvironmentStep:
        self._observed = observed
        return EnvironmentStep(
            observation_token_ids=observed,
            messages=messages,
            done=False,
        )


async def answer_calls(calls: Sequence[ToolCall], run_call: RunCall) -> list[Message]:
    """The tool messages that answer the calls of one turn, in their order. They run at the same time; one that could not be
    read is answered by its error. Raises what ``run_call`` raises, after ending the others."""

    async def answer(call: ToolCall) -> Message:
        if call.error is not None:
            return _tool_message(call, ToolResult(content=f"Error: {call.error}", failed=True))
        return _tool_message(call, await run_call(call))

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer(call)) for call in calls]
    except BaseExceptionGroup as failures:
        raise first_cause(failures) from failures
    return [task.result() for task in tasks]


def _end(said: Message, reason: EndReason) -> EnvironmentStep:
    return EnvironmentStep(observation_token_ids=(), messages=(said,), done=True, end_reason=reason)


def assistant_message(parsed: ParsedTurn) -> dict[str, object]:
    """What was said in a turn, as a message of a conversation."""
    message: dict[str, object] = {"role": "assistant", "content": parsed.content}
    if parsed.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            | ({} if call.error is None else {"error": call.error})
            for call in parsed.calls
        ]
    return message


def _tool_message(call: ToolCall, result: ToolResult) -> dict[str, object]:
    message: dict[str, object] = {
        "role": "tool",
        "name": call.name,
        "tool_call_id": call.id,
        "content": result.content,
    }
    if result.failed:
        message["failed"] = True
        if result.detail is not None:
            message["detail"] = result.detail
    return message


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
