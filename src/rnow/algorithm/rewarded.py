"""Reward advantages beside a direct loss: a policy-gradient term of its own, which no KL enters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.objective import Summary
from rnow.algorithm.surrogate import LossName, TokenLosses, token_losses

SUMMARIES = {
    "advantage/mean": Summary(stream="advantages"),
    "advantage/std": Summary(stream="advantages", reduction="std"),
    "ratio/mean": Summary(stream="ratio"),
    "ratio/max": Summary(stream="ratio", reduction="max", over_updates="largest"),
    "clip_fraction": Summary(stream="clipped", over_updates="largest"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTerm:
    """The rewards' part of a loss; see ``token_losses``. Off while ``reward_coef`` is 0."""

    reward_coef: float = 0.0
    loss_fn: LossName = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    ratio_cap: float = 10.0

    def describe(self) -> str:
        """What it adds to an objective's own description."""
        return f", and rewards by {self.loss_fn}" if self.reward_coef else ""

    def of(
        self, logprobs: Tensor, sampler_logprobs: Tensor, reward_advantages: Tensor
    ) -> tuple[TokenLosses, Tensor, dict[str, Tensor]]:
        """Losses of r tokens, their derivative ``[r]`` with respect to the token's log-probability, and streams."""
        advantages = self.reward_coef * reward_advantages
        with torch.enable_grad():
            live = logprobs.detach().requires_grad_()
            found = token_losses(
                live,
                sampler_logprobs,
                advantages,
                loss_fn=self.loss_fn,
                clip_ratio_low=self.clip_ratio_low,
                clip_ratio_high=self.clip_ratio_high,
                ratio_cap=self.ratio_cap,
            )
            (slope,) = torch.autograd.grad(found.losses.sum(), live)
        streams = {"advantages": advantages, "ratio": found.ratio, "clipped": found.clipped}
        return found, slope, streams
