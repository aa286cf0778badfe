"""Attention as transformers' ``sdpa`` computes it, but for two things.

Grouped queries under a mask need no copy of keys and values for every query head: ``sdpa`` repeats them as soon as there is a
mask, as there is when prompts of different lengths are decoded together, and so copies whole caches at every token.

And scores that a model squashes (Gemma 2) are squashed: ``sdpa`` passes its softcap over without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

CPU_CAPPED_BYTES, GPU_CAPPED_BYTES = 2**24, 2**27
"""Of the scores of attention with a softcap, of which there are several copies at once: so many queries are taken at a time."""


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
    """What transformers' ``sdpa_attention_forward`` computes, with a softcap where there is one; grouped queries under a mask take
    another way.

    Args:
        query: ``[B, Hq, T, D]``; Hq is a multiple of Hk.
        key: ``[B, Hk, S, D]``.
        value: ``[B, Hk, S, E]``.
        attention_mask: ``[B or 1, Hq or 1, T, S]``, True (or 0) where a key is seen; None leaves it to ``is_causal``.
        options: those of ``sdpa_attention_forward``, and the ``softcap`` that it does not read.

    Returns:
        ``[B, T, Hq, E]``, and None where others give weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if (softcap := options.get("softcap")) is not None:
        causal = options.get("is_causal")
        output = capped_attention(
            query, key, value, attention_mask, softcap=softcap, dropout=dropout, scaling=scaling,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None
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


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    dropout: float = 0.0,
    scaling: float | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention by ``softmax(softcap * tanh(scores / softcap))``, which no kernel of torch computes; ``[B, Hq, T, E]``.

    The scores are there for a part of the queries at a time, and once more in the backward pass.

    Other arguments as in ``grouped_attention``; ``causal``: without a mask, a query sees no key that comes after it.
    """
    rows, heads, queries, width = query.shape
    keys = key.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    if mask is None and causal and queries > 1:
        everything = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = everything.tril(keys - queries)[None, None]
    room = GPU_CAPPED_BYTES if query.is_cuda else CPU_CAPPED_BYTES
    step = max(1, room // (4 * rows * heads * keys))
    found = []
    for part in map(slice, range(0, queries, step), range(step, queries + step, step)):
        seen = None if mask is None else mask[:, :, part]
        given = (query[:, :, part], key, value, seen, softcap, scale, dropout)
        if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
            kept = checkpoint(
                _capped, *given, use_reentrant=False, preserve_rng_state=dropout > 0.0
            )
            found.append(kept)
        else:
            found.append(_capped(*given))
    return torch.cat(found, dim=2)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float,
    scale: float,
    dropout: float,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    products = query.unflatten(1, (-1, groups)).flatten(2, 3) @ key.transpose(2, 3)
    wide = products.to(torch.promote_types(products.dtype, torch.float32))
    scores = torch.tanh(wide * (scale / softcap)).mul(softcap).unflatten(2, (groups, -1))
    if mask is not None:
        own = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (-1, groups))
        # Not infinity: a query that sees nothing, such as padding, must not become NaN for others to read.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~own, lowest) if own.dtype == torch.bool else scores + own
    weights = torch.softmax(scores, dim=-1).to(value.dtype).flatten(2, 3)
    if dropout > 0.0:
        weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).unflatten(2, (groups, -1)).flatten(1, 2)
