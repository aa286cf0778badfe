"""The surrogate objective of a sampled token with an advantage: PPO or plain importance sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0

LossName = Literal["ppo", "importance_sampling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """``losses`` ``[R]`` with gradient; ``ratio`` ``[R]`` before the cap and ``clipped`` ``[R]`` bool, both detached."""

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


def token_losses(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    *,
    loss_fn: LossName,
    clip_ratio_low: float,
    clip_ratio_high: float,
    ratio_cap: float,
) -> TokenLosses:
    """Negative surrogate objective of R tokens.

    r = exp(clamp(log p_now - log p_sampler, -20, 20)), then capped at ``ratio_cap``: with a live KL term a negative
    advantage can meet a large ratio, and ``min`` alone leaves that unbounded. A capped token has no gradient.

    ``importance_sampling``: -r A.  ``ppo``: -min(r A, clip(r, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7).
    """
    raw_ratio = importance_ratio(logprobs, sampler_logprobs)
    ratio = raw_ratio.clamp(max=ratio_cap)
    unclipped = ratio * advantages
    if loss_fn == "importance_sampling":
        objective = unclipped
        clipped = (raw_ratio > ratio_cap).detach()
    else:
        bounded = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high) * advantages
        objective = torch.minimum(unclipped, bounded)
        clipped = ((bounded < unclipped) | (raw_ratio > ratio_cap)).detach()
    return TokenLosses(losses=-objective, ratio=raw_ratio.detach(), clipped=clipped)


def importance_ratio(logprobs: Tensor, sampler_logprobs: Tensor) -> Tensor:
    """exp(clamp(log p_now - log p_sampler, -20, 20)) of R tokens."""
    return torch.exp((logprobs - sampler_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def discounted_sum(values: Tensor, discount: float) -> Tensor:
    """``[L]``: at t the sum over s >= t of discount^(s-t) values_s, in log2(L) additions."""
    total, step = values, 1
    while step < len(values):
        following = torch.nn.functional.pad(total[step:], (0, step))
        total = total + discount**step * following
        step *= 2
    return total
