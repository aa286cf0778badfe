"""How far an estimator's gradient is from another one, from R independent repeats of both: bias, direction and noise.

Every squared length here is a mean over pairs of different repeats, of which noise falls out (a U-statistic): the squared
length of a mean of R noisy vectors would be too large by their variance over R. Intervals are the jackknife's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NORMAL_95 = 1.96


def compare(gradient: Tensor, reference: Tensor, *, same: bool = False) -> dict[str, Any]:
    """Both ``[R, P]``, row r of both on the same answers. With g and f their expectations and d = gradient - reference:

        cosine   g f / (|g| |f|)
        bias     |g - f| / |f|; a square below 0, which is noise, keeps its sign: 0 is in the interval where no bias is seen
        noise    sqrt(mean |gradient - g|^2) / |f|: of one batch, which answers were drawn included
        own_noise  sqrt(mean |d - (g - f)|^2) / |f|: what is left when the reference sees the same answers

    each as ``[value, low, high]`` with a 95 % interval.
    """
    stacked = torch.cat([gradient, reference]).double()
    products, count = stacked @ stacked.T, len(gradient)
    squares = {"noise": _noise_square}
    if not same:
        squares |= {"bias": _bias_square, "own_noise": _own_noise_square}
    found = {
        name: [*map(_root, jackknife(products, count, square))] for name, square in squares.items()
    }
    return found if same else found | {"cosine": jackknife(products, count, _cosine)}


Statistic = Callable[[Tensor, Tensor, Tensor], float]
"""Of the inner products ``[R, R]`` gradient-gradient, gradient-reference and reference-reference."""


def jackknife(products: Tensor, count: int, statistic: Statistic) -> list[float]:
    """Value and 95 % interval of a statistic of R repeats, from leaving each of them out."""

    def of(kept: Tensor) -> float:
        rows, others = kept, kept + count
        return statistic(
            products[rows][:, rows], products[rows][:, others], products[others][:, others]
        )

    everything = torch.arange(count)
    value = of(everything)
    left = torch.tensor(
        [of(everything[everything != index]) for index in range(count)], dtype=torch.float64
    )
    error = math.sqrt((count - 1) / count * ((left - left.mean()) ** 2).sum().item())
    return [value, value - NORMAL_95 * error, value + NORMAL_95 * error]


def pairs(products: Tensor) -> float:
    """Mean over r != s: of the products of two kinds of vectors, the product of their expectations."""
    count = len(products)
    return (products.sum() - products.diagonal().sum()).item() / (count * (count - 1))


def _variance(products: Tensor) -> float:
    return products.diagonal().mean().item() - pairs(products)


def _root(square: float) -> float:
    return math.copysign(math.sqrt(abs(square)), square)


def _cosine(mine: Tensor, across: Tensor, theirs: Tensor) -> float:
    return pairs(across) / math.sqrt(max(pairs(mine), 1e-300) * max(pairs(theirs), 1e-300))


def _difference(mine: Tensor, across: Tensor, theirs: Tensor) -> Tensor:
    return mine - across - across.T + theirs


def _bias_square(mine: Tensor, across: Tensor, theirs: Tensor) -> float:
    return pairs(_difference(mine, across, theirs)) / pairs(theirs)


def _noise_square(mine: Tensor, across: Tensor, theirs: Tensor) -> float:
    return _variance(mine) / pairs(theirs)


def _own_noise_square(mine: Tensor, across: Tensor, theirs: Tensor) -> float:
    return _variance(_difference(mine, across, theirs)) / pairs(theirs)
