"""Linear layers whose weights lie as products with few rows want them: those of sampling, which has a row for each answer."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rnow.algorithm.products import can_pack, pack, packed_linear
from rnow.models.linear import is_linear


class ReadsWeights(Exception):
    """A model reads the weight of a layer besides calling it."""


class PackedLinear(nn.Module):
    """In place of a linear layer, without gradients; ``hold`` gives it its weight."""

    def __init__(self, replaced: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = replaced.weight
        self.transposed = isinstance(replaced, Conv1D)
        self.in_features, self.out_features = (
            weight.shape if self.transposed else weight.shape[::-1]
        )
        self.bias = replaced.bias
        self._packed: Tensor | None = None

    def hold(self, weight: Tensor) -> None:
        """Keep a copy of ``weight``, of the shape that the replaced layer's had."""
        self._packed = pack(weight.T.contiguous() if self.transposed else weight)

    def let_go(self) -> None:
        """Keep nothing."""
        self._packed = None

    @property
    def weight(self) -> NoReturn:
        raise ReadsWeights

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        assert self._packed is not None, "hold first"
        return packed_linear(x, self._packed, self.bias)


def can_replace(module: nn.Module) -> bool:
    """Whether ``PackedLinear`` may stand for it."""
    plain = is_linear(module) or type(module) is Conv1D
    return plain and can_pack(module.weight.detach())  # type: ignore[operator, arg-type]
