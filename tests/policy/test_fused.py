"""LoRA in fused products against PEFT's own layers: values, gradients, and everything that stays PEFT's."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from tests.policy.batches import make_batch
from tests.policy.conftest import MakePolicy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rnow.policy.fused import fuse_lora
from rnow.policy.student import LoraPolicy

INPUTS, OUTPUTS, RANK = 12, 7, 3


class Two(nn.Module):
    """Layers with and without bias, one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, OUTPUTS, bias=True, dtype=dtype)
        self.second = nn.Linear(OUTPUTS, OUTPUTS, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def wrapped(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(
        Two(dtype),
        LoraConfig(
            r=RANK, lora_alpha=5, target_modules=["first", "second"],
            **{"lora_dropout": 0.0, **config},
        ),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            parameter.data = torch.randn(parameter.shape, dtype=wide) / 3
    return model.train()


def fused(model: Any) -> Any:
    """The same model, fused."""
    found = copy.deepcopy(model)
    fuse_lora(found)
    return found


def run(model: Any, x: Tensor, *, of_x: bool = True) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_(of_x)
    result = model(x)
    wanted = [p for p in model.parameters() if p.requires_grad] + ([x] if of_x else [])
    return result.detach(), list(torch.autograd.grad((result**2).sum(), wanted))


def inputs(dtype: torch.dtype = torch.float64, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (2, 5)), INPUTS, generator=generator, dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize(
    "shape", [(4,), (2, 5), (0,), (1, 1, 3), (40,)]
)  # from ten rows on weights are merged
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("of_x", [True, False])
def test_values_and_gradients_are_pefts(
    dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], of_x: bool
) -> None:
    model = wrapped(dtype)
    expected, theirs = run(model, inputs(dtype, *shape), of_x=of_x)
    found, ours = run(fused(model), inputs(dtype, *shape), of_x=of_x)
    assert found.shape == expected.shape
    for mine, peft in zip((found, *ours), (expected, *theirs), strict=True):
        assert mine.dtype == peft.dtype
        scale = float(peft.abs().max()) if peft.numel() else 1.0
        torch.testing.assert_close(mine, peft, rtol=0, atol=tolerance * scale)


def test_gradcheck() -> None:
    model = fused(wrapped())
    assert torch.autograd.gradcheck(model, (inputs().requires_grad_(),))
    layer = model.base_model.model.first
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def of(a: Tensor, b: Tensor) -> Tensor:
        weights = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return torch.func.functional_call(layer, weights, inputs())

    assert torch.autograd.gradcheck(of, (a, b))


def test_a_strided_input_and_a_strided_gradient() -> None:
    model, x = wrapped(), inputs(torch.float64, 5, 2).transpose(0, 1)
    torch.testing.assert_close(run(fused(model), x)[1], run(model, x)[1], rtol=1e-12, atol=1e-12)
    layer, peft = fused(model).base_model.model.first, model.base_model.model.first
    found, expected = layer(inputs()), peft(inputs())
    upstream = torch.arange(7 * 10.0, dtype=torch.float64).view(7, 5, 2).permute(2, 1, 0)
    ours = torch.autograd.grad(found, layer.lora_B["default"].weight, upstream)
    theirs = torch.autograd.grad(expected, peft.lora_B["default"].weight, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)


def _two_adapters(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])


ASKED: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "merged": ({}, lambda model: model.merge_adapter()),
    "two adapters": ({}, _two_adapters),
    "none active": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "dora": ({"use_dora": True}, lambda model: None),
    "bias of its own": ({"lora_bias": True, "target_modules": ["first"]}, lambda model: None),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_else_peft_can_do_stays_pefts(asked: str) -> None:
    config, change = ASKED[asked]
    model = wrapped(**config) if "target_modules" not in config else _with_bias()
    ours = fused(model)
    change(model)
    change(ours)
    if asked == "two adapters":  # each draws its own
        ours.load_state_dict(model.state_dict())
    assert torch.equal(ours(inputs()), model(inputs())), "not PEFT's own operations"


def _with_bias() -> Any:
    return get_peft_model(
        Two(torch.float64), LoraConfig(r=RANK, target_modules=["first"], lora_bias=True)
    )


def test_dropout_draws_as_pefts_does() -> None:
    model = wrapped(lora_dropout=0.5)
    ours = fused(model)
    torch.manual_seed(3)
    expected = model(inputs())
    torch.manual_seed(3)
    assert torch.equal(ours(inputs()), expected)


def test_a_disabled_adapter_is_the_base() -> None:
    model = fused(wrapped())
    base = Two(torch.float64)
    base.load_state_dict(
        {
            name.replace("base_model.model.", "").replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora_" not in name
        }
    )
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base(inputs()))
    assert not torch.allclose(model(inputs()), base(inputs()))


