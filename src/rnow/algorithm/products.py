"""Products of 16-bit matrices that are not rounded to 16 bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of two matrices in at least float32.

    A card's GEMM adds up in float32 whatever it is given; where torch can hand that out, a bfloat16 head's logits keep the 16 bits
    that rounding would take, and no second pass makes them float32. Elsewhere the result is widened after the product.
    """
    if left.is_cuda and left.dtype.itemsize == 2 and _can_widen(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    product = left @ right
    return product.to(torch.promote_types(product.dtype, torch.float32))


@cache
def _can_widen(device: torch.device, dtype: torch.dtype) -> bool:
    square = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        return torch.mm(square, square, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # a torch, or a card, that cannot
        return False
