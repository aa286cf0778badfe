"""Running all rollouts of a step at once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from rnow import progress
from rnow.errors import RnowError
from rnow.protocols import Environment, Sampler
from rnow.tasks import first_cause
from rnow.types import (
    Completion,
    EndReason,
    Message,
    Prompt,
    Purpose,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SamplingParams,
    Turn,
)

POLL_SECONDS = 0.2


class RolloutStore(Protocol):
    """Remembers finished rollouts, so that a resumed step need not repeat them."""

    def finished(self, prompt_id: str, index: int) -> Rollout | None:
        """The rollout, if it was finished before."""
        ...

    def add(self, rollout: Rollout) -> None:
        """Remember a rollout that just finished."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSettings:
    """What does not change between the prompts of a run.

    Attributes:
        group_size: rollouts per prompt.
        window: most tokens of a whole conversation.
        max_tokens: most tokens of one completion.
        stop_token_ids, temperature, top_p, top_k: as in SamplingParams.
        run_seed, purpose: the fixed parts of every seed.
        poll: asked a few times per second while rollouts wait; may raise to stop.
        timeout: seconds for one rollout, or None; one that takes longer is a failed rollout.
        horizon: no rollout is longer, in tokens that the student wrote; one that gets there is complete.
        max_live: rollouts that are under way at once, where each holds something that there are only so many of; None: all.
    """

    group_size: int
    window: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    run_seed: int
    purpose: Purpose
    timeout: float | None = None
    horizon: int | None = None
    max_live: int | None = None
    poll: Callable[[], None] = lambda: None

    def params(self, context_length: int) -> SamplingParams:
        """Sampling parameters after ``context_length`` tokens of context."""
        return SamplingParams(
            max_tokens=min(
                self.max_tokens, self.window - context_length, self.horizon or self.max_tokens
            ),
            stop_token_ids=self.stop_token_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


def rollout_seed(
    run_seed: int, purpose: Purpose, step: int, prompt_id: str, rollout_index: int, turn: int
) -> int:
    """A 63-bit seed from (run seed, purpose, step, prompt id, rollout index, turn).

    Arrival order, a resume and the number of GPUs cannot change it. 63 bits, because vLLM takes a signed integer.
    """
    key = f"{run_seed}|{purpose}|{step}|{prompt_id}|{rollout_index}|{turn}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


async def collect_rollouts(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    environments: Callable[[Prompt, int], Environment],
    settings: RolloutSettings,
    *,
    step: int,
    store: RolloutStore | None = None,
    finished: Callable[[Prompt, Rollout], None] = lambda prompt, rollout: None,
) -> list[RolloutGroup]:
    """``group_size`` rollouts of every prompt, concurrently; groups in the order of the prompts.

    An environment that raises makes a rollout of status ``failed``, which is data; a sampler that raises ends the step.
    ``finished`` is told of each rollout, of those in ``store`` too.
    """
    places = asyncio.Semaphore(settings.max_live or max(1, len(prompts) * settings.group_size))

    async def one(prompt: Prompt, index: int) -> Rollout:
        known = store.finished(prompt.id, index) if store else None
        if known is not None:
            finished(prompt, known)
            return known
        # A rollout that waits for its place is not live: a batching sampler does not wait for it.
        async with places:
            with sampler.live_rollout():
                episode = _Episode(prompt, index, sampler, settings, step)
                rollout = await episode.run(environments)
        if store is not None:
            store.add(rollout)
        finished(prompt, rollout)
        return rollout

    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_watch(settings.poll))
            tasks = [
                [group.create_task(one(prompt, index)) for index in range(settings.group_size)]
                for prompt in prompts
            ]
            if started := list(chain.from_iterable(tasks)):
                await asyncio.wait(started)
            watch.cancel()
    except BaseExceptionGroup as failures:
        error = first_cause(failures)
        if isinstance(error, _SamplerFailed) and error.__cause__ is not None:
            error = error.__cause__
        raise error from failures
    return [
        RolloutGroup(prompt=prompt, rollouts=tuple(task.result() for task in own))
        for prompt, own in zip(prompts, tasks, strict=True)
    ]


async def _watch(poll: Callable[[], None]) -> None:
    """Ends the group of rollouts, by raising in it, soon after a stop was asked for."""
    while True:
        poll()
        await asyncio.sleep(POLL_SECONDS)


class _Episode:
    """One rollout in the making."""

    def __init__(
        self, prompt: Prompt, index: int, sampler: Sampler, settings: RolloutSettings, step: int
    ) -> None:
        self._prompt = prompt
        self._index = index
        self._sampler = sampler
        self._settings = settings
        self._step = step
        self._context: list[int] = []
        self._turns: list[Turn] = []
        self._messages: list[Message] = []

    async def run(self, environments: Callable[[Prompt, int], Environment]) -> Rollout:
        try:
            environment = environments(self._prompt, self._index)
            try:
                rollout = await self._play_in_time(environment)
            except BaseException:
                # What went wrong first is what must be heard of: a sampler's failure ends the step.
                with suppress(Exception):
                    await environment.close()
                raise
            await environment.close()
            return rollout
        except (RnowError, _SamplerFailed):
            raise
        except Exception as error:
            return self._rollout("failed", "failed", f"{type(error).__name__}: {error}")

    async def _play_in_time(self, environment: Environment) -> Rollout:
        try:
            async with asyncio.timeout(self._settings.timeout) as deadline:
                return await self._play(environment)
        except TimeoutError:
            if not deadline.expired():
                raise
            told = f"took longer than rollout.rollout_timeout ({self._settings.timeout:g} s)"
            return self._rollout("failed", "failed", told)

    async def _play(self, environment: Environment) -> Rollout:
        observation = await environment.start()
        while True:
            self._context += observation
            if len(self._context) >= self._settings.window:
                return self._rollout("truncated", "window", unanswered=observation)
            completion = await self._complete()
            self._context += completion.token_ids
            # Before the environment is asked: a fault there must not lose what the student wrote.
            self._turns.append(Turn(observation_token_ids=observation, completion=completion))
            step = await environment.step(completion)
            progress.moved()
            self._messages.extend(step.messages)
            if completion.finish_reason == "length":
                if len(completion.token_ids) == self._settings.horizon:
                    return self._rollout("completed", "horizon")
                full = len(self._context) >= self._settings.window
                return self._rollout("truncated", "window" if full else "length")
            if step.done:
                return self._rollout("completed", step.end_reason or "answer")
            observation = step.observation_token_ids

    async def _complete(self) -> Completion:
        seed = rollout_seed(
            self._settings.run_seed,
            self._settings.purpose,
            self._step,
            self._prompt.id,
            self._index,
            len(self._turns),
        )
        try:
            params = self._settings.params(len(self._context))
            return await self._sampler.complete(self._context, params, seed)
        except RnowError:
            raise
        except Exception as error:
            raise _SamplerFailed from error

    def _rollout(
        self,
        status: RolloutStatus,
        end_reason: EndReason,
        error: str | None = None,
        unanswered: tuple[int, ...] = (),
    ) -> Rollout:
        return Rollout(
            prompt_id=self._prompt.id,
            index=self._index,
            turns=tuple(self._turns),
            messages=tuple(self._messages),
            status=status,
            end_reason=end_reason,
            unanswered_token_ids=unanswered,
            error=error,
        )


class _SamplerFailed(Exception):
    """Carries a sampler's exception past the boundary that turns environment faults into failed rollouts."""
