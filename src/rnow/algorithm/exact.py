"""``kl_estimator: exact``: the divergence over the whole vocabulary, from the teacher's hidden states and its head.

With z the student's logits, p = softmax(z), q the teacher's distribution, a = log p - log q and m = (p + q) / 2, the loss of a
token and its derivative are

    reverse   sum p a = KL(p, q)                p (a - KL(p, q))
    forward   sum q (log q - log p)             p - q
    jsd       KL(p, m) / 2 + KL(q, m) / 2       p (log(p / m) - KL(p, m)) / 2

functions of the present weights: no ratio, no clip, no clamp, and right when a batch is used twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from rnow.algorithm.head import Head
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import MicroBatch, TeacherNeeds
from rnow.algorithm.rewarded import SUMMARIES as REWARD_SUMMARIES
from rnow.algorithm.rewarded import RewardTerm
from rnow.algorithm.row_losses import RowTerms, expect, row_losses, teacher_logprobs

DivergenceName = Literal["reverse", "forward", "jsd"]

SUMMARIES: Mapping[str, Summary] = {
    "loss": Summary(stream="losses"),
    "entropy": Summary(stream="entropy"),
    "sampler_trainer_kl": Summary(stream="sampler_trainer_kl"),
    "teacher_kl": Summary(stream="teacher_kl"),
    "teacher_kl/{dataset}": Summary(stream="teacher_kl", by_dataset=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDivergence:
    """The full-vocabulary divergence, ``kl_penalty_coef`` times, and rewards beside it.

    Attributes:
        heads: the teachers' heads by the role that ``MicroBatch.teacher`` names; may be filled later.
        temperature: of the sampling; both models' logits are divided by it.
    """

    heads: Mapping[str, Head]
    divergence: DivergenceName = "reverse"
    kl_penalty_coef: float = 1.0
    rewarded: RewardTerm = field(default_factory=RewardTerm)
    temperature: float = 1.0

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return TeacherNeeds(hidden=True)

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
        kind = "jsd" if self.divergence == "jsd" else f"{self.divergence} KL"
        return f"{kind} over the whole vocabulary{self.rewarded.describe()}"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``. ``teacher_kl`` is KL(student || teacher) whatever the divergence."""
        assert micro.teacher is not None, "exact without a teacher"
        rule = _Rule(objective=self, micro=micro, teacher_head=self.heads[micro.teacher])
        losses, streams = row_losses(
            hidden, head, rule, weight=self.kl_penalty_coef, temperature=self.temperature
        )
        live = streams["logprobs"]
        streams |= {
            "losses": losses.detach(),
            "sampler_trainer_kl": micro.sampler_logprobs - live,
        }
        return Terms(losses=losses, streams=streams)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    objective: ExactDivergence
    micro: MicroBatch
    teacher_head: Head

    def __call__(self, logprobs: Tensor, at: slice, *, gradient: bool) -> RowTerms:
        targets = self.micro.tokens.targets[at, None]
        hidden = self.micro.evidence["teacher_hidden"][at]
        teacher = teacher_logprobs(self.teacher_head, hidden, self.objective.temperature)
        teacher = teacher.to(logprobs.device)
        chosen = logprobs.gather(1, targets).flatten()
        streams = {"logprobs": chosen, "teacher_logprobs": teacher.gather(1, targets).flatten()}
        probabilities = logprobs.exp()
        streams["entropy"] = expect(probabilities, logprobs).neg_()
        losses, towards, kl = _DIVERGENCES[self.objective.divergence](
            logprobs, teacher, probabilities
        )
        streams["teacher_kl"] = kl
        if self.objective.rewarded.reward_coef:
            found, slope, more = self.objective.rewarded.of(
                chosen, self.micro.sampler_logprobs[at], self.micro.reward_advantages[at]
            )
            weight = self.objective.kl_penalty_coef
            losses = losses + found.losses.detach() / weight
            slope = (slope / weight)[:, None]
            towards.sub_(slope * probabilities).scatter_add_(1, targets, slope)
            streams |= more
        return RowTerms(losses=losses, gradient=towards if gradient else None, streams=streams)


def _reverse(logprobs: Tensor, teacher: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gap = teacher.neg_().add_(logprobs)
    kl = expect(p, gap)
    return kl, gap.sub_(kl[:, None]).mul_(p), kl


def _forward(logprobs: Tensor, teacher: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = teacher.exp()
    gap = teacher.sub_(logprobs)
    losses, kl = expect(q, gap), expect(p, gap).neg_()
    return losses, torch.sub(p, q, out=q), kl


def _jsd(logprobs: Tensor, teacher: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kl = expect(p, logprobs) - expect(p, teacher)
    middle = torch.logaddexp(logprobs, teacher).sub_(math.log(2.0))
    of_teacher = expect(teacher.exp(), teacher.sub_(middle))
    gap = torch.sub(logprobs, middle, out=middle)
    of_student = expect(p, gap)
    towards = gap.sub_(of_student[:, None]).mul_(p).mul_(0.5)
    return 0.5 * (of_student + of_teacher), towards, kl


_DIVERGENCES = {"reverse": _reverse, "forward": _forward, "jsd": _jsd}
"""Log-probabilities of student and teacher ``[r, V]``, the student's probabilities -> losses ``[r]``, d loss / d logits
``[r, V]``, KL(student || teacher) ``[r]``. The teacher's tensor is used up."""
