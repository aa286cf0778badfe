"""LoRA layers without passes over activations: W x + s B (A x) in three products, one of them adding to another's result.

PEFT's own layer multiplies by s, adds, casts and drops out one after the other, each a pass over a tensor as large as the
layer's output. Here s is a factor of the product, and dropout is 0. The layers stay PEFT's: its parameters, its names, its
file format, and its arithmetic wherever anything but one plain adapter is asked of them.

Where the base is bfloat16 the products are too, as under autocast: the adapter's float32 weights are cast, not the activations.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rnow.algorithm.products import linear, wide_product
from rnow.models.linear import is_linear
from rnow.models.parts import routes_tokens

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


LAYERS = {
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
}
"""By name: to import the latter two is to load bitsandbytes."""


def fuse_lora(model: nn.Module) -> None:
    """Give every linear LoRA layer in ``model`` the faster forward pass."""
    # What merging rounds otherwise can send a token to another expert than the sampler's.
    merging = not routes_tokens(model)
    for module in model.modules():
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" in LAYERS:
            module.__class__ = _fused(kind)
            module.merging = merging  # type: ignore[assignment]


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with another ``forward``. A class and not an attribute: a copy of a layer computes with its own weights."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _only_adapter(self, x)
        if name is None:
            return kind.forward(self, x, *args, **kwargs)
        base, scale = self.base_layer, self.scaling[name]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if _is_plain(base, x):
            merging = self.merging and _merging_pays(x, base.weight)
            return _Whole.apply(x, base.weight, base.bias, a, b, scale, merging)  # type: ignore[no-any-return]
        result = base(x)
        if result.dtype != x.dtype:
            return kind.forward(self, x)
        return _Beside.apply(result, x, a, b, scale)  # type: ignore[no-any-return]

    return type(f"Fused{kind.__name__}", (kind,), {"forward": forward})


def _only_adapter(layer: LoraLayer, x: Tensor) -> str | None:
    """The adapter of a layer that has one, without any of what PEFT can do besides."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    (name,) = names
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    same = x.dtype == a.dtype == b.dtype
    return name if same or x.dtype == torch.bfloat16 else None


def _is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether calling it is one product with a frozen weight of the same number format."""
    return (
        is_linear(base)
        and base.weight.dtype == x.dtype
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


class _Whole(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T. With ``merging`` as x (W + s B A)^T + bias,
    whose weight is made again for the backward pass: then the adapter costs four products with the rows, not six, and
    no pass over the layer's output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        merging: bool,
    ) -> Tensor:
        x = x.contiguous()
        rows = x.view(-1, x.shape[-1])
        ctx.scale, ctx.shape, ctx.merging = scale, x.shape, merging
        # Of the final shape: models may change in place what a layer returns, which a view forbids.
        if merging:
            ctx.save_for_backward(rows, None, weight, a, b)
            return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
        down = rows @ a.to(x.dtype).t()
        ctx.save_for_backward(rows, down, weight, a, b)
        result = linear(x, weight, bias)
        result.view(-1, weight.shape[0]).addmm_(down, b.to(x.dtype).t(), alpha=scale)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        if down is None:
            down = rows @ a.t()
        towards, of_a, of_b = _adapter_gradients(gradient, rows, down, a, b, ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0] and ctx.merging:
            of_x = linear(gradient, torch.addmm(weight, b, a, alpha=ctx.scale).t())
        elif ctx.needs_input_grad[0]:
            of_x = linear(gradient, weight.t())
            of_x.addmm_(towards, a.to(rows.dtype), alpha=ctx.scale)
        return None if of_x is None else of_x.view(ctx.shape), None, None, of_a, of_b, None, None


def _merging_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether to make ``W + s B A``, twice, is less work than to multiply the rows by A and B once more."""
    outputs, inputs = weight.shape
    wide = x.dtype in (torch.float32, torch.float64)
    return wide and x.numel() // inputs * (inputs + outputs) > 2 * inputs * outputs


class _Beside(torch.autograd.Function):
    """``result`` + s (x A^T) B^T, where the base made ``result`` in a way of its own."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down = rows @ a.to(x.dtype).t()
        ctx.save_for_backward(rows, down, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        given = result.reshape(-1, result.shape[-1])
        found = x.new_empty(result.shape)
        flat = found.view(-1, result.shape[-1])
        torch.addmm(given, down, b.to(x.dtype).t(), alpha=scale, out=flat)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, b.shape[0])
        towards, of_a, of_b = _adapter_gradients(gradient, rows, down, a, b, ctx.scale)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = (towards @ (ctx.scale * a).to(rows.dtype)).view(ctx.shape)
        return gradients[0], of_x, of_a, of_b, None


def _adapter_gradients(
    gradient: Tensor, rows: Tensor, down: Tensor, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient at A's output over s, and the gradients of A and B."""
    towards = gradient @ b.to(gradient.dtype)
    of_a = wide_product(towards.t(), rows).to(a.dtype).mul_(scale)
    of_b = wide_product(gradient.t(), down).to(b.dtype).mul_(scale)
    return towards, of_a, of_b
