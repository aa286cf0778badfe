"""A KL whose unit is a chunk: several tokens that the teacher, with a tokenizer of its own, judges together.

For a chunk c of the student's tokens y with the log-probabilities log p, to which the teacher gives log q_c, the sample of the
KL is k_c = sum over y of log p - log q_c. In the score-function rule the whole k_c belongs to every token of the chunk: with
K = k_c, the gradient of E[K] is E[K sum_y grad log p(y)]. An equal share for each token is another gradient, and a biased one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.objective import Summary

SUMMARIES: Mapping[str, Summary] = {
    "chunks/coverage": Summary(stream="chunks/covered"),
    "chunks/one_to_one": Summary(stream="chunks/one_to_one"),
    "chunks/longest": Summary(stream="chunks/tokens", reduction="max"),
}
"""Shares of the loss tokens in a chunk, and in one that is a single token of both models; the most of the student's tokens in
one chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """Which of R loss tokens belong together.

    Attributes:
        index: int64 ``[R]``, number of the chunk, in order; tokens in no chunk have numbers too.
        teacher_tokens: int64 ``[R]``, as in ``ChunkEvidence``.
    """

    index: Tensor
    teacher_tokens: Tensor

    @classmethod
    def of(cls, evidence: Mapping[str, Tensor]) -> Chunks | None:
        """Of a micro-batch's evidence; None where the teacher judged token by token."""
        if "chunk_starts" not in evidence:
            return None
        index = evidence["chunk_starts"].long().cumsum(0) - 1
        return cls(index=index, teacher_tokens=evidence["teacher_tokens"])

    @property
    def covered(self) -> Tensor:
        """bool ``[R]``: whether the token is in a chunk."""
        return self.teacher_tokens > 0

    @property
    def sizes(self) -> Tensor:
        """int64 ``[R]``: how many tokens of the student's the token's chunk has; 0 of a token in no chunk."""
        return self._sum(self.covered.long())

    def credit(self, gaps: Tensor) -> Tensor:
        """``[R]``: at each token the sum of its chunk's ``gaps`` ``[R]``, in their number format; 0 at a token in no chunk."""
        # In float64 the order of the terms, which a GPU does not keep, leaves no trace.
        whole = self._sum(gaps.double()).to(gaps.dtype)
        return torch.where(self.covered, whole, torch.zeros_like(whole))

    def streams(self) -> dict[str, Tensor]:
        """What ``SUMMARIES`` sums up."""
        sizes = self.sizes
        return {
            "chunks/covered": self.covered,
            "chunks/one_to_one": (sizes == 1) & (self.teacher_tokens == 1),
            "chunks/tokens": sizes,
        }

    def _sum(self, values: Tensor) -> Tensor:
        count = int(self.index[-1]) + 1 if self.index.numel() else 0
        return values.new_zeros(count).index_add(0, self.index, values)[self.index]
