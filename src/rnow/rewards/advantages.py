"""From the rewards of a step to one advantage per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rnow.algorithm.advantages import reward_advantages
from rnow.rollout.samples import sample_id
from rnow.types import ScoredGroup


def rollout_advantages(
    scored: Sequence[ScoredGroup], estimator: Literal["grpo", "reinforce"], *, scale: bool
) -> dict[str, float]:
    """Advantage by sample id. Failed rollouts do not count in their group's mean; a rollout without rewards has 0."""
    judged = [
        [
            (sample_id(group.prompt, item.rollout), item.reward.total)
            for item in group.rollouts
            if item.reward is not None and item.rollout.status != "failed"
        ]
        for group in scored
    ]
    values = reward_advantages(
        [[total for _, total in group] for group in judged], estimator, scale=scale
    )
    advantages = {
        sample_id(group.prompt, item.rollout): 0.0 for group in scored for item in group.rollouts
    }
    for group, results in zip(judged, values, strict=True):
        advantages |= {key: value for (key, _), value in zip(group, results, strict=True)}
    return advantages
