"""The score-function rule: each sampled token's advantage, shaped by the teacher, in a PPO or importance-sampling loss.

With x sampled from the student and d = log p_student(x) - log p_teacher(x), both k1 = d and k3 = exp(-d) - 1 + d average to
KL(student || teacher); the names are those of J. Schulman, "Approximating KL divergence" (2020). k1 shapes the advantage, k3
is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rnow.algorithm import chunks as by_chunk
from rnow.algorithm.chunks import Chunks
from rnow.algorithm.head import Head, selected_logprobs
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds

LOG_RATIO_LIMIT = 20.0
K3_EXPONENT_LIMIT = 20.0

LossName = Literal["ppo", "importance_sampling"]

SUMMARIES: Mapping[str, Summary] = {
    "loss": Summary(stream="losses"),
    "entropy": Summary(stream="entropy"),
    "advantage/mean": Summary(stream="advantages"),
    "advantage/std": Summary(stream="advantages", reduction="std"),
    "ratio/mean": Summary(stream="ratio"),
    "ratio/max": Summary(stream="ratio", reduction="max", over_updates="largest"),
    "clip_fraction": Summary(stream="clipped", over_updates="largest"),
    "sampler_trainer_kl": Summary(stream="sampler_trainer_kl"),
    "teacher_kl": Summary(stream="teacher_kl"),
    "teacher_kl/k3": Summary(stream="teacher_kl/k3"),
    "kl_clamp_fraction": Summary(stream="kl_clamped", over_updates="largest"),
    "teacher_kl/{dataset}": Summary(stream="teacher_kl", by_dataset=True),
    **by_chunk.SUMMARIES,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """``kl_estimator: sampled``, and rewards. Names and defaults as in the config's ``algorithm`` section; ``temperature`` is
    that of the sampling."""

    loss_fn: LossName = "ppo"
    kl_penalty_coef: float = 0.1
    reward_coef: float = 0.0
    kl_clamp: float = 20.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    ratio_cap: float = 10.0
    temperature: float = 1.0

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``: the log-probability of each sampled token is enough."""
        return TeacherNeeds()

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return SUMMARIES

    def describe(self) -> str:
        """See ``Objective.describe``."""
        return f"{self.loss_fn}, kl_penalty_coef {self.kl_penalty_coef:g}"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``."""
        selected = selected_logprobs(
            hidden, head, micro.tokens.targets, temperature=self.temperature
        )
        teacher, chunks = micro.evidence.get("teacher_logprobs"), Chunks.of(micro.evidence)
        shaped = shape_advantages(
            micro.reward_advantages,
            selected.logprobs,
            teacher,
            chunks=chunks,
            kl_penalty_coef=self.kl_penalty_coef,
            reward_coef=self.reward_coef,
            kl_clamp=self.kl_clamp,
        )
        found = token_losses(
            selected.logprobs,
            micro.sampler_logprobs,
            shaped.advantages,
            loss_fn=self.loss_fn,
            clip_ratio_low=self.clip_ratio_low,
            clip_ratio_high=self.clip_ratio_high,
            ratio_cap=self.ratio_cap,
        )
        live = selected.logprobs.detach()
        streams = {
            "logprobs": live,
            "losses": found.losses.detach(),
            "entropy": selected.entropy,
            "advantages": shaped.advantages,
            "ratio": found.ratio,
            "clipped": found.clipped,
            "sampler_trainer_kl": micro.sampler_logprobs - live,
        }
        if teacher is not None and shaped.teacher_kl is not None:
            streams["teacher_logprobs"] = teacher
            streams["teacher_kl"] = shaped.teacher_kl
            streams["kl_clamped"] = shaped.clamped
            if chunks is None:
                streams["teacher_kl/k3"] = k3(live, teacher)
            else:
                streams |= chunks.streams()
        return Terms(losses=found.losses, streams=streams)


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
    chunks: Chunks | None = None,
) -> ShapedAdvantages:
    """``A_t = reward_coef * A_reward - kl_penalty_coef * KL_t`` of R loss tokens, detached.

    With ``chunks``, KL_t is that of the token's whole chunk, and so is what the clamp bounds; the ``teacher_kl`` returned is
    the token's share, whose mean is the KL per token.

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
    teacher_kl = logprobs.detach() - teacher_logprobs
    credit = teacher_kl if chunks is None else chunks.credit(teacher_kl)
    bounded = credit.clamp(-kl_clamp, kl_clamp)
    return ShapedAdvantages(
        advantages=advantages - kl_penalty_coef * bounded,
        teacher_kl=teacher_kl,
        clamped=credit.abs() > kl_clamp,
    )


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
    raw_ratio = torch.exp((logprobs - sampler_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
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


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative, lower variance near 0. The exponent is clamped so one token cannot be inf:
    a figure to report, not a loss (beyond the clamp its gradient points away from the teacher)."""
    difference = teacher_logprobs - logprobs
    return torch.exp(difference.clamp(max=K3_EXPONENT_LIMIT)) - 1 - difference
