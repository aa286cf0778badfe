"""The likeliest tokens of each row, in chunks: no [tokens, vocabulary] tensor exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.head import Head, Picked, TiledSoftmax, Tiling, tiling_for

_GROUP = 32


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
    tiling: Tiling | None = None,
) -> TopLogprobs:
    """The ``k`` largest entries of log softmax(logits / temperature) and those at ``targets``: one head GEMM, no gradient.

    Args:
        hidden: ``[R, H]`` final hidden states (after the last norm).
        head: the frozen head.
        targets: int64 ``[R]``, below ``head.vocabulary``.
        tiling: chosen from the device when None.

    Raises:
        ValueError: ``k`` is not between 1 and the vocabulary.
    """
    if not 1 <= k <= head.vocabulary:
        raise ValueError(f"top_k {k} is not between 1 and the {head.vocabulary} ids of the head")
    tiling = tiling or tiling_for(head, kept=True)
    selected, ids, logprobs = [], [], []
    held = hidden.new_empty(0, head.vocabulary, dtype=head.dtype)
    for at in tiling.chunks(hidden.shape[0]):
        part = hidden[at]
        if len(part) != len(held):
            held = held.new_empty(len(part), head.vocabulary)
        softmax, picked = TiledSoftmax(), Picked(targets[at, None], head.dtype)
        for columns in tiling.columns(head.vocabulary):
            logits = head.tempered(part, columns, temperature)
            picked.look(columns, logits)
            softmax.tile(logits)
            held[:, columns] = logits
        best_logits, best_ids = _top(held, k)
        normaliser = softmax.normaliser[:, None]
        selected.append((picked.values - normaliser).to(head.dtype)[:, 0])
        ids.append(best_ids)
        logprobs.append((best_logits - normaliser).to(head.dtype))
    return TopLogprobs(
        selected=torch.cat(selected), ids=torch.cat(ids), logprobs=torch.cat(logprobs)
    )


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row ``[r, n]`` and their places, best first: those of the groups with the k largest maxima,
    since no other group can hold one of them. A search through the whole row costs many times more than the maxima."""
    rows, width = values.shape
    groups = width // _GROUP
    if groups <= k:
        found = values.topk(k, dim=-1)
        return found.values, found.indices
    # A group is every so-many-th column: maxima of neighbours would not be taken by vector instructions.
    grouped = values[:, : groups * _GROUP].view(rows, _GROUP, groups)
    _, best = _top(grouped.amax(1), k)
    steps = torch.arange(0, groups * _GROUP, groups, device=values.device)
    rest = torch.arange(groups * _GROUP, width, device=values.device)
    places = torch.cat([(best[:, None, :] + steps[:, None]).flatten(1), rest.expand(rows, -1)], 1)
    found = values.gather(1, places).topk(k, dim=-1)
    return found.values, places.gather(1, found.indices)
