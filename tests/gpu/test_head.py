"""The head on a GPU: 16-bit weights, logits that were never rounded to 16 bits."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.device import CUDA, needs_cuda

from rnow.algorithm.head import Head, selected_logprobs
from rnow.algorithm.products import wide_product

pytestmark = [pytest.mark.gpu, needs_cuda]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_keeps_what_16_bits_would_lose(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(48, 512, generator=generator).to(dtype)
    right = torch.randn(512, 1000, generator=generator).to(dtype)
    expected = left.double() @ right.double()
    found = wide_product(left.to(CUDA), right.to(CUDA))
    assert found.dtype == torch.float32
    rounded = (left.to(CUDA) @ right.to(CUDA)).double().cpu()
    error = (found.double().cpu() - expected).abs().max()
    assert error < (rounded - expected).abs().max() / 20


@pytest.mark.parametrize("bias", [False, True])
def test_log_probabilities_and_gradient_of_a_bfloat16_head(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).bfloat16()
    weight = torch.randn(3000, 64, generator=generator).bfloat16()
    added = torch.randn(3000, generator=generator).bfloat16() if bias else None
    targets = torch.randint(3000, (40,), generator=generator)
    logits = hidden.double() @ weight.double().T + (0 if added is None else added.double())
    exact = torch.log_softmax(logits, -1)
    ours = hidden.to(CUDA).requires_grad_()
    head = Head(weight=weight.to(CUDA), bias=None if added is None else added.to(CUDA))
    found = selected_logprobs(ours, head, targets.to(CUDA))
    found.logprobs.sum().backward()
    expected = exact.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double().cpu(), expected, rtol=0, atol=1e-4)
    entropy = -(exact.exp() * exact).sum(-1)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy.double().cpu(), entropy, rtol=0, atol=1e-4)
    gradient = weight.double()[targets] - exact.exp() @ weight.double()
    assert ours.grad is not None
    error = (ours.grad.double().cpu() - gradient).norm() / gradient.norm()
    assert error < 0.01, "rounded to bfloat16 once"
