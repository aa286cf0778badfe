"""``kl_estimator: topk``: the KL over the teacher's k likeliest tokens and one bucket for the rest, and what the bucket misses.

S the k ids, P and Q the probability that student and teacher give them together, a = log p - log q,
c = log((1 - P) / (1 - Q)) without gradient, x the sampled token, r its importance ratio:

    direct part   L   = sum_S p a + (1 - P) c                   its derivative: p (a - KL_k) in S, p (c - KL_k) outside
    residual      rho = r [x not in S] (a_x - c)                without gradient, times log p_x
    together      p (c - KL_k - rho) + sum_S e_v p_v (a_v - c) + e_x rho

The residual's expectation over x is exactly what the bucket lost, so the gradient is that of the full KL: one scaled p and
k + 1 entries. Any c without gradient keeps it so, as long as the same c stands in all three places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from rnow.algorithm.exact import SUMMARIES as DIRECT_SUMMARIES
from rnow.algorithm.head import Head, selected_logprobs
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds
from rnow.algorithm.rewarded import SUMMARIES as REWARD_SUMMARIES
from rnow.algorithm.rewarded import RewardTerm
from rnow.algorithm.surrogate import importance_ratio

SUMMARIES: Mapping[str, Summary] = {
    **DIRECT_SUMMARIES,
    "topk_outside_fraction": Summary(stream="outside"),
    "kl_clamp_fraction": Summary(stream="kl_clamped", over_updates="largest"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKDivergence:
    """The bucketed divergence, ``kl_penalty_coef`` times, and rewards beside it.

    Attributes:
        top_k: k.
        divergence: ``forward`` is the bucketed forward KL, a lower bound of the full one: its residual would need tokens that
            the teacher draws.
        kl_clamp: bound on the residual's rho, nats.
        ratio_cap: bound on r.
    """

    top_k: int = 20
    divergence: Literal["reverse", "forward"] = "reverse"
    kl_penalty_coef: float = 1.0
    kl_clamp: float = 20.0
    ratio_cap: float = 10.0
    rewarded: RewardTerm = field(default_factory=RewardTerm)
    temperature: float = 1.0

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return TeacherNeeds(top_k=self.top_k)

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return {**SUMMARIES, **(REWARD_SUMMARIES if self.rewarded.reward_coef else {})}

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See ``Objective.parameters``."""
        return {}

    def describe(self) -> str:
        """See ``Objective.describe``."""
        bound = ", a lower bound" if self.divergence == "forward" else ""
        return f"{self.divergence} KL over the teacher's {self.top_k} likeliest tokens{bound}{self.rewarded.describe()}"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``. ``teacher_kl`` is KL_k + [x not in S] (a_x - c): without bias for KL(student || teacher),
        whatever the divergence."""
        ids, targets = micro.evidence["ids"], micro.tokens.targets[:, None]
        selected = selected_logprobs(
            hidden, head, torch.cat([targets, ids], 1), temperature=self.temperature
        )
        assert selected.entropy is not None
        logprobs = selected.logprobs
        live, listed = logprobs[:, 0].detach(), logprobs[:, 1:].detach()
        teacher_x = micro.evidence["teacher_logprobs"].to(live.dtype)
        both = bucketed(listed, micro.evidence["logprobs"].to(live.dtype))
        outside = (ids != targets).all(-1)
        beyond = torch.where(outside, live - teacher_x - both.c, 0.0)
        if self.divergence == "reverse":
            ratio = importance_ratio(live, micro.sampler_logprobs).clamp(max=self.ratio_cap)
            sampled = ratio * beyond.clamp(-self.kl_clamp, self.kl_clamp)
            losses = both.kl + sampled * live
            slopes = both.p * (both.gaps - both.c[:, None])
        else:
            losses, slopes = _forward(both)
            sampled = torch.zeros_like(live)
        streams = {
            "logprobs": live,
            "teacher_logprobs": teacher_x,
            "teacher_kl": both.kl + beyond,
            "outside": outside,
            "entropy": selected.entropy,
            "kl_clamped": beyond.abs() > self.kl_clamp,
            "sampler_trainer_kl": micro.sampler_logprobs - live,
        }
        losses, sampled = self.kl_penalty_coef * losses, self.kl_penalty_coef * sampled
        if self.rewarded.reward_coef:
            found, slope, more = self.rewarded.of(
                live, micro.sampler_logprobs, micro.reward_advantages
            )
            losses, sampled = losses + found.losses.detach(), sampled + slope
            streams |= more
        streams["losses"] = losses
        slopes = torch.cat([sampled[:, None], self.kl_penalty_coef * slopes], 1)
        return Terms(losses=_with_slopes(losses, logprobs, slopes), streams=streams)


def _with_slopes(losses: Tensor, logprobs: Tensor, slopes: Tensor) -> Tensor:
    """``losses`` ``[R]`` whose derivative with respect to ``logprobs`` ``[R, m]`` is ``slopes``."""
    towards = (slopes * logprobs).sum(-1)
    return losses + (towards - towards.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucketed:
    """Student and teacher over k tokens and the rest, ``[r, k]`` and ``[r]``.

    Attributes:
        p, gaps: the student's probability of each of the k, and a.
        rest, teacher_rest: 1 - P and 1 - Q, floored a little above what the number format can tell from 0.
        c: log of their quotient.
        kl: KL_k.
    """

    p: Tensor
    gaps: Tensor
    rest: Tensor
    teacher_rest: Tensor
    c: Tensor
    kl: Tensor


def bucketed(chosen: Tensor, teacher: Tensor) -> Bucketed:
    """From the log-probabilities ``[r, k]`` that student and teacher give the k tokens."""
    floor = 8 * torch.finfo(chosen.dtype).eps
    p, gaps = chosen.exp(), chosen - teacher
    rest = (1.0 - p.sum(-1)).clamp_min(floor)
    teacher_rest = (1.0 - teacher.exp().sum(-1)).clamp_min(floor)
    c = (rest / teacher_rest).log()
    kl = (p * gaps).sum(-1) + rest * c
    return Bucketed(p=p, gaps=gaps, rest=rest, teacher_rest=teacher_rest, c=c, kl=kl)


def _forward(both: Bucketed) -> tuple[Tensor, Tensor]:
    """sum_S q (log q - log p) + (1 - Q) log((1 - Q) / (1 - P)), and its derivative: at the logits p - q in S and
    p (1 - (1 - Q) / (1 - P)) outside, which is that of the log-probabilities in S below."""
    q = both.p * (-both.gaps).exp()
    losses = -(q * both.gaps).sum(-1) - both.teacher_rest * both.c
    outside = 1.0 - both.teacher_rest / both.rest
    return losses, both.p - q - both.p * outside[:, None]
