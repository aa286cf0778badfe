"""Asking for many answers at once: an endpoint by so many conversations, a model here by batches of rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice

from rnow.errors import TemporaryError
from rnow.generation.answered import Answered, Job
from rnow.generation.budget import Budget, Spent
from rnow.generation.chat import ChatTeacher
from rnow.generation.desk import Desk
from rnow.generation.store import Key
from rnow.protocols import Sampler
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.rollout.environment import Episodes
from rnow.types import Prompt, Rollout


async def ask_endpoint(
    jobs: Iterable[Job],
    teacher: ChatTeacher,
    desk: Desk,
    *,
    at_once: int,
    stopping: Callable[[], bool],
) -> None:
    """Have every conversation, ``at_once`` at a time. Those under way are finished, whatever ends the rest: they are paid for.

    Args:
        stopping: asked before each conversation.

    Raises what ``Desk.take`` raised first, after the others.
    """
    waiting = iter(jobs)
    failed: list[Exception] = []

    async def work() -> None:
        while not (failed or desk.closed or stopping()):
            job = next(waiting, None)
            if job is None:
                return
            try:
                await desk.take(job, await teacher.answer(job.prompt, job.sample))
            except Exception as error:
                failed.append(error)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(work())
    if failed:
        raise failed[0]


async def ask_model(
    jobs: Sequence[Job],
    sampler: Sampler,
    episodes: Episodes,
    settings: RolloutSettings,
    desk: Desk,
    budget: Budget,
    *,
    at_once: int,
) -> None:
    """Have every conversation with a model in reach of its token ids, as the rollouts of a step.

    Args:
        settings: ``group_size`` above every ``Job.sample``.
        budget: so many rollouts are begun as fit it, each as long as the window.
        at_once: begun together; the next ones follow when all are over.

    Raises what ``Desk.take``, the sampler and ``settings.poll`` raise; what finished before is kept.
    """
    waiting = iter(jobs)
    while not desk.closed:
        room = at_once
        while room and not budget.fits(Spent(prompt_tokens=settings.window * room)):
            room //= 2
        batch = list(islice(waiting, room or 1))
        if not batch:
            return
        if not room:
            desk.capped = True
            return
        await _ask_batch(batch, sampler, episodes, settings, desk, budget)


async def _ask_batch(
    batch: Sequence[Job],
    sampler: Sampler,
    episodes: Episodes,
    settings: RolloutSettings,
    desk: Desk,
    budget: Budget,
) -> None:
    prompts = {job.prompt.id: job.prompt for job in batch}
    arrivals = _Arrivals(batch, desk, budget)
    try:
        await collect_rollouts(
            list(prompts.values()), sampler, episodes, settings, step=0, store=arrivals
        )
    finally:
        await arrivals.settle()


class _Arrivals:
    """Hands finished rollouts on while others are under way. Those of a group that nobody asks for count as finished.
    Implements ``RolloutStore``."""

    def __init__(self, batch: Sequence[Job], desk: Desk, budget: Budget) -> None:
        self._jobs = {(job.prompt.id, job.sample): job for job in batch}
        self._desk = desk
        self._budget = budget
        self._tasks: list[asyncio.Task[None]] = []

    def finished(self, prompt_id: str, index: int) -> Rollout | None:
        """See ``RolloutStore.finished``."""
        if (prompt_id, index) in self._jobs:
            return None
        return Rollout(
            prompt_id=prompt_id,
            index=index,
            turns=(),
            messages=(),
            status="completed",
            end_reason="answer",
        )

    def add(self, rollout: Rollout) -> None:
        """See ``RolloutStore.add``."""
        job = self._jobs[rollout.prompt_id, rollout.index]
        answered = answered_here(rollout)
        self._budget.add(answered.spent)
        self._tasks.append(asyncio.create_task(self._desk.take(job, answered)))

    async def settle(self) -> None:
        """Wait until all that arrived is kept. Raises what went wrong with the first."""
        found = await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in found:
            if isinstance(one, BaseException):
                raise one


def answered_here(rollout: Rollout) -> Answered:
    """A rollout of a model that runs here, its tokens counted once: what was read stays in its cache."""
    written = rollout.completion_tokens
    fault = None
    if rollout.status == "failed":
        fault = TemporaryError(rollout.error or "a rollout failed")
    spent = Spent(prompt_tokens=rollout.total_tokens - written, completion_tokens=written)
    return Answered(rollout=rollout, spent=spent, fault=fault)


def missing(
    prompts: Sequence[tuple[Prompt, str]], teacher: str, samples: int, known: Container[Key]
) -> list[Job]:
    """The conversations that are still to be had, prompt by prompt.

    Args:
        prompts: each with its ``prompt_key``.
        known: keys of those that were had.
    """
    jobs = [
        Job(prompt=prompt, sample=sample, key=(key, teacher, sample))
        for prompt, key in prompts
        for sample in range(samples)
    ]
    return [job for job in jobs if job.key not in known]
