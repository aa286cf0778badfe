"""Attention of grouped queries under a mask, without a copy of keys and values for every query head.

transformers' ``sdpa`` repeats keys and values for each query head as soon as there is a mask, as there is when prompts of
different lengths are decoded together: at every token, whole caches are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def register_grouped_attention() -> None:
    """Put ``grouped_attention`` in the place of transformers' ``sdpa``, for every model of this process.

    Under that name, because families compare the name itself to choose how they build masks.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", grouped_attention)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``sdpa_attention_forward`` computes; only grouped queries under a mask take another way.

    Args:
        query: ``[B, Hq, T, D]``; Hq is a multiple of Hk.
        key: ``[B, Hk, S, D]``.
        value: ``[B, Hk, S, E]``.
        attention_mask: ``[B or 1, Hq or 1, T, S]``, True (or 0) where a key is seen; None leaves it to ``is_causal``.
        options: those of ``sdpa_attention_forward``.

    Returns:
        ``[B, T, Hq, E]``, and None where others give weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = options.get("position_bias") is None and options.get("cache") is None
    if attention_mask is None or query.shape[1] == key.shape[1] or not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    if query.device.type == "cpu":
        # torch's kernel for the CPU reads a group's keys once, forward and backward; the others do so only without a mask.
        output = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
        )
    elif _folds(query, key, value, attention_mask):
        output = fold_heads(query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    else:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    return output.transpose(1, 2).contiguous(), None


def _folds(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Whether folding copies less than repeating: nothing for one query, else the mask once per query head of a group."""
    if query.shape[2] == 1:
        return True
    groups = query.shape[1] // key.shape[1]
    # Kernels turn a mask of booleans into one of the queries' type.
    copied = mask.shape[0] * groups * mask.shape[2] * mask.shape[3] * query.element_size()
    return copied <= groups * (key.nbytes + value.nbytes)


def fold_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> Tensor:
    """Attention in which the query heads of a group are further queries of their one key head; ``[B, Hq, T, E]``.

    Arguments as in ``grouped_attention``.
    """
    rows, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(rows, key.shape[1], groups * queries, width)
    if mask.shape[1] == 1:
        mask = mask.expand(-1, groups, -1, -1)
    mask = mask.reshape(mask.shape[0], -1, groups * queries, mask.shape[3])
    output = scaled_dot_product_attention(folded, key, value, mask, dropout, scale=scaling)
    return output.reshape(rows, heads, queries, value.shape[3])
