"""The teacher's word in the advantage: ``A_t = reward_coef * A_reward - kl_penalty_coef * KL_t``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.divergence import k1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapedAdvantages:
    """``advantages`` ``[R]`` without gradient; ``teacher_kl`` ``[R]`` before the clamp, or None without a teacher;
    ``clamped`` ``[R]`` bool, where the clamp bit."""

    advantages: Tensor
    teacher_kl: Tensor | None
    clamped: Tensor


def shape_advantages(
    reward_advantages: Tensor,
    logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    *,
    kl_penalty_coef: float,
    reward_coef: float,
    kl_clamp: float,
) -> ShapedAdvantages:
    """Advantages of R loss tokens, detached.

    The student's logprobs are the trainer's own at the time of the update: they are there anyway, carry no sampler
    error, and stay fresh when one batch is used for several updates. The KL term is neither centred nor divided by a
    standard deviation: that would blow up noise as the KL falls.
    """
    advantages = reward_coef * reward_advantages
    if teacher_logprobs is None:
        return ShapedAdvantages(
            advantages=advantages,
            teacher_kl=None,
            clamped=torch.zeros_like(advantages, dtype=torch.bool),
        )
    teacher_kl = k1(logprobs.detach(), teacher_logprobs)
    bounded = teacher_kl.clamp(-kl_clamp, kl_clamp)
    return ShapedAdvantages(
        advantages=advantages - kl_penalty_coef * bounded,
        teacher_kl=teacher_kl,
        clamped=teacher_kl.abs() > kl_clamp,
    )
