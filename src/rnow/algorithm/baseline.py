"""``kl_baseline: optimal``: the number that, subtracted from a token's sampled KL, leaves the least noise in its gradient.

The gradient of the sampled rule at the logits is (a_x - b) (e_x - p) with a = log p - log q. It is unbiased for every b that does
not depend on x, and its mean square is least at

    b* = sum_v w_v a_v / sum_v w_v,    w_v = p_v |e_v - p|^2 = p_v (1 - 2 p_v + sum p^2)

(the optimal baseline of the score function: Weaver and Tao, 2001), with sum_v w_v = 1 - sum p^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.bucket import bucketed
from rnow.algorithm.head import Head, Picked, TiledSoftmax, expect
from rnow.algorithm.objective import Summary
from rnow.algorithm.records import MicroBatch, TeacherNeeds

SUMMARIES: Mapping[str, Summary] = {"kl_baseline": Summary(stream="kl_baseline")}


@dataclass(frozen=True, slots=True, kw_only=True)
class KlBaseline:
    """What the baseline is made of: the hidden states of teachers with these ``heads``, by role, or with ``top_k`` the evidence of
    their likeliest tokens."""

    heads: Mapping[str, Head]
    top_k: int = 0

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return TeacherNeeds(top_k=self.top_k) if self.top_k else TeacherNeeds(hidden=True)


class OptimalBaseline:
    """Gathers b* of every row while the student's head works through them (``head.Look``).

    Exact where the evidence holds the teacher's hidden states. From its k likeliest tokens all others count as one whose a is
    that of the bucket (see ``bucket``).

    Args:
        heads: the teachers' heads by role.
        temperature: of the sampling.
    """

    def __init__(self, micro: MicroBatch, heads: Mapping[str, Head], temperature: float) -> None:
        self._micro = micro
        self._head = None if micro.teacher is None else heads[micro.teacher]
        self._temperature = temperature
        self._baselines: list[Tensor] = []
        self._teacher: list[Tensor] = []
        self._start()

    def _start(self) -> None:
        self._theirs = TiledSoftmax()
        self._squares: list[Tensor] = []
        self._gaps: list[Tensor] = []
        self._square_gaps: list[Tensor] = []
        self._picks: list[Picked] = []

    def tile(self, at: slice, columns: slice, logits: Tensor, probabilities: Tensor) -> None:
        """See ``Look.tile``."""
        squares = probabilities * probabilities
        self._squares.append(squares.sum(-1))
        evidence, targets = self._micro.evidence, self._micro.tokens.targets[at, None]
        if not columns.start:
            ids = targets if self._head is not None else evidence["ids"][at]
            self._picks = [Picked(ids, logits.dtype)]
        if self._head is None:
            self._picks[0].look(columns, logits)
            return
        hidden = evidence["teacher_hidden"][at].to(self._head.weight.device)
        theirs = self._head.tempered(hidden, columns, self._temperature).to(logits)
        self._theirs.tile(theirs)
        self._picks[0].look(columns, theirs)
        gaps = theirs.neg_().add_(logits)
        self._gaps.append(expect(probabilities, gaps))
        self._square_gaps.append(expect(squares, gaps))

    def done(self, at: slice, softmax: TiledSoftmax) -> None:
        """See ``Look.done``."""
        evidence, picked = self._micro.evidence, self._picks[0].values
        squares = softmax.expect(self._squares, power=2)
        if self._head is not None:
            theirs = self._theirs.normaliser
            teacher = picked[:, 0] - theirs
            offset = softmax.normaliser - theirs
            kl = softmax.expect(self._gaps) - offset
            square_kl = softmax.expect(self._square_gaps, power=2) - squares * offset
            weighted = (1 + squares) * kl - 2 * square_kl
        else:
            teacher = evidence["teacher_logprobs"][at]
            chosen = (picked - softmax.normaliser[:, None]).to(picked.dtype)
            both = bucketed(chosen, evidence["logprobs"][at].to(picked.dtype))
            kl = both.kl
            weights = both.p * (1 - 2 * both.p + squares[:, None])
            weighted = (weights * (both.gaps - both.c[:, None])).sum(-1) + (1 - squares) * both.c
        # Where one token has all the probability nothing is left to weigh, and the gradient is 0 whatever is subtracted.
        rest = 1 - squares
        certain = rest < 64 * torch.finfo(picked.dtype).eps
        found = torch.where(certain, kl, weighted / rest.masked_fill(certain, 1.0))
        self._baselines.append(found.to(picked.dtype))
        self._teacher.append(teacher.to(picked.dtype))
        self._start()

    @property
    def values(self) -> Tensor:
        """``[R]``: b* of every row that was looked at, nats."""
        return torch.cat(self._baselines)

    @property
    def teacher_logprobs(self) -> Tensor:
        """``[R]``: the teacher's log-probability of each sampled token."""
        return torch.cat(self._teacher)
