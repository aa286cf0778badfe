"""Which parts of a model compute their activations again in the backward pass, instead of keeping them."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

Recomputes = Literal["any number", "all or none", "none"]


def recomputing(model: nn.Module, layers: int | None) -> list[nn.Module]:
    """The modules to put in training mode, in which alone transformers checkpoints.

    Args:
        layers: how many, from the first on; the last ones' activations are needed first, so keeping those costs the least. None
            is all. Where not every layer checkpoints by itself it is all of them or, for 0, none.
    """
    marked = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if layers is None:
        return marked
    if layers == 0:
        return []
    blocks = _layers(model)
    kept = set(map(id, blocks[layers:]))
    return [module for module in marked if id(module) not in kept]


def what_recomputes(model: Any) -> Recomputes:
    """How many layers of a transformers causal LM, from the first on, can."""
    if not model.supports_gradient_checkpointing:
        return "none"
    return "any number" if _layers(model) else "all or none"


def _layers(model: Any) -> list[nn.Module]:
    """Its layers in their order, where each can be checkpointed by itself; else none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    return found if len(found) == model.config.get_text_config().num_hidden_layers else []
