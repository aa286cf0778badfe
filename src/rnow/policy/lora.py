"""Putting a LoRA adapter on a frozen base."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rnow.errors import ModelError, ran_out_of_memory
from rnow.models.adapter import TrainedAdapter
from rnow.models.loading import CausalLM
from rnow.models.parts import adapted_by_default, linear_layers
from rnow.models.refusal import one_line, shorten
from rnow.policy.fused import fuse_lora

if TYPE_CHECKING:
    from peft import LoraConfig

ALL_LINEAR = "all-linear"

_WRAPPED = "base_model.model."
"""How PEFT's names of a wrapped model's parts begin."""


def attach_lora(
    lm: CausalLM,
    *,
    rank: int,
    alpha: int,
    seed: int,
    base_name: str,
    base_revision: str | None = None,
    targets: Sequence[str] = (ALL_LINEAR,),
) -> Any:
    """Wrap ``lm.model`` with PEFT LoRA; dropout 0, weights in float32.

    ``lm.body`` and ``lm.head`` stay valid: PEFT swaps the linear layers in place. The adapter starts as the identity
    (B = 0); A is drawn from ``seed`` without touching the global random state.

    Args:
        base_name: what the adapter's config names as its base: the path the user gave.
        base_revision: the commit of a base from the hub.
        targets: the layers it changes, see ``lora_config``.

    Raises:
        ModelError: as ``lora_config``.
    """
    config = lora_config(lm.model, rank=rank, alpha=alpha, targets=targets)
    # Drawn on the CPU; torch warns where it copies the state of several cards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _wrap(lm.model, config)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.peft_config["default"].revision = base_revision
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
    fuse_lora(model)
    model.eval()
    return model


def attach_trained(lm: CausalLM, adapter: TrainedAdapter) -> Any:
    """Wrap ``lm.model`` with an adapter that was trained, as ``attach_lora`` does with a new one.

    Raises:
        ModelError: it cannot be read, or does not fit this model.
    """
    model = attach_lora(
        lm,
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=0,
        base_name=adapter.base,
        targets=adapter.targets,
    )
    try:
        copy_adapter(dict(trainable_parameters(model)), adapter.tensors())
    except ValueError as error:
        raise _unfit(adapter, [str(error)]) from error
    return model


@torch.no_grad()
def copy_adapter(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter's ``parameters`` (by their names in the model) the values of ``tensors`` (by their names on disk).

    Raises:
        ValueError: names or shapes do not match.
    """
    mine = {saved_name(name): parameter for name, parameter in parameters.items()}
    if mine.keys() != tensors.keys():
        raise ValueError("the saved adapter has other layers than this one")
    for name, parameter in mine.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name])


