"""Reward functions -> one reward per rollout. A reward that fails is reported by name and counts 0."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import traceback
from collections.abc import Awaitable, Mapping
from typing import Any

from rnow.core.judge import judge_secrets
from rnow.core.messages import message_text, strip_thinking
from rnow.core.reward import RewardArgs, RewardSpec
from rnow.errors import DataError
from rnow.project.faults import escape
from rnow.project.secrets import redact
from rnow.rewards.threads import CallTimeout, HangingCalls, ThreadLane
from rnow.types import Message, Prompt, RewardResult, Rollout

_MAX_ERROR = 300
DEFAULT_TIMEOUT = 60.0


class RewardRunner:
    """Runs the rewards that a prompt names. Implements ``Rewarder``.

    The functions run in the training process: async ones on the event loop, sync ones in threads. A time limit ends the
    wait for a sync function, not its thread, and nothing in this process can interrupt code that holds the interpreter
    lock or blocks the loop from an ``async def``.

    Args:
        functions: name -> reward, as ``rnow.project`` loads them.
        secrets: what ``args.secrets`` and ``llm_judge`` see; their values are kept out of error texts.
        timeout: seconds for one call of a reward without its own.
        include_thinking: whether rewards see ``<think>`` blocks.
    """

    def __init__(
        self,
        functions: Mapping[str, RewardSpec],
        *,
        secrets: Mapping[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        include_thinking: bool = False,
    ) -> None:
        self._functions = {name: (spec, spec.is_async) for name, spec in functions.items()}
        self._secrets = dict(secrets or {})
        self._timeout = timeout
        self._include_thinking = include_thinking
        self._lane: ThreadLane | None = None
        self._orphans: set[asyncio.Future[Any]] = set()

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        """The rollout's reward: 0 when a precondition gives 0 (or fails), else the sum of all; None when the prompt
        names no reward. A failed rollout is not shown to any function: it gets 0 and its error under ``rollout``.

        Raises DataError for a reward that does not exist (the project's loader refuses such rows before).
        """
        if not prompt.rewards:
            return None
        if rollout.status == "failed":
            return RewardResult(total=0.0, errors={"rollout": rollout.error or "failed"})
        specs = [self._find(name, prompt) for name in prompt.rewards]
        messages = conversation(prompt, rollout, include_thinking=self._include_thinking)
        with judge_secrets(self._secrets):
            if len(specs) == 1:
                outcomes = [await self._run(*specs[0], prompt, messages)]
            else:
                outcomes = await asyncio.gather(
                    *(
                        self._run(spec, is_async, prompt, [_own(message) for message in messages])
                        for spec, is_async in specs
                    )
                )
        breakdown: dict[str, float] = {}
        errors: dict[str, str] = {}
        passed = True
        for (spec, _), (value, problem) in zip(specs, outcomes, strict=True):
            breakdown[spec.name] = value
            if problem is not None:
                errors[spec.name] = problem
            if spec.precondition and value == 0.0:
                passed = False
        total = math.fsum(breakdown.values()) if passed else 0.0
        return RewardResult(total=total, breakdown=breakdown, errors=errors)

    def _find(self, name: str, prompt: Prompt) -> tuple[RewardSpec, bool]:
        try:
            return self._functions[name]
        except KeyError:
            raise DataError(f'unknown reward "{name}"', where=prompt.source or prompt.id) from None

    async def _run(
        self, spec: RewardSpec, is_async: bool, prompt: Prompt, messages: list[dict[str, Any]]
    ) -> tuple[float, str | None]:
        """(value, None), or (0, what went wrong)."""
        args = RewardArgs(
            metadata=_own(prompt.metadata),
            variables=_own(prompt.variables),
            secrets=dict(self._secrets),
        )
        timeout = self._timeout if spec.timeout is None else spec.timeout
        try:
            if is_async:
                value = await self._await(_guarded(spec.function(args, messages)), timeout)
            else:
                value = await self._threads().call(spec.function, args, messages, timeout=timeout)
            if inspect.isawaitable(value):
                # `return llm_judge(...)` without await, as older projects have it.
                value = await self._await(_guarded(value), timeout)
            return _number(value), None
        except asyncio.CancelledError:
            raise
        except (CallTimeout, HangingCalls, _NotANumber) as error:
            problem = str(error)
        except (Exception, SystemExit) as error:
            problem = _describe(error, spec)
        return 0.0, redact(problem, self._secrets)

    async def _await(self, awaitable: Awaitable[Any], timeout: float) -> Any:
        """The result within ``timeout`` seconds. A task that swallows its cancellation is left behind, not waited for."""
        task = asyncio.ensure_future(awaitable)
        try:
            done, _ = await asyncio.wait((task,), timeout=timeout)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            self._orphans.add(task)
            task.add_done_callback(self._forget)
            raise CallTimeout(f"took longer than {timeout:g} s")
        if task.cancelled():
            raise RuntimeError("the reward cancelled itself")
        return task.result()

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._orphans.discard(task)
        if not task.cancelled():
            task.exception()

    def _threads(self) -> ThreadLane:
        loop = asyncio.get_running_loop()
        if self._lane is None or self._lane.loop is not loop:
            self._lane = ThreadLane(loop)
        return self._lane


def conversation(
    prompt: Prompt, rollout: Rollout, *, include_thinking: bool
) -> list[dict[str, Any]]:
    """The prompt's messages and then the rollout's, as fresh plain dicts that a reward may change.

    Without thinking, assistant messages lose their ``<think>`` blocks and their ``reasoning_content``.
    """
    messages = [_own(message) for message in prompt.messages]
    for message in rollout.messages:
        messages.append(_own(message) if include_thinking else _without_thinking(message))
    return messages


def _own(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose lists and objects are copies too: the next epoch's reward must not see what this one changed."""
    return {
        key: copy.deepcopy(value) if isinstance(value, dict | list) else value
        for key, value in mapping.items()
    }


def _without_thinking(message: Message) -> dict[str, Any]:
    plain = _own(message)
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


class _NotANumber(Exception):
    pass


def _number(value: Any) -> float:
    """A finite float. True and False are 1 and 0; numpy and torch scalars count; text, None and NaN do not."""
    if type(value) is not float:
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise _NotANumber(f"returned {_shown(value)}, not a number")
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise _NotANumber(f"returned {_shown(value)}, not one number") from None
    if not math.isfinite(value):
        raise _NotANumber(f"returned {value}, not a finite number")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} {value[:40]!r}"
    return f"a {type(value).__name__}"


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except SystemExit as error:
        # A task that ends with SystemExit takes the event loop, and so the run, with it.
        raise RuntimeError(f"the reward called exit({error.code!r})") from None


def _describe(error: BaseException, spec: RewardSpec) -> str:
    """One line: kind, message, and the line of the reward's own file where it was raised."""
    try:
        text = escape(" ".join(str(error).split()))[:_MAX_ERROR]
    except Exception:
        text = ""
    described = f"{type(error).__name__}: {text}" if text else type(error).__name__
    file = spec.function.__code__.co_filename
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == file
    ]
    return f"{described} ({file.rpartition('/')[2]}:{lines[-1]})" if lines else described
