"""Products that are widened: on a CPU after the product, on a card in it (tests/gpu/test_head.py)."""

from __future__ import annotations

import pytest
import torch

from rnow.algorithm.products import wide_product


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 7, generator=generator).to(dtype)
    right = torch.randn(7, 3, generator=generator).to(dtype)
    found = wide_product(left, right)
    assert found.dtype == wide
    torch.testing.assert_close(found, (left @ right).to(wide), rtol=0, atol=0)
