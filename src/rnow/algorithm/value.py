"""``adv_estimator: gae``: rewards become an advantage per token, against what a value head expects.

With V_t the value of the state before token t, r the rollout's reward, given at its last token, and no discount,

    delta_t = V_(t+1) - V_t, at the last token r - V_t
    A_t     = sum over s >= t of lambda^(s-t) delta_s
    loss    = (V_t - R_t)^2 / 2, with R_t = A_t + V_t without gradient

(Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation", eq. 16.) The value head reads
the student's last hidden states and gives them no gradient: it does not train the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rnow.algorithm.head import Head
from rnow.algorithm.objective import Objective, Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds
from rnow.algorithm.surrogate import discounted_sum

SUMMARIES: Mapping[str, Summary] = {
    "value/mean": Summary(stream="value"),
    "value/loss": Summary(stream="value_losses"),
}


class ValueHead(nn.Module):
    """A linear map of hidden states to a number, in float32; 0 at first."""

    def __init__(self, hidden: int, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[R, H]`` -> ``[R]``."""
        return hidden.detach().to(self.weight.dtype) @ self.weight + self.bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """Another objective, whose reward advantages come from a value head that learns beside it.

    Attributes:
        gae_lambda: lambda; 1 is the reward minus the value, 0 looks one token ahead.
    """

    objective: Objective
    head: ValueHead
    gae_lambda: float = 0.95

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return self.objective.needs

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return {**self.objective.summaries, **SUMMARIES}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See ``Objective.parameters``."""
        return {f"value_head.{name}": p for name, p in self.head.named_parameters()}

    def describe(self) -> str:
        """See ``Objective.describe``."""
        return f"{self.objective.describe()}, gae with lambda {self.gae_lambda:g}"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``. ``micro.reward_advantages`` are the rollouts' rewards themselves, at each of their tokens; NaN
        where there is none, and nothing is learned from it."""
        values = self.head(hidden)
        rewarded = ~micro.reward_advantages.isnan()
        advantages = torch.cat(
            [
                gae(own, rewards, self.gae_lambda)
                for own, rewards in zip(
                    values.detach().split([*micro.tokens.counts]),
                    micro.reward_advantages.split([*micro.tokens.counts]),
                    strict=True,
                )
            ]
        )
        advantages = torch.where(rewarded, advantages, 0.0)
        value_losses = 0.5 * (values - (advantages + values.detach())) ** 2
        judged = replace(micro, reward_advantages=advantages)
        found = self.objective.terms(hidden, head, judged)
        streams = {"value": values.detach(), "value_losses": value_losses.detach()}
        return Terms(losses=found.losses + value_losses, streams={**found.streams, **streams})


def gae(values: Tensor, rewards: Tensor, gae_lambda: float) -> Tensor:
    """``[L]``: the advantages of one rollout's tokens. ``rewards`` ``[L]``: its reward at each of them, counted at the last."""
    if not len(values):
        return values
    following = torch.cat([values[1:], rewards[-1:].to(values.dtype)])
    return discounted_sum(following - values, gae_lambda)
