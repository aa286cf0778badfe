"""The score-function rule: each sampled token's advantage, shaped by the teacher, in a PPO or importance-sampling loss.

With x sampled from the student and d = log p_student(x) - log p_teacher(x), both k1 = d and k3 = exp(-d) - 1 + d average to
KL(student || teacher); the names are those of J. Schulman, "Approximating KL divergence" (2020). k1 shapes the advantage, k3
is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnow.algorithm.baseline import SUMMARIES as BASELINE_SUMMARIES
from rnow.algorithm.baseline import KlBaseline, OptimalBaseline
from rnow.algorithm.chunks import SUMMARIES as CHUNK_SUMMARIES
from rnow.algorithm.chunks import Chunks
from rnow.algorithm.head import Head, selected_logprobs
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds
from rnow.algorithm.surrogate import LossName, discounted_sum, token_losses

K3_EXPONENT_LIMIT = 20.0

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
    **CHUNK_SUMMARIES,
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
    kl_discount: float = 0.0
    baseline: KlBaseline | None = None

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``: without a baseline the log-probability of each sampled token is enough."""
        return TeacherNeeds() if self.baseline is None else self.baseline.needs

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return SUMMARIES if self.baseline is None else {**SUMMARIES, **BASELINE_SUMMARIES}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See ``Objective.parameters``."""
        return {}

    def describe(self) -> str:
        """See ``Objective.describe``."""
        parts = [self.loss_fn, f"kl_penalty_coef {self.kl_penalty_coef:g}"]
        parts += ["optimal baseline"] if self.baseline else []
        parts += [f"kl_discount {self.kl_discount:g}"] if self.kl_discount else []
        return ", ".join(parts)

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``."""
        baseline = None
        if self.baseline is not None and micro.evidence:
            baseline = OptimalBaseline(micro, self.baseline.heads, self.temperature)
        selected = selected_logprobs(
            hidden, head, micro.tokens.targets, temperature=self.temperature, look=baseline
        )
        teacher, chunks = micro.evidence.get("teacher_logprobs"), Chunks.of(micro.evidence)
        if baseline is not None:
            teacher = baseline.teacher_logprobs
        shaped = shape_advantages(
            micro.reward_advantages,
            selected.logprobs,
            teacher,
            chunks=chunks,
            kl_penalty_coef=self.kl_penalty_coef,
            reward_coef=self.reward_coef,
            kl_clamp=self.kl_clamp,
            baseline=None if baseline is None else baseline.values,
            kl_discount=self.kl_discount,
            counts=micro.tokens.counts,
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
        assert selected.entropy is not None
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
        if baseline is not None:
            streams["kl_baseline"] = baseline.values
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
    baseline: Tensor | None = None,
    kl_discount: float = 0.0,
    counts: Sequence[int] = (),
) -> ShapedAdvantages:
    """``A_t = reward_coef * A_reward - kl_penalty_coef * KL_t`` of R loss tokens, detached.

    With ``chunks``, KL_t is that of the token's whole chunk, and so is what the clamp bounds; the ``teacher_kl`` returned is
    the token's share, whose mean is the KL per token. With ``kl_discount`` g, KL_t is the sum over s >= t of g^(s-t) KL_s
    within its rollout, the ``counts`` of whose loss tokens make up the R. ``baseline`` ``[R]`` is subtracted from it.

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
    signal = credit.clamp(-kl_clamp, kl_clamp)
    if kl_discount:
        signal = torch.cat([discounted_sum(part, kl_discount) for part in signal.split([*counts])])
    if baseline is not None:
        signal = signal - baseline
    return ShapedAdvantages(
        advantages=advantages - kl_penalty_coef * signal,
        teacher_kl=teacher_kl,
        clamped=credit.abs() > kl_clamp,
    )


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative, lower variance near 0. The exponent is clamped so one token cannot be inf:
    a figure to report, not a loss (beyond the clamp its gradient points away from the teacher)."""
    difference = teacher_logprobs - logprobs
    return torch.exp(difference.clamp(max=K3_EXPONENT_LIMIT)) - 1 - difference
