"""Random batches of an objective that sees whole distributions, in float64: a head of each kind for student and teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tests.algorithm import reference
from torch import Tensor

from rnow.algorithm.head import Head
from rnow.algorithm.objective import Objective
from rnow.algorithm.records import MicroBatch, PaddedTokens

ROWS, HIDDEN, TEACHER_HIDDEN, PADDED, VOCABULARY = 9, 5, 7, 16, 13


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Both models' heads and the temperature."""

    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    temperature: float = 1.0


CASES = {
    "plain": Case(),
    "bias": Case(bias=True),
    "scale": Case(scale=0.25, teacher_scale=1.3),
    "softcap": Case(softcap=1.5, teacher_softcap=3.0),
    "hot": Case(temperature=1.7),
    "everything": Case(
        bias=True, scale=1.6, softcap=2.0, teacher_scale=0.7, teacher_softcap=4.0, temperature=0.7
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """Student and teacher over the same rows, as tensors and as a micro-batch.

    Attributes:
        weight, bias: the student's whole head; ids beyond ``VOCABULARY`` are padding.
        teacher_logits: ``[R, V]``, tempered.
    """

    case: Case
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_head: Head
    teacher_logits: Tensor
    micro: MicroBatch

    @property
    def head(self) -> Head:
        """The student's."""
        return Head(
            weight=self.weight[:VOCABULARY],
            bias=self.bias[:VOCABULARY] if self.case.bias else None,
            scale=self.case.scale,
            softcap=self.case.softcap,
        )

    def student_logits(self, hidden: Tensor) -> Tensor:
        """``[R, V]``, tempered, naively."""
        return reference.logits(
            hidden,
            self.weight,
            self.bias if self.case.bias else None,
            scale=self.case.scale,
            softcap=self.case.softcap,
            temperature=self.case.temperature,
            vocabulary=VOCABULARY,
        )

    def with_top_k(self, k: int) -> Both:
        """The same with the teacher's k likeliest tokens as evidence."""
        table = reference.log_softmax(self.teacher_logits)
        best = table.topk(k)
        chosen = table.gather(1, self.micro.tokens.targets[:, None]).flatten()
        evidence = {"ids": best.indices, "logprobs": best.values, "teacher_logprobs": chosen}
        return replace(self, micro=replace(self.micro, evidence=evidence, teacher=None))


def make(case: Case, seed: int = 0) -> Both:
    """Models that differ about as much as a student from its teacher does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = normal(ROWS, HIDDEN), normal(PADDED, HIDDEN), normal(PADDED)
    teacher_hidden, teacher_weight = normal(ROWS, TEACHER_HIDDEN), normal(PADDED, TEACHER_HIDDEN)
    teacher_logits = reference.logits(
        teacher_hidden,
        teacher_weight,
        None,
        scale=case.teacher_scale,
        softcap=case.teacher_softcap,
        temperature=case.temperature,
        vocabulary=VOCABULARY,
    )
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    tokens = PaddedTokens(
        token_ids=torch.zeros(2, ROWS, dtype=torch.long),
        rows=torch.arange(ROWS),
        targets=targets,
        sample_ids=("a/0#0", "b/0#0"),
        counts=(4, ROWS - 4),
    )
    micro = MicroBatch(
        tokens=tokens,
        sampler_logprobs=-2.0 + 0.5 * normal(ROWS),
        reward_advantages=normal(ROWS),
        evidence={"teacher_hidden": teacher_hidden},
        teacher="teacher",
    )
    head = Head(
        weight=teacher_weight[:VOCABULARY], scale=case.teacher_scale, softcap=case.teacher_softcap
    )
    return Both(
        case=case,
        hidden=hidden,
        weight=weight,
        bias=bias,
        teacher_hidden=teacher_hidden,
        teacher_head=head,
        teacher_logits=teacher_logits,
        micro=micro,
    )


def gradient_of(
    objective: Objective, both: Both, weights: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Losses, streams, and the gradient of their (weighted) sum to the hidden states ``[R, H]``."""
    hidden = both.hidden.clone().requires_grad_()
    terms = objective.terms(hidden, both.head, both.micro)
    total = terms.losses.sum() if weights is None else (weights * terms.losses).sum()
    (found,) = torch.autograd.grad(total, hidden)
    return terms.losses.detach(), dict(terms.streams), found
