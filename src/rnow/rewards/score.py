"""The rewards of a step: the user's reward functions on its rollouts. One that fails is reported by name."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rnow import progress
from rnow.core.messages import message_text, strip_thinking
from rnow.errors import DataError
from rnow.protocols import Rewarder
from rnow.rewards.outage import Outage
from rnow.tasks import first_cause
from rnow.types import (
    Message,
    Prompt,
    RewardResult,
    Rollout,
    RolloutGroup,
    ToolContext,
)
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome, CodeHost, call_function
from rnow.usercode.sandbox import Sandboxes

DEFAULT_TIMEOUT = 60.0
MAX_CONCURRENT = 256
POLL_SECONDS = 0.2
LARGEST_REWARD = 1e30
"""Beyond it the sums of a batch leave float32."""


async def score_rewards(
    groups: Sequence[RolloutGroup],
    rewarder: Rewarder,
    *,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, RewardResult]:
    """The reward of every rollout whose prompt names one, by rollout id; at most ``MAX_CONCURRENT`` are being scored at once.

    Args:
        poll: asked a few times per second while rewards run; may raise to stop.

    Raises what ``rewarder.score`` or ``poll`` raises, after ending the others.
    """
    slots = asyncio.Semaphore(MAX_CONCURRENT)

    async def score(prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        async with slots:
            return await rewarder.score(prompt, rollout)

    tasks = {
        rollout.id: asyncio.ensure_future(score(group.prompt, rollout))
        for group in groups
        for rollout in group.rollouts
    }
    try:
        await _all_of(tasks.values(), poll)
    except BaseException:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        raise
    return {key: reward for key, task in tasks.items() if (reward := task.result()) is not None}


async def _all_of(
    tasks: Iterable[asyncio.Future[RewardResult | None]], poll: Callable[[], None]
) -> None:
    waiting: set[asyncio.Future[RewardResult | None]] = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(
            waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in done:
            task.result()
        poll()


class RewardRunner:
    """Runs the rewards that a prompt names. Implements ``Rewarder``.

    Args:
        functions: name -> reward, as ``rnow.project`` loads them.
        host: runs them: async ones together on one event loop, sync ones one at a time in each of up to 32 workers. It is
            started when the first of them is called. A time limit ends the function.
        timeout: seconds for one call of a reward without its own.
        include_thinking: whether rewards see ``<think>`` blocks.
        sandboxes: where those with ``sandbox=True`` run, which cannot be run without them.
        outage: what is done while a judge cannot be asked; the default takes it as any other failure.
    """

    def __init__(
        self,
        functions: Mapping[str, FunctionInfo],
        host: CodeHost,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        include_thinking: bool = False,
        sandboxes: Sandboxes | None = None,
        outage: Outage | None = None,
    ) -> None:
        self._functions = functions
        self._host = host
        self._timeout = timeout
        self._include_thinking = include_thinking
        self._sandboxes = sandboxes
        self._outage = outage or Outage(0.0, lambda text: None)

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        """The rollout's reward: 0 when a precondition gives 0 (or fails), else the sum of all; None when the prompt
        names no reward. A failed rollout is not shown to any function: it gets 0 and its error under ``rollout``.

        Raises DataError for a reward that does not exist (the project's loader refuses such rows before), TemporaryError for
        a judge that cannot be asked for too long.
        """
        if not prompt.rewards:
            return None
        if rollout.status == "failed":
            return RewardResult(total=0.0, errors={"rollout": rollout.error or "failed"})
        infos = [self._find(name, prompt) for name in prompt.rewards]
        messages = conversation(prompt, rollout, include_thinking=self._include_thinking)
        context = ToolContext(
            rollout_id=f"rewards of {rollout.id}",
            metadata=prompt.metadata,
            variables=prompt.variables,
            docker=prompt.docker,
            docker_env=prompt.docker_env,
        )
        try:
            async with asyncio.TaskGroup() as group:
                given = {"messages": messages}
                tasks = [group.create_task(self._run(info, given, context)) for info in infos]
        except BaseExceptionGroup as failures:
            raise first_cause(failures) from None
        finally:
            if self._sandboxes is not None:
                await self._sandboxes.release(context.rollout_id)
        breakdown: dict[str, float] = {}
        errors: dict[str, str] = {}
        tracebacks: dict[str, str] = {}
        passed = True
        outcomes = [task.result() for task in tasks]
        for info, (value, problem, detail) in zip(infos, outcomes, strict=True):
            breakdown[info.name] = value
            if problem is not None:
                errors[info.name] = problem
            if detail is not None:
                tracebacks[info.name] = detail
            if info.precondition and value == 0.0:
                passed = False
        total = math.fsum(breakdown.values()) if passed else 0.0
        return RewardResult(total=total, breakdown=breakdown, errors=errors, tracebacks=tracebacks)

    def close(self) -> None:
        """End the processes. A later ``score`` starts them again."""
        self._host.close()

    def _find(self, name: str, prompt: Prompt) -> FunctionInfo:
        try:
            return self._functions[name]
        except KeyError:
            raise DataError(f'unknown reward "{name}"', where=prompt.source or prompt.id) from None

    async def _run(
        self, info: FunctionInfo, given: Mapping[str, object], context: ToolContext
    ) -> tuple[float, str | None, str | None]:
        """(value, None, None), or (0, what went wrong: one line, with the line of the file that raised, or where the function is, and
        the traceback where it raised)."""
        limit = self._timeout if info.timeout is None else info.timeout

        async def attempt() -> CallOutcome:
            progress.moved(ahead=limit)
            outcome = await call_function(
                info,
                given,
                context,
                host=self._host,
                sandboxes=self._sandboxes,
                timeout=limit,
            )
            progress.moved()
            return outcome

        outcome = await self._outage.call(info, attempt)
        if outcome.status == "ok" and outcome.value is not None:
            value = float(outcome.value)
            if abs(value) <= LARGEST_REWARD:
                return value, None, None
            problem = f"returned {value:g}, more than training can reckon with ({info.place})"
            return 0.0, problem, None
        fix = f"; {outcome.fix}" if outcome.fix else ""
        problem = f"{outcome.error or outcome.status} ({outcome.place or info.place}){fix}"
        return 0.0, problem, outcome.detail


def conversation(
    prompt: Prompt, rollout: Rollout, *, include_thinking: bool
) -> list[dict[str, object]]:
    """The prompt's messages and then the rollout's.

    Without thinking, assistant messages lose their ``<think>`` blocks and their ``reasoning_content``.
    """
    messages = [dict(message) for message in prompt.messages]
    for message in rollout.messages:
        messages.append(dict(message) if include_thinking else _without_thinking(message))
    return messages


def _without_thinking(message: Message) -> dict[str, object]:
    plain = dict(message)
    if plain.get("role") != "assistant":
        return plain
    plain.pop("reasoning_content", None)
    content = plain.get("content")
    if isinstance(content, list):
        text = message_text(content)
        stripped = strip_thinking(text)
        if stripped != text:
            plain["content"] = stripped
    elif isinstance(content, str):
        plain["content"] = strip_thinking(content)
    return plain
