"""Rewards for the groups of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from rnow.protocols import Rewarder
from rnow.types import Prompt, Rollout, RolloutGroup, ScoredGroup, ScoredRollout

MAX_CONCURRENT = 256
POLL_SECONDS = 0.2


async def score_rewards(
    groups: Sequence[RolloutGroup],
    rewarder: Rewarder,
    *,
    max_concurrent: int = MAX_CONCURRENT,
    poll: Callable[[], None] = lambda: None,
) -> list[ScoredGroup]:
    """Every rollout with its reward, in the order of ``groups``; at most ``max_concurrent`` are being scored at once.

    Args:
        poll: asked a few times per second while rewards run; may raise to stop.

    Raises what ``rewarder.score`` or ``poll`` raises, after ending the others.
    """
    slots = asyncio.Semaphore(max_concurrent)

    async def score(prompt: Prompt, rollout: Rollout) -> ScoredRollout:
        async with slots:
            return ScoredRollout(rollout=rollout, reward=await rewarder.score(prompt, rollout))

    tasks = [
        [asyncio.ensure_future(score(group.prompt, rollout)) for rollout in group.rollouts]
        for group in groups
    ]
    flat = [task for group_tasks in tasks for task in group_tasks]
    try:
        await _all_of(flat, poll)
    except BaseException:
        for task in flat:
            task.cancel()
        await asyncio.gather(*flat, return_exceptions=True)
        raise
    return [
        ScoredGroup(prompt=group.prompt, rollouts=tuple(task.result() for task in group_tasks))
        for group, group_tasks in zip(groups, tasks, strict=True)
    ]


async def _all_of(tasks: Sequence[asyncio.Future[ScoredRollout]], poll: Callable[[], None]) -> None:
    waiting: set[asyncio.Future[ScoredRollout]] = set(tasks)
    while waiting:
        done, waiting = await asyncio.wait(
            waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
        )
        for task in done:
            task.result()
        poll()