def adapter_deltas(model: Any, adapter: TrainedAdapter) -> dict[str, Callable[[], Tensor]]:
    """What an adapter adds to each parameter that it changes, by the parameter's name in ``model``: made in float32 in main memory
    when it is asked for. The model is wrapped, and of no use afterwards.

    Args:
        model: it may be without weights, on torch's meta device. ``check_fit`` passed it.

    Raises:
        ModelError: the adapter cannot be read, or as ``lora_config``.
    """
    from peft.tuners.lora.layer import LoraLayer

    tensors = adapter.tensors()
    config = lora_config(model, rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    with torch.random.fork_rng(devices=[]):
        wrapped = _wrap(model.float(), config)
    for name, _ in trainable_parameters(wrapped):
        owner, _, leaf = name.rpartition(".")
        value = tensors[saved_name(name)].float()
        wrapped.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    return {
        _changed_parameter(path, layer): partial(_delta, layer)
        for path, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _changed_parameter(path: str, layer: Any) -> str:
    """The base's own name of what a LoRA layer changes. Of experts PEFT wraps one parameter around the other."""
    module = path.removeprefix(_WRAPPED).replace(".base_layer", "")
    return f"{module}.{getattr(layer, 'parameter_name', 'weight')}"


@torch.no_grad()
def _delta(layer: Any) -> Tensor:
    if not hasattr(layer, "parameter_name"):
        return layer.get_delta_weight("default")
    # PEFT's own sum goes to where the base is, which may be nowhere.
    left, right, scale = layer.get_delta_factors("default")
    return torch.matmul(left, right) * scale


def adapter_shapes(model: Any, *, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Tensors of the adapter that ``attach_lora`` would put on ``model``, by their names on disk. The model is wrapped, and of no
    use afterwards.

    Args:
        model: it may be without weights, on torch's meta device.

    Raises:
        ModelError: as ``lora_config``.
    """
    with torch.random.fork_rng(devices=[]):
        wrapped = _wrap(model, lora_config(model, rank=rank, alpha=rank, targets=targets))
    return {saved_name(name): tuple(p.shape) for name, p in trainable_parameters(wrapped)}


def count_adapter(model: Any, *, rank: int, targets: Sequence[str]) -> int:
    """Parameters of that adapter. Raises as ``adapter_shapes``."""
    return sum(map(math.prod, adapter_shapes(model, rank=rank, targets=targets).values()))


def check_fit(model: Any, adapter: TrainedAdapter, *, asked: Sequence[str] = (ALL_LINEAR,)) -> int:
    """Parameters of an adapter from which a student is trained on, held against its base, which is wrapped and of no use afterwards.

    Args:
        model: it may be without weights, on torch's meta device.
        asked: ``model.lora_targets``; all linear layers, its default, asks for nothing.

    Raises:
        ModelError: the adapter cannot be read, it has other layers or shapes than the model or lacks some, or it changes other
            layers than those asked for.
    """
    tensors = adapter.tensors()
    wanted = None if tuple(asked) == (ALL_LINEAR,) else _layers(model, asked)
    try:
        own = _layers(model, adapter.targets)
        expected = adapter_shapes(model, rank=adapter.rank, targets=adapter.targets)
    except ModelError as error:
        raise _unfit(adapter, [error.message]) from error
    if wanted is not None and wanted != own:
        raise ModelError(
            "model.lora_targets names other layers than those that the adapter to continue from changes",
            where="model.lora_targets",
            details=shorten(sorted(wanted ^ own)),
            fix=f"remove model.lora_targets: the layers are those of '{adapter.refusal.path}'",
        )
    if faults := _misfits(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected
    ):
        raise _unfit(adapter, faults)
    return sum(map(math.prod, expected.values()))


def _layers(model: Any, targets: Sequence[str]) -> frozenset[str]:
    """What PEFT is told to adapt, by name."""
    config = lora_config(model, rank=1, alpha=1, targets=targets)
    return frozenset((*(config.target_modules or ()), *(config.target_parameters or ())))


def _misfits(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [f"{name}: the model has no such layer" for name in found if name not in expected]
    return faults + [
        f"{name} has shape {found[name]}, and the model needs {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]


def _unfit(adapter: TrainedAdapter, faults: Sequence[str]) -> ModelError:
    return adapter.refusal.error(
        f"the adapter in '{adapter.folder}' does not fit the model it is put on",
        details=shorten(faults),
        fix=f"set model.path: {adapter.base}, which is its base; or name an adapter of this model",
    )


def lora_config(model: Any, *, rank: int, alpha: int, targets: Sequence[str]) -> LoraConfig:
    """What PEFT is told to adapt.

    Args:
        targets: names of linear layers or of experts' stacked weights, whole or their last parts (``q_proj``);
            ``all-linear`` stands for every linear layer of the body but experts and routers.

    Raises:
        ModelError: a name is not found in the model, or there is nothing to adapt.
    """
    from peft import LoraConfig

    linear = [name for name, _ in linear_layers(model)]
    stacked = [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name]
    chosen: list[str] = []
    parameters: list[str] = []
    for target in targets:
        if target == ALL_LINEAR:
            chosen += _not_renamed(model, adapted_by_default(model))
        elif layers := _called(target, linear):
            chosen += layers
        elif _called(target, stacked):
            parameters.append(target)
        elif _is_renamed(model, target):
            chosen.append(target)
        else:
            raise _no_such_layer(model, target, [*linear, *stacked])
    if not chosen and not parameters:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that {ALL_LINEAR} would adapt",
            where="model.lora_targets",
            details=shorten(sorted({_leaf(name) for name in (*linear, *stacked)})),
            fix="name the layers to adapt in model.lora_targets",
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=list(dict.fromkeys(chosen)),
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )


def _wrap(model: Any, config: LoraConfig) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(model, config)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # all that PEFT raises for a layer it does not know, and torch for numbers that no memory holds
        widest = max(
            (max(layer.get_parameter("weight").shape) for _, layer in linear_layers(model)),
            default=0,
        )
        if config.r > widest or ran_out_of_memory(error):
            raise ModelError(
                f"an adapter of rank {config.r} cannot be made for {type(model).__name__}",
                where="model.qlora_rank",
                why=one_line(error),
                fix=f"set model.qlora_rank to a smaller number, {min(config.r, widest)} at most: its widest layer has no "
                "more rows or columns",
            ) from error
        raise ModelError(
            f"PEFT cannot adapt these layers of {type(model).__name__}",
            where="model.lora_targets",
            why=one_line(error),
            fix="name other layers in model.lora_targets",
        ) from error


def _called(target: str, names: Collection[str]) -> list[str]:
    """Those of ``names`` that PEFT finds under ``target``."""
    return [name for name in names if name == target or name.endswith(f".{target}")]


def _not_renamed(model: Any, names: Sequence[str]) -> list[str]:
    """``names`` without those that PEFT would take for experts: of some mixtures of experts it reads the names of ordinary
    layers (``shared_expert.gate_proj``) as older names of the stacked experts, when it trains and when it loads."""
    renamed = {leaf for leaf in {_leaf(name) for name in names} if _is_renamed(model, leaf)}
    return [name for name in names if _leaf(name) not in renamed]


def _is_renamed(model: Any, leaf: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it belongs to several that are renamed together
        return True
    return bool(config.target_parameters)


def _no_such_layer(model: Any, target: str, names: Sequence[str]) -> ModelError:
    return ModelError(
        f"model.lora_targets names '{target}', and {type(model).__name__} has no such layer",
        where="model.lora_targets",
        details=shorten(sorted({_leaf(name) for name in names})),
        fix=f"name some of these, or {ALL_LINEAR}",
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of the adapter, in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def saved_name(name: str) -> str:
    """PEFT's on-disk name of a parameter: without the adapter's own name."""
    return name.replace(".default.", ".")
