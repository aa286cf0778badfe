"""Rotary embeddings whose frequencies depend on the length of the batch: one regime for the whole run.

``longrope`` (Phi-3, Phi-4-mini) takes its long factors as soon as one row of a batch is longer than the original window,
``dynamic`` stretches with the longest row: the scores of a sample would depend on who shares its batch, and a sampler that
grows past the switch disagrees with the trainer. The run's window decides instead, for every sequence alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def fix_rope(model: nn.Module, window: int) -> None:
    """Give every rotary embedding of ``model`` the frequencies of a sequence of ``window`` tokens, for good."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _follows_length(kinds):
            _fix(module, kinds, window, layer_type=None)
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            for layer_type, kind in kinds.items():
                if _follows_length(kind):
                    _fix(module, kind, window, layer_type=layer_type)
            module.rope_type = {  # type: ignore[assignment]
                name: "default" if _follows_length(kind) else kind for name, kind in kinds.items()
            }


def _fix(module: Any, kind: str, window: int, *, layer_type: str | None) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(module, f"{prefix}inv_freq")
    named = {} if layer_type is None else {"layer_type": layer_type}
    found, scaling = ROPE_INIT_FUNCTIONS[kind](
        module.config, inv_freq.device, seq_len=window, **named
    )
    module.register_buffer(f"{prefix}inv_freq", found, persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)
    parameters = module.config.rope_parameters
    if "long_mscale" in parameters:  # PhiMoE scales by one of two, and looks at the length again
        original = parameters["original_max_position_embeddings"]
        scale = parameters["long_mscale" if window > original else "short_mscale"]
        parameters.update(long_mscale=scale, short_mscale=scale)


def _follows_length(kind: object) -> bool:
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


def rope_switch(local_dir: Path) -> int | None:
    """The length beyond which a longrope model takes its long factors; None for all other models."""
    try:
        config = json.loads((local_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    length = rope.get("original_max_position_embeddings") or text.get(
        "original_max_position_embeddings"
    )
    return length if isinstance(length, int) else None
