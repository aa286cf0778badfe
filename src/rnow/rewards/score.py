"""Rewards for the groups of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rnow.protocols import Rewarder
from rnow.types import Prompt, Rollout, RolloutGroup, ScoredGroup, ScoredRollout

MAX_CONCURRENT = 256


async def score_rewards(
    groups: Sequence[RolloutGroup], rewarder: Rewarder, *, max_concurrent: int = MAX_CONCURRENT
) -> list[ScoredGroup]:
    """Every rollout with its reward, in the order of ``groups``; at most ``max_concurrent`` are being scored at once.

    Raises what ``rewarder.score`` raises, after ending the others.
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
        await asyncio.gather(*flat)
    except BaseException:
        for task in flat:
            task.cancel()
        await asyncio.gather(*flat, return_exceptions=True)
        raise
    return [
        ScoredGroup(prompt=group.prompt, rollouts=tuple(task.result() for task in group_tasks))
        for group, group_tasks in zip(groups, tasks, strict=True)
    ]
