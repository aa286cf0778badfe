"""A teacher behind a chat endpoint: the same episodes as a student's rollouts, in messages instead of token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rnow.errors import RnowError, TemporaryError
from rnow.generation.answered import Answered
from rnow.generation.budget import Budget, CapReached, Spent, most_of
from rnow.generation.rows import with_thinking
from rnow.rollout.environment import Episodes, answer_calls, assistant_message
from rnow.rollout.observation import CONTINUE
from rnow.rollout.rendering import ToolDescription
from rnow.rollout.tool_calls import ParsedTurn
from rnow.serving.chat import ChatAnswer, ChatClient, request_body
from rnow.serving.http import ServerDown
from rnow.types import EndReason, Message, Prompt, Rollout, RolloutStatus, rollout_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """What does not change between the conversations.

    Attributes:
        model: as the endpoint names it.
        max_tokens: most tokens of one answer.
        temperature, top_p: None: as the endpoint likes.
        timeout: seconds for one conversation, or None.
        thinking: keep what the server gives apart from the answer as thinking.
    """

    model: str
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    timeout: float | None = None
    thinking: bool = True


class ChatTeacher:
    """Has conversations with an endpoint.

    The calls of one answer run at the same time, through what ``episodes`` runs a student's with. An answer that was cut or
    holds a call that cannot be read ends the conversation: it can be no row, and what followed would be paid for nothing.

    Args:
        episodes: turns, tools and their end, as for rollouts.
        schemas: prompt id -> the tools that are offered.
        budget: every request is made within it.
    """

    def __init__(
        self,
        client: ChatClient,
        episodes: Episodes,
        schemas: Mapping[str, Sequence[ToolDescription]],
        budget: Budget,
        settings: ChatSettings,
    ) -> None:
        self._client = client
        self._episodes = episodes
        self._schemas = schemas
        self._budget = budget
        self._settings = settings
        self._unseen = Spent()

    async def answer(self, prompt: Prompt, index: int) -> Answered:
        """One conversation. Faults of the endpoint, and of what runs the tools, are in the result with what was spent; those of the
        tools themselves are answers to the teacher."""
        talk = _Talk(prompt=prompt, index=index, sent=list(prompt.messages))
        try:
            async with asyncio.timeout(self._settings.timeout) as deadline:
                return await self._talk(talk)
        except TimeoutError:
            if not deadline.expired():
                raise
            limit = self._settings.timeout
            fault = TemporaryError(f"took longer than rollout.rollout_timeout ({limit:g} s)")
            return talk.over("failed", "failed", fault=fault)
        except CapReached:
            return talk.over("failed", "failed", capped=True)
        except RnowError as fault:
            return talk.over("failed", "failed", fault=fault)
        finally:
            if self._episodes.release is not None:
                await self._episodes.release(rollout_id(prompt.id, index))

    async def _talk(self, talk: _Talk) -> Answered:
        episodes, prompt = self._episodes, talk.prompt
        tools = self._schemas.get(prompt.id, ())
        run_call = episodes.run_call(prompt, talk.index) if tools and episodes.run_call else None
        last = episodes.max_turns if run_call else 1
        while True:
            answer = await self._ask(talk, tools)
            if answer.finish_reason == "error":
                raise ServerDown(
                    f"the server at {self._client.url} gave up in the middle of an answer"
                )
            if answer.finish_reason == "length":
                return talk.over("truncated", "length")
            if answer.finish_reason == "content_filter":
                return talk.over("completed", "answer", unfit="filtered by the server")
            if any(call.error for call in answer.calls):
                return talk.over("completed", "answer")
            goes_on = answer.calls or (run_call and episodes.termination_policy == "max_turns")
            if run_call is None or not goes_on:
                return talk.over("completed", "answer")
            if talk.turns >= last:
                return talk.over("completed", "max_turns")
            if answer.calls:
                talk.say(*await answer_calls(answer.calls, run_call))
            else:
                talk.say(CONTINUE)

    async def _ask(self, talk: _Talk, tools: Sequence[ToolDescription]) -> ChatAnswer:
        settings = self._settings
        body = request_body(talk.sent, settings.model, tools)
        known = most_of(body, settings.max_tokens)
        most = known + self._unseen
        async with self._budget.hold(most):
            answer = await self._client.complete(
                talk.sent,
                model=settings.model,
                max_tokens=settings.max_tokens,
                tools=tools,
                temperature=settings.temperature,
                top_p=settings.top_p,
                turn=talk.turns,
            )
            spent = _spent(answer, most)
            # All of it before anything else is waited for: what is given up now was paid for.
            self._budget.add(spent)
            talk.spent += spent
            # A system prompt of the provider's, thinking beyond the limit: what one request has beside ours, the next may have.
            self._unseen = (spent - known).or_more(self._unseen)
        talk.turns += 1
        parsed = ParsedTurn(content=answer.content, reasoning=None, calls=answer.calls)
        talk.say(assistant_message(parsed), reasoning=answer.reasoning if settings.thinking else "")
        return answer


@dataclass(slots=True, kw_only=True)
class _Talk:
    """A conversation in the making. ``sent`` goes to the endpoint, which wants its own thinking back from nobody; ``said`` is
    kept."""

    prompt: Prompt
    index: int
    sent: list[Message]
    said: list[Message] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)
    turns: int = 0

    def say(self, *messages: Message, reasoning: str = "") -> None:
        self.sent += messages
        for message in messages:
            text = with_thinking(str(message.get("content", "")), reasoning)
            self.said.append({**message, "content": text} if reasoning else message)

    def over(
        self,
        status: RolloutStatus,
        end: EndReason,
        *,
        unfit: str | None = None,
        fault: RnowError | None = None,
        capped: bool = False,
    ) -> Answered:
        rollout = Rollout(
            prompt_id=self.prompt.id,
            index=self.index,
            turns=(),
            messages=tuple(self.said),
            status=status,
            end_reason=end,
            error=None if fault is None else str(fault),
        )
        return Answered(
            rollout=rollout,
            spent=self.spent,
            unfit=unfit,
            fault=fault,
            capped=capped,
        )


def _spent(answer: ChatAnswer, most: Spent) -> Spent:
    """What the server counted; of one that does not, the most that it can have been."""
    if answer.usage is not None:
        prompt, completion = answer.usage
        return Spent(prompt_tokens=prompt, completion_tokens=completion)
    written = answer.content + answer.reasoning + "".join(map(str, answer.calls))
    size = len(written.encode("utf-8", "backslashreplace")) + 1
    return Spent(
        prompt_tokens=most.prompt_tokens,
        completion_tokens=min(size, most.completion_tokens),
        estimated=True,
    )
