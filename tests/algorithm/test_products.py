"""Products that are widened (on a CPU after the product, on a card in it: tests/gpu/test_head.py), and those of oneDNN."""

from __future__ import annotations

import pytest
import torch

from rnow.algorithm import products
from rnow.algorithm.products import can_pack, linear, pack, packed_linear, wide_product


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


SHAPES = [(1, 5), (3, 0), (64,), (2, 3), (40, 7)]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_plain_one(
    shape: tuple[int, ...], bias: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ONEDNN_WORK", 0 if asked else 10**12)
    monkeypatch.setattr(products, "PACKED_NUMBERS", 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape, 24, generator=generator)
    weight = torch.randn(60, 24, generator=generator)[10:50]
    added = torch.randn(40, generator=generator) if bias else None
    wanted = torch.nn.functional.linear(
        rows.double(), weight.double(), None if added is None else added.double()
    )
    for one in (rows, rows.transpose(0, -2)):
        other = wanted if one is rows else wanted.transpose(0, -2)
        torch.testing.assert_close(linear(one, weight, added), other.float(), atol=1e-5, rtol=1e-5)
    turned = linear(rows, weight.t().contiguous().t(), added)
    torch.testing.assert_close(turned, wanted.float(), atol=1e-5, rtol=1e-5)
    if can_pack(weight):
        found = packed_linear(rows, pack(weight), added)
        torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)


def test_what_has_a_gradient_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_WORK", 0)
    rows, weight = torch.ones(3, 24, requires_grad=True), torch.ones(40, 24)
    linear(rows, weight).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.full((3, 24), 40.0))
    assert not can_pack(torch.ones(1024, 1024).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_formats_are_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN_WORK", 0)
    rows, weight = torch.ones(3, 24, dtype=dtype), torch.ones(40, 24, dtype=dtype)
    assert torch.equal(linear(rows, weight), torch.nn.functional.linear(rows, weight))
    assert not can_pack(torch.ones(1024, 1024, dtype=dtype))
