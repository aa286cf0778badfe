"""Linear layers of models that are loaded to be read: their products in the form that is fastest here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnow.algorithm.products import linear


class FrozenLinear(nn.Linear):
    """``nn.Linear`` whose products are ``products.linear``'s."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        return linear(input, self.weight, self.bias)


def is_linear(module: nn.Module) -> bool:
    """Whether calling it is one product with its weight and nothing else: no subclass, no hook that would bring or move the
    weight."""
    return (
        type(module) in (nn.Linear, FrozenLinear)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def freeze_linear(model: nn.Module) -> None:
    """Make every plain linear layer a ``FrozenLinear``. A class and not an attribute: a copy computes with its own weight."""
    for module in model.modules():
        if is_linear(module) and module.weight.dtype == torch.float32:
            module.__class__ = FrozenLinear
