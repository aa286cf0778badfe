"""The likeliest tokens of each row, in chunks: no [tokens, vocabulary] tensor exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.head import Head, chunk_rows_for


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprobs:
    """Log-probabilities of R rows, natural log, at least float32.

    Attributes:
        selected: ``[R]``, of the given targets.
        ids: int64 ``[R, k]``, the likeliest tokens, best first.
        logprobs: ``[R, k]``, theirs.
    """

    selected: Tensor
    ids: Tensor
    logprobs: Tensor


@torch.no_grad()
def top_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> TopLogprobs:
    """The ``k`` largest entries of log softmax(logits / temperature) and those at ``targets``: one head GEMM, no gradient.

    Args:
        hidden: ``[R, H]`` final hidden states (after the last norm).
        head: the frozen head.
        targets: int64 ``[R]``, below ``head.vocabulary``.
        chunk_rows: rows per chunk; chosen from the device when None.

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary.
    """
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"top_k {k} is not between 1 and the {head.vocabulary} ids of the head")
    rows = chunk_rows or chunk_rows_for(head)
    # One pass even without rows: the empty result then has its shapes and types from the same operations.
    starts = range(0, max(1, hidden.shape[0]), rows)
    chosen, ids, logprobs = [], [], []
    for start in starts:
        logits = head.logits(hidden[start : start + rows])
        if temperature != 1.0:
            logits = logits / temperature
        normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
        chosen.append(
            (logits.gather(1, targets[start : start + rows, None]) - normaliser).squeeze(1)
        )
        best = logits.topk(k, dim=-1)
        ids.append(best.indices)
        logprobs.append(best.values - normaliser)
    return TopLogprobs(selected=torch.cat(chosen), ids=torch.cat(ids), logprobs=torch.cat(logprobs))
