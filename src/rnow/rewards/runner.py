"""Reward functions -> one reward per rollout. A reward that fails is reported by name and counts 0."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnow.core.messages import message_text, strip_thinking
from rnow.errors import DataError
from rnow.types import Message, Prompt, RewardResult, Rollout
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome, CodeHost
from rnow.usercode.sandbox import SandboxedHosts

DEFAULT_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where sandboxed rewards of one rollout run: a sandbox of their own, named ``key``, as the prompt's row says."""

    key: str
    prompt: Prompt


class RewardRunner:
    """Runs the rewards that a prompt names. Implements ``Rewarder``.

    The functions run in the processes of a ``CodeHost``, which is started when the first of them is called: async ones
    together on one event loop, sync ones one at a time in each of up to 32 workers. A time limit ends the function.

    Args:
        functions: name -> reward, as ``rnow.project`` loads them.
        secrets: the project's; ``args.secrets`` holds those that the code names. Their values are kept out of error texts.
        timeout: seconds for one call of a reward without its own.
        include_thinking: whether rewards see ``<think>`` blocks.
        log: where what the functions print goes; None = nowhere.
        host: the host to use and to leave open at ``close``; None = one of its own.
        sandboxed: runs those with ``sandbox=True``, which cannot be run without it.
        release: told when the rewards of a rollout are done, for what ``sandboxed`` started for them.
    """

    def __init__(
        self,
        functions: Mapping[str, FunctionInfo],
        *,
        secrets: Mapping[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        include_thinking: bool = False,
        log: Path | None = None,
        host: CodeHost | None = None,
        sandboxed: SandboxedHosts | None = None,
        release: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self._functions = dict(functions)
        self._secrets = dict(secrets or {})
        self._timeout = timeout
        self._include_thinking = include_thinking
        self._log = log
        self._host = host
        self._sandboxed = sandboxed
        self._release = release
        self._owned: CodeHost | None = None

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        """The rollout's reward: 0 when a precondition gives 0 (or fails), else the sum of all; None when the prompt
        names no reward. A failed rollout is not shown to any function: it gets 0 and its error under ``rollout``.

        Raises DataError for a reward that does not exist (the project's loader refuses such rows before).
        """
        if not prompt.rewards:
            return None
        if rollout.status == "failed":
            return RewardResult(total=0.0, errors={"rollout": rollout.error or "failed"})
        infos = [self._find(name, prompt) for name in prompt.rewards]
        payload = {
            "messages": conversation(prompt, rollout, include_thinking=self._include_thinking),
            "metadata": dict(prompt.metadata),
            "variables": dict(prompt.variables),
        }
        place = _Place(f"rewards of {rollout.id}", prompt)
        try:
            if len(infos) == 1:
                outcomes = [await self._run(infos[0], payload, place)]
            else:
                outcomes = await asyncio.gather(
                    *(self._run(info, payload, place) for info in infos)
                )
        finally:
            if self._release is not None:
                await self._release(place.key)
        breakdown: dict[str, float] = {}
        errors: dict[str, str] = {}
        passed = True
        for info, (value, problem) in zip(infos, outcomes, strict=True):
            breakdown[info.name] = value
            if problem is not None:
                errors[info.name] = problem
            if info.precondition and value == 0.0:
                passed = False
        total = math.fsum(breakdown.values()) if passed else 0.0
        return RewardResult(total=total, breakdown=breakdown, errors=errors)

    def close(self) -> None:
        """End the processes. A later ``score`` starts them again."""
        if self._owned is not None:
            self._owned.close()

    def pids(self) -> set[int]:
        """Ids of the processes in which the rewards run."""
        return self._owned.pids() if self._owned is not None else set()

    def _find(self, name: str, prompt: Prompt) -> FunctionInfo:
        try:
            return self._functions[name]
        except KeyError:
            raise DataError(f'unknown reward "{name}"', where=prompt.source or prompt.id) from None

    async def _run(
        self, info: FunctionInfo, payload: Mapping[str, Any], place: _Place
    ) -> tuple[float, str | None]:
        """(value, None), or (0, what went wrong)."""
        timeout = self._timeout if info.timeout is None else info.timeout
        if info.sandbox:
            if self._sandboxed is None:
                raise RuntimeError(f"{info.name} has sandbox=True and there is no sandbox")
            outcome = await self._sandboxed.call(
                info.name,
                payload,
                timeout=timeout,
                rollout_id=place.key,
                docker=place.prompt.docker,
                docker_env=place.prompt.docker_env,
            )
        else:
            outcome = await self._host_of(info).call(info.name, payload, timeout=timeout)
        if outcome.status == "ok":
            return float(outcome.value), None
        return 0.0, _problem(outcome)

    def _host_of(self, info: FunctionInfo) -> CodeHost:
        if self._host is not None:
            return self._host
        if self._owned is None:
            self._owned = CodeHost(info.file, "rewards", secrets=self._secrets, log=self._log)
        return self._owned


def _problem(outcome: CallOutcome) -> str:
    """One line: what happened, and the line of the reward's own file where it was raised."""
    error = outcome.error or outcome.status
    return f"{error} ({outcome.place})" if outcome.place else error


def conversation(
    prompt: Prompt, rollout: Rollout, *, include_thinking: bool
) -> list[dict[str, Any]]:
    """The prompt's messages and then the rollout's.

    Without thinking, assistant messages lose their ``<think>`` blocks and their ``reasoning_content``.
    """
    messages = [dict(message) for message in prompt.messages]
    for message in rollout.messages:
        messages.append(dict(message) if include_thinking else _without_thinking(message))
    return messages


def _without_thinking(message: Message) -> dict[str, Any]:
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
