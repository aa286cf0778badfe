"""The sizes of a model from its config.json alone: built without weights, on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rnow.errors import ModelError
from rnow.models.families import UNSAMPLED, UNSTREAMED, check_family
from rnow.models.parts import layer_parameters, linear_layers, output_layer, routes_tokens
from rnow.models.recompute import Recomputes, what_recomputes
from rnow.models.refusal import Refusal, one_line, read_json
from rnow.models.resolved import ResolvedModel
from rnow.models.sharing import why_separate


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        architecture: the transformers class.
        parameters: of the whole model; a head tied to the embeddings counts once.
        linear: (inputs, outputs) of every linear layer but the head: what LoRA adapts and quantization shrinks.
        layers: transformer blocks.
        hidden: width of the hidden state.
        kv_width: values of one token's keys in one layer (as many again for its values); the mean, where layers differ.
        vocabulary_rows: rows of the head, padding included.
        routed: a mixture of experts.
        sampled: the embedded sampler can answer with it.
        layered: parameters of the decoder layers that can be read one by one.
        largest_layer: of the largest of them.
        unstreamed: why they cannot; None where they can.
        query_width: values of one token's queries in one layer; the most, where layers differ.
        head_width: of one head of them.
        separate: why each sample has a row of its own when it scores or is trained; empty where samples share them.
        recomputes: which layers can compute their activations again in the backward pass.
    """

    architecture: str
    parameters: int
    linear: tuple[tuple[int, int], ...]
    layers: int
    hidden: int
    kv_width: int
    vocabulary_rows: int
    routed: bool = False
    sampled: bool = True
    layered: int = 0
    largest_layer: int = 0
    unstreamed: str | None = "it has no list of decoder layers"
    query_width: int = 0
    head_width: int = 0
    separate: str = ""
    recomputes: Recomputes = "any number"

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, biases left out."""
        return sum(inputs * outputs for inputs, outputs in self.linear)


def build_empty(
    resolved: ResolvedModel,
    *,
    key: str = "model.path",
    sampled: bool = False,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> Any:
    """The model without its weights; takes well under a second.

    Args:
        key: the setting that names it.
        sampled: the embedded sampler is to answer with it.
        attention: the attention kernel that it is to be built with; transformers' choice when None.

    Raises:
        ModelError: the configuration is not one of a causal language model, or is of a family that cannot be used, or
            cannot be built with that attention kernel.
    """
    from transformers import AutoConfig

    # Before transformers reads it: of some families it does not even make a config.
    family = read_json(
        resolved.local_dir / "config.json", Refusal(path=resolved.path, key=key)
    ).get("model_type")
    check_family(str(family), resolved.path, key=key, sampled=sampled)
    try:
        config = AutoConfig.from_pretrained(
            str(resolved.local_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
        model = _build(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the code of an architecture makes of a config
        raise ModelError(
            f"'{resolved.path}' is not a causal language model that transformers can build",
            why=one_line(error),
            fix="name a model whose config.json has an architecture ending in ForCausalLM",
        ) from error
    if attention is None:
        return model
    try:
        return _build(config, trust_remote_code=trust_remote_code, attn_implementation=attention)
    except (
        Exception
    ) as error:  # an unknown name, a package that is not there, a kernel that the family cannot use
        section = key.partition(".")[0]
        raise ModelError(
            f"'{resolved.path}' cannot be built with attn_implementation {attention!r}",
            where=f"{section}.attn_implementation",
            why=one_line(error),
            fix=f"remove {section}.attn_implementation (transformers chooses), or set it to sdpa or eager",
        ) from error


def _build(config: Any, **arguments: object) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **arguments)


def shape_of(model: Any) -> ModelShape:
    """The sizes of a transformers causal LM, with or without its weights."""
    config = model.config.get_text_config()
    widths = kv_widths(config)
    layers = [_parameters(layer.values()) for layer in layer_parameters(model)]
    return ModelShape(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear=tuple(_linear_shape(module) for _, module in linear_layers(model)),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        kv_width=-(-sum(widths) // len(widths)),
        vocabulary_rows=output_layer(model).weight.shape[0],
        routed=routes_tokens(model),
        sampled=config.model_type not in UNSAMPLED,
        layered=sum(layers),
        largest_layer=max(layers, default=0),
        unstreamed=UNSTREAMED.get(config.model_type)
        if layers
        else "it has no list of decoder layers",
        query_width=max(map(_query_width, _layer_configs(config)), default=0),
        head_width=max(map(_head_width, _layer_configs(config)), default=0),
        separate=why_separate(model.config) or "",
        recomputes=what_recomputes(model),
    )


def _parameters(of: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in {id(each): each for each in of}.values())


def kv_widths(config: Any) -> list[int]:
    """Values of one token's keys in each layer. Families whose layers differ keep a config for each; one that says
    nothing of heads (Mamba) has none."""
    return [_kv_width(layer) for layer in _layer_configs(config)]


def _layer_configs(config: Any) -> list[Any]:
    layers = range(config.num_hidden_layers)
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[layer] for layer in layers]
    return [config] * len(layers)


def _kv_width(config: Any) -> int:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int) or not queries:
        return 0
    heads = getattr(config, "num_key_value_heads", None)
    return _head_width(config) * (heads if isinstance(heads, int) else queries)


def _query_width(config: Any) -> int:
    head = _head_width(config)
    return head * config.num_attention_heads if head else 0


def _head_width(config: Any) -> int:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int) or not queries:
        return 0
    return getattr(config, "head_dim", None) or config.hidden_size // queries


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.get_parameter("weight")  # GPT-2's linear layer keeps it transposed
    return weight.shape[0], weight.shape[1]
