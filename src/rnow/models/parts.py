"""The parts of a HuggingFace causal LM that everybody has to agree on: body, head, and the linear layers an adapter may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from rnow.errors import ModelError

MAMBA_KERNELS_READ = frozenset({"out_proj", "x_proj", "dt_proj"})
"""Layers of a Mamba mixer whose weights its kernels read themselves: what an adapter adds to them would be passed over."""


def output_layer(model: Any) -> Any:
    """The head of a transformers causal LM. Raises ModelError when it has none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            f"{type(model).__name__} has no output embedding, so it is no causal language model",
            fix="name a model whose config.json has an architecture ending in ForCausalLM",
        )
    return head


def body_of(model: Any) -> Any:
    """The transformer without its head: what gives ``last_hidden_state``.

    Raises:
        ModelError: none is found.
    """
    head = output_layer(model)
    for found in (_decoder(model), model.base_model, getattr(model, "model", None)):
        if isinstance(found, nn.Module) and found is not model and found is not head:
            return found
    raise ModelError(
        f"the transformer inside {type(model).__name__} is not found",
        why="neither get_decoder() nor its base_model gives one apart from the head",
        fix="name a model that transformers itself implements",
    )


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else None


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of the body, in the order of the forward pass: its largest list of modules; empty where it has none."""
    lists = [module for module in body_of(model).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=_size, default=())  # type: ignore[arg-type]


def layer_parameters(model: Any) -> list[dict[str, nn.Parameter]]:
    """The parameters of each decoder layer by their names in the model; without those that a second layer or another part of
    the model has too."""
    home: dict[int, int] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            home[id(module)] = index
    found: list[dict[str, nn.Parameter]] = [{} for _ in decoder_layers(model)]
    places: dict[int, set[int | None]] = {}
    named = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), set()).add(home.get(id(module)))
            named.append((f"{prefix}.{name}", home.get(id(module)), parameter))
    for name, index, parameter in named:
        if index is not None and len(places[id(parameter)]) == 1:
            found[index][name] = parameter
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of every linear layer but the head, GPT-2's transposed ones included."""
    from transformers.pytorch_utils import Conv1D

    head = output_layer(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def routes_tokens(model: Any) -> bool:
    """Whether it is a mixture of experts: rounding can send a token to another expert."""
    return any(
        _is_expert(name) or "Experts" in type(module).__name__
        for name, module in model.named_modules()
    )


def adapted_by_default(model: Any) -> list[str]:
    """Names of the linear layers that "all-linear" adapts.

    Left out are the head, what lies outside the body (a vision tower), experts, and what makes choices without a gradient
    (routers, the indexers of sparse attention).
    """
    body = body_of(model)
    inside = {id(module) for module in body.modules()}
    routed = routes_tokens(model)
    return [
        name
        for name, module in linear_layers(model)
        if id(module) in inside
        and not _is_grouped(module)
        and not _is_expert(name)
        and not _chooses(name, routed=routed)
        and not _read_by_kernels(model, name)
    ]


def _is_grouped(module: nn.Module) -> bool:
    """DeepSeek V4's linear layers that multiply group by group: PEFT would multiply the whole."""
    return "Grouped" in type(module).__name__


def _is_expert(name: str) -> bool:
    """``mlp.experts.3.up_proj``; those that every token passes (``shared_experts``) are ordinary layers."""
    return any(
        part.endswith("experts") and not part.startswith("shared") for part in name.split(".")
    )


def _chooses(name: str, *, routed: bool) -> bool:
    parts = name.split(".")
    return "indexer" in parts or (
        routed and any(part == "gate" or "router" in part for part in parts)
    )


def _read_by_kernels(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    mixer = model.get_submodule(parent)
    return leaf in MAMBA_KERNELS_READ and hasattr(mixer, "A_log") and hasattr(mixer, "D")
