"""Gradients through a float16 base, which holds nothing between 6e-8 and 0.

One token's share of a mean over 16,384 tokens is less than that: its gradient comes back as noise or zero. So what goes
backward is the plain sum times a power of two, chosen by the largest loss of the micro-batch, and both the power and N are
divided out of the adapter's gradients, which are float32. The power depends on the micro-batch alone: a run that is
continued takes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rnow.algorithm.objective import Terms

TOP_EXPONENT = 4
"""The largest loss of a micro-batch is brought to about 2 to this power: float16 then has twelve more to grow into on the way
back, and twenty-eight to shrink."""
LARGEST_EXPONENT = 100
BACK_OFF = 4
TRIES = 6


def add_gradients(
    compute: Callable[[], Terms], parameters: Sequence[nn.Parameter], num_loss_tokens: int
) -> Terms:
    """Add the gradient of one micro-batch's mean loss to ``.grad``. Where it overflows, the same again with a smaller power;
    what overflows at the last try stays non-finite, and the update is skipped as any other that is.

    Args:
        compute: the forward pass; called once per try.
    """
    terms = compute()
    exponent = _exponent(terms.losses)
    gradients = _gradients(terms, parameters, exponent)
    for _ in range(TRIES - 1):
        if _all_finite(gradients) or not torch.isfinite(terms.losses).all():
            break
        exponent -= BACK_OFF
        terms = compute()
        gradients = _gradients(terms, parameters, exponent)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            share = gradient.float() / 2.0**exponent / num_loss_tokens
            parameter.grad = share if parameter.grad is None else parameter.grad + share
    return terms


def _exponent(losses: Tensor) -> int:
    largest = losses.detach().abs().max().item()
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    return min(TOP_EXPONENT - math.frexp(largest)[1], LARGEST_EXPONENT)


def _gradients(
    terms: Terms, parameters: Sequence[nn.Parameter], exponent: int
) -> Sequence[Tensor | None]:
    total = terms.losses.sum() * 2.0**exponent
    return torch.autograd.grad(total, parameters, allow_unused=True)


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
