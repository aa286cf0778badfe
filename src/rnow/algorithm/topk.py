"""The likeliest tokens of each row, in chunks: no [tokens, vocabulary] tensor exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnow.algorithm.head import Head, Picked, TiledSoftmax, Tiling, tiling_for

_GROUP, _COARSE = 8, 32
"""Columns of a group: in a tile, where each costs a row of the head once more, and among maxima, where none does."""


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
    tiling = tiling or tiling_for(head)
    selected, ids, logprobs = [], [], []
    for at in tiling.chunks(hidden.shape[0]):
        part = hidden[at]
        softmax, picked = TiledSoftmax(), Picked(targets[at, None], head.dtype)
        likeliest = _Likeliest(k)
        for columns in tiling.columns(head.vocabulary):
            logits = head.tempered(part, columns, temperature)
            picked.look(columns, logits)
            softmax.tile(logits)
            likeliest.look(columns, logits)
        normaliser = softmax.normaliser[:, None]
        best, values = likeliest.found(part, head, temperature)
        selected.append((picked.values - normaliser).to(head.dtype)[:, 0])
        ids.append(best)
        logprobs.append((values - normaliser).to(head.dtype))
    return TopLogprobs(
        selected=torch.cat(selected), ids=torch.cat(ids), logprobs=torch.cat(logprobs)
    )


class _Likeliest:
    """The ``k`` largest logits of each row, out of tiles that are not kept. Of each the maxima of groups of columns are: the k
    largest logits are in the k groups with the largest maxima, whose few logits are computed once more."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._maxima: list[Tensor] = []
        # int64 [groups, 3] of each tile: first column, stride, where the tile ends.
        self._groups: list[Tensor] = []

    def look(self, columns: slice, logits: Tensor) -> None:
        """A tile ``[r, w]``."""
        rest = -logits.shape[1] % _GROUP
        padded = torch.nn.functional.pad(logits, (0, rest), value=float("-inf")) if rest else logits
        groups = padded.shape[1] // _GROUP
        # A group is every so-many-th column: maxima of neighbours would not be taken by vector instructions.
        self._maxima.append(padded.view(-1, _GROUP, groups).amax(1))
        first = torch.arange(columns.start, columns.start + groups, device=logits.device)
        stride, end = (torch.full_like(first, number) for number in (groups, columns.stop))
        self._groups.append(torch.stack([first, stride, end], 1))

    def found(self, hidden: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        """Their ids int64 ``[r, k]`` and tempered logits, best first."""
        maxima = torch.cat(self._maxima, 1)
        best = _top(maxima, min(self._k, maxima.shape[1]))
        first, stride, end = torch.cat(self._groups)[best].unbind(-1)
        steps = torch.arange(_GROUP, device=hidden.device)
        ids = first[:, :, None] + stride[:, :, None] * steps
        beyond = (ids >= end[:, :, None]).flatten(1)
        ids = ids.flatten(1).clamp_(max=head.vocabulary - 1)
        logits = head.tempered_at(hidden, ids, temperature).masked_fill_(beyond, float("-inf"))
        found = logits.topk(self._k, dim=-1)
        return ids.gather(1, found.indices), found.values


def _top(values: Tensor, k: int) -> Tensor:
    """Where the ``k`` largest of each row ``[r, n]`` are, best first: those of the groups with the k largest maxima. A search through the
    whole row costs many times more than the maxima."""
    rows, width = values.shape
    groups = width // _COARSE
    if groups <= k:
        return values.topk(k, dim=-1).indices
    best = _top(values[:, : groups * _COARSE].view(rows, _COARSE, groups).amax(1), k)
    steps = torch.arange(0, groups * _COARSE, groups, device=values.device)
    rest = torch.arange(groups * _COARSE, width, device=values.device)
    places = torch.cat([(best[:, None, :] + steps[:, None]).flatten(1), rest.expand(rows, -1)], 1)
    return places.gather(1, values.gather(1, places).topk(k, dim=-1).indices)