def test_autocast_is_pefts() -> None:
    model = wrapped(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(model)(inputs(torch.float32)), model(inputs(torch.float32)))


def test_a_hook_of_the_base_layer_is_called() -> None:
    model = fused(wrapped())
    seen: list[Tensor] = []
    first = model.base_model.model.first
    first.base_layer.register_forward_hook(lambda layer, x, result: seen.append(result))
    found, ours = run(model, inputs())
    assert len(seen) == 1
    first.base_layer._forward_hooks.clear()
    expected, plain = run(model, inputs())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_base_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    model = wrapped(torch.bfloat16)
    wide = wrapped()
    wide.load_state_dict(model.state_dict())  # the numbers that bfloat16 holds, in float64
    _, exact = run(wide, inputs(torch.bfloat16).double())
    _, theirs = run(model, inputs(torch.bfloat16))
    found, ours = run(fused(model), inputs(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    for mine, peft, right in zip(ours[:-1], theirs[:-1], exact[:-1], strict=True):
        assert mine.dtype == torch.float32
        error, before = (mine - right).norm() / right.norm(), (peft - right).norm() / right.norm()
        assert error < max(3 * before, 0.01), "16-bit rounding, no more"


class Counted(TorchDispatchMode):
    """Operations that went over as many numbers as a layer's input or output has."""

    def __init__(self, at_least: int) -> None:
        super().__init__()
        self.at_least = at_least
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.at_least:
            self.names[func.overloadpacket.__name__] += 1
        return out


@pytest.mark.parametrize(("rows", "merged"), [(12, False), (64, True)])
def test_no_pass_over_activations_but_the_products(rows: int, merged: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16, bias=False))
    model = get_peft_model(layer, LoraConfig(r=2, lora_alpha=5, target_modules=["0"]))
    x = torch.randn(rows, 16, requires_grad=True)

    def count(model: Any) -> Counter[str]:
        with Counted(rows * 16) as counted:
            model(x).backward(torch.ones(rows, 16))
        return counted.names

    count(model)  # .grad is there from here on
    names = count(fused(model))
    assert sum(names[name] for name in ("mul", "add", "mul_", "add_", "_to_copy", "clone")) <= 1, (
        "at most what adds to x.grad"
    )
    assert names["mm"] == 2, "W x and, backward, W' g"
    assert names["addmm_"] == (0 if merged else 2), "the adapter's part of both"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_trains_as_with_pefts_layers(
    make_policy: MakePolicy, checkpointing: bool
) -> None:
    batch = make_batch()

    def trained(policy: LoraPolicy) -> dict[str, Tensor]:
        for _ in range(2):
            policy.update(batch)
        return dict(policy.adapter().tensors)

    ours = make_policy(recomputed_layers=None if checkpointing else 0)
    layers = [m for m in ours.model.modules() if isinstance(m, PeftLinear)]
    assert layers
    assert all(type(layer).__name__ == "FusedLinear" for layer in layers)
    theirs = make_policy(recomputed_layers=None if checkpointing else 0)
    for module in theirs.model.modules():
        if isinstance(module, PeftLinear):
            module.__class__ = PeftLinear
    found, expected = trained(ours), trained(theirs)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def test_nf4_keeps_its_own_product(tiny_model_dir: Callable[..., Path]) -> None:
    from tests.policy.test_nf4 import load

    torch.manual_seed(0)
    lm = load(tiny_model_dir(), "nf4")
    model = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) / 3
    ids = torch.tensor([[5, 6, 7, 8]])
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad((model(input_ids=ids).logits ** 2).sum(), trained))

    expected = gradients()
    fuse_lora(model)
    assert any(type(module).__name__ == "FusedLinear4bit" for module in model.modules())
    for mine, peft in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, peft, rtol=0, atol=2e-5 * float(peft.abs().max()))
