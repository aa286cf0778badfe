"""Rewards for the rollouts of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from rnow.protocols import Rewarder
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

MAX_CONCURRENT = 256
POLL_SECONDS = 0.2


async def score_rewards(
    groups: Sequence[RolloutGroup],
    rewarder: Rewarder,
    *,
    max_concurrent: int = MAX_CONCURRENT,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, RewardResult]:
    """The reward of every rollout whose prompt names one, by rollout id; at most ``max_concurrent`` are being scored at once.

    Args:
        poll: asked a few times per second while rewards run; may raise to stop.

    Raises what ``rewarder.score`` or ``poll`` raises, after ending the others.
    """
    slots = asyncio.Semaphore(max_concurrent)

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
