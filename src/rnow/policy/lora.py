"""Putting a LoRA adapter on a frozen base."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnow.errors import ModelError
from rnow.models.loading import CausalLM


def attach_lora(lm: CausalLM, *, rank: int, alpha: int, seed: int, base_name: str) -> Any:
    """Wrap ``lm.model`` with PEFT LoRA on every linear layer except the head; dropout 0, weights in float32.

    ``lm.body`` and ``lm.head`` stay valid: PEFT swaps the linear layers in place. The adapter starts as the identity
    (B = 0); A is drawn from ``seed`` without touching the global random state.

    Args:
        base_name: what the adapter's config names as its base: the path the user gave.

    Raises:
        ModelError: no linear layer was found.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(
        devices=[]
    ):  # drawn on the CPU; torch warns where it copies the state of several cards
        torch.manual_seed(seed)
        model = get_peft_model(lm.model, config)
    model.peft_config["default"].base_model_name_or_path = base_name
    trainable = dict(trainable_parameters(model))
    if not trainable:
        raise ModelError("the student has no linear layer to adapt")
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    _switch_off_dropout(model)
    model.eval()
    return model


def _switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of the base to 0. Gradient checkpointing works in training mode only, where a base with, say,
    ``attention_dropout`` 0.1 would otherwise be scored by one distribution and trained by another."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapter, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
