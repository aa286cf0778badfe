"""The sizes of a model from its config.json alone: built without weights, on torch's meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rnow.errors import ModelError
from rnow.models.refusal import one_line
from rnow.models.resolved import ResolvedModel

# What transformers raises for a configuration that it cannot build from, depending on what is odd in it.
_NOT_A_MODEL = (ValueError, KeyError, OSError, TypeError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        architecture: the transformers class.
        parameters: of the whole model; a head tied to the embeddings counts once.
        linear: (inputs, outputs) of every linear layer but the head: what LoRA adapts and quantization shrinks.
        layers: transformer blocks.
        hidden: width of the hidden state.
        kv_width: values of one token's keys in one layer (as many again for its values).
        vocabulary_rows: rows of the head, padding included.
    """

    architecture: str
    parameters: int
    linear: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    kv_width: int
    vocabulary_rows: int

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, biases left out."""
        return sum(inputs * outputs for inputs, outputs in self.linear)

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of an adapter: ``rank * (inputs + outputs)`` per linear layer."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linear)


def measure(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> ModelShape:
    """Build the model without weights and read off its sizes; takes well under a second.

    Raises:
        ModelError: the configuration is not one of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            str(resolved.local_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except _NOT_A_MODEL as error:
        raise ModelError(
            f"'{resolved.path}' is not a causal language model that transformers can build",
            why=one_line(error),
            fix="name a model whose config.json has an architecture ending in ForCausalLM",
        ) from error
    return shape_of(model)


def output_layer(model: Any) -> Any:
    """The head of a transformers causal LM. Raises ModelError when it has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no output embedding, so it is no causal language model"
        )
    return head


def shape_of(model: Any) -> ModelShape:
    """The sizes of a transformers causal LM, with or without its weights."""
    head = output_layer(model)
    linear = tuple(
        shape
        for module in model.modules()
        if module is not head and (shape := _linear_shape(module)) is not None
    )
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=linear,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv_width=heads * width,
        vocabulary_rows=head.weight.shape[0],
    )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of the layer kinds that PEFT's "all-linear" adapts."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):  # GPT-2's linear layer keeps its weight transposed
        return module.weight.shape[0], module.weight.shape[1]
    return None
