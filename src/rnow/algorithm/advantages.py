"""Reward advantages: how much better a rollout did than its peers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rnow.types import RewardResult, RolloutGroup

STD_EPSILON = 1e-6

AdvantageEstimator = Literal["grpo", "reinforce", "gae"]


def reward_advantages(
    rewards: Sequence[Sequence[float]], estimator: AdvantageEstimator, *, scale: bool = True
) -> list[list[float]]:
    """One advantage per rollout, constant over its tokens.

    Args:
        rewards: one inner sequence per group; groups may differ in size.
        estimator: ``grpo`` centres by the group mean and, with ``scale``, divides by the group's population standard
            deviation plus 1e-6 (Shao et al. 2024, eq. 3); ``reinforce`` centres by the mean of the whole batch; ``gae`` leaves
            them as they are, for ``value.Valued``.
        scale: the division of ``grpo``; ``reinforce`` ignores it.

    Returns:
        Advantages in the shape of ``rewards``.
    """
    if estimator == "gae":
        return [list(group) for group in rewards]
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
    """Advantage by rollout id: 0 without a reward (NaN with ``gae``, where 0 is a reward like others). A rollout that failed, of which no reward worked, or of which one failed
    that worked for others of its group, says nothing about those: it has 0 too, and does not count in its group's mean. A
    reward that failed for all of a group is 0 for all, which is no difference between them."""
    judged = [_comparable(group, rewards) for group in groups]
    values = reward_advantages(
        [[rewards[key].total for key in group] for group in judged], estimator, scale=scale
    )
    none = math.nan if estimator == "gae" else 0.0
    advantages = {rollout.id: none for group in groups for rollout in group.rollouts}
    for keys, found in zip(judged, values, strict=True):
        advantages |= zip(keys, found, strict=True)
    return advantages


def without_signal(
    groups: Sequence[RolloutGroup], advantages: Mapping[str, float]
) -> frozenset[str]:
    """Ids of the rollouts in groups that have no advantage other than 0: those whose rewards are all equal (DAPO, Yu et al. 2025,
    section 3.2, samples others in their place; here the step is the smaller)."""
    return frozenset(
        rollout.id
        for group in groups
        if not any(advantages[rollout.id] for rollout in group.rollouts)
        for rollout in group.rollouts
    )


def _comparable(group: RolloutGroup, rewards: Mapping[str, RewardResult]) -> list[str]:
    """Ids of the rollouts of a group to which the same rewards gave a number."""
    ids = [r.id for r in group.rollouts if r.status != "failed" and r.id in rewards]
    ids = [key for key in ids if rewards[key].worked]
    failed_for_all = set.intersection(*(set(rewards[key].errors) for key in ids)) if ids else set()
    return [key for key in ids if rewards[key].errors.keys() <= failed_for_all]


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
