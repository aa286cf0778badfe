"""Matrix products in the form that is fastest here: 16-bit ones that are not rounded to 16 bits, and float32 ones by oneDNN."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ONEDNN_WORK, STEADY_WORK = 2**29, 2**24
"""Multiplications of a product from which on oneDNN is asked. It sets every shape up once, in a millisecond, and keeps what it
made: only products of shapes that come again and again may be small."""
PACKED_NUMBERS = 2**18
"""Of a weight from which on it gains by being packed; of a smaller one the call itself is what costs."""
PACKED_ROWS = 16
"""Rows that a packed weight is laid out for; with other numbers of them the layout is as fast."""


def linear(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, steady: bool = False
) -> Tensor:
    """``rows @ weight.T + bias`` ``[..., N]`` from ``[..., K]`` and ``[N, K]``, outside autograd.

    A large product in float32 on a CPU is oneDNN's, 6 to 15 % faster there than that of the BLAS that torch takes.

    Args:
        steady: products of the very same shapes come again.
    """
    least = STEADY_WORK if steady else ONEDNN_WORK
    if rows.numel() * weight.shape[0] >= least and _is_onednns(rows, weight):
        return _onednn(rows, weight, bias)
    return torch.nn.functional.linear(rows, weight, bias)


def packed_linear(rows: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` with what ``pack`` made of the weight."""
    return _onednn(rows, packed, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether there is a packed form of it that pays: of a large one in float32 on a CPU, where torch has oneDNN."""
    return weight.numel() >= PACKED_NUMBERS and _is_onednns(weight, weight)


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight ``[N, K]`` laid out for products with few rows, which are twice as fast with it; opaque but for
    ``packed_linear``. Only where it ``can_pack``."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


def _is_onednns(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
        and _has_onednn()
    )


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """These operations are what torch's own compiler calls; no other interface leads to them. So they are tried once, with
    and without packing."""
    rows, weight, bias = (torch.linspace(-1, 1, n * 24).view(n, 24) for n in (3, 40, 1))
    wanted = torch.nn.functional.linear(rows, weight, bias.new_ones(40))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        found = [_onednn(rows, form, bias.new_ones(40)) for form in (weight, packed)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(torch.allclose(one, wanted, rtol=1e-5, atol=1e-5) for one in found)


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
