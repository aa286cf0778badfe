"""Reward advantages: how much better a rollout did than its peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rnow.types import RewardResult, RolloutGroup

STD_EPSILON = 1e-6

AdvantageEstimator = Literal["grpo", "reinforce"]


def reward_advantages(
    rewards: Sequence[Sequence[float]], estimator: AdvantageEstimator, *, scale: bool = True
) -> list[list[float]]:
    """One advantage per rollout, constant over its tokens.

    Args:
        rewards: one inner sequence per group; groups may differ in size.
        estimator: ``grpo`` centres by the group mean and, with ``scale``, divides by the group's population standard
            deviation plus 1e-6 (Shao et al. 2024, eq. 3); ``reinforce`` centres by the mean of the whole batch.
        scale: the division of ``grpo``; ``reinforce`` ignores it.

    Returns:
        Advantages in the shape of ``rewards``.
    """
    groups = [torch.tensor(list(group), dtype=torch.float64) for group in rewards]
    if estimator == "reinforce":
        sizes = [group.numel() for group in groups]
        everything = torch.cat([*groups, torch.zeros(0, dtype=torch.float64)])
        return [part.tolist() for part in _centred(everything).split(sizes)] if groups else []
    return [_group_relative(group, scale).tolist() for group in groups]


def rollout_advantages(
    groups: Sequence[RolloutGroup],
    rewards: Mapping[str, RewardResult],
    estimator: AdvantageEstimator,
    *,
    scale: bool,
) -> dict[str, float]:
    """Advantage by rollout id: 0 without a reward. A rollout that failed, or of which a reward failed, says nothing about the
    others: it has 0 too, and does not count in its group's mean."""
    judged = [
        [
            r.id
            for r in group.rollouts
            if r.status != "failed" and r.id in rewards and not rewards[r.id].errors
        ]
        for group in groups
    ]
    values = reward_advantages(
        [[rewards[key].total for key in group] for group in judged], estimator, scale=scale
    )
    advantages = {rollout.id: 0.0 for group in groups for rollout in group.rollouts}
    for keys, found in zip(judged, values, strict=True):
        advantages |= zip(keys, found, strict=True)
    return advantages


def _group_relative(group: Tensor, scale: bool) -> Tensor:
    centred = _centred(group)
    if not scale or group.numel() == 0:
        return centred
    return centred / (group.std(correction=0) + STD_EPSILON)


def _centred(values: Tensor) -> Tensor:
    """Values minus their mean. Equal ones are exactly 0 apart: the rounding of their mean would be all there is to learn."""
    if values.numel() == 0 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return values - values.mean()
