"""Where the embedded sampler gets its weights: the trainer's own model, or a merged copy of it."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rnow.errors import ModelError
from rnow.models.adapter import OTHER_FORMS
from rnow.models.loading import CausalLM, take_apart
from rnow.models.parts import routes_tokens
from rnow.sampling.packed import PackedLinear, ReadsWeights, can_replace
from rnow.types import Adapter

SamplingMode = Literal["merged", "shared"]

_PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def sampling_mode(student: CausalLM) -> SamplingMode:
    """``merged`` only where adding the adapter to the weights loses nothing: a float32, unquantised base. In bfloat16
    merging rounds most of a small adapter away, and NF4 cannot hold it at all. In a mixture of experts the rounding of a
    merged weight can send a token to another expert than the trainer's."""
    if routes_tokens(student.model):
        return "shared"
    floating = {p.dtype for p in student.model.parameters() if p.is_floating_point()}
    if student.quantization == "none" and floating == {torch.float32}:
        return "merged"
    return "shared"


class MergedWeights:
    """A second set of module objects over the student's base in which every LoRA target has a weight of its own.

    ``load`` writes ``base + alpha / rank * B A`` into those weights from the untouched base, so nothing is ever
    subtracted and no rounding builds up. All other tensors (embeddings, norms, head) are shared with the base. Costs one
    more copy of the linear layers, packed for sampling where that can be, from ``load`` to ``let_go``. Make it before PEFT wraps
    the base.
    """

    def __init__(self, student: CausalLM) -> None:
        tensors = [*student.model.parameters(), *student.model.buffers()]
        model = copy.deepcopy(student.model, {id(tensor): tensor for tensor in tensors})
        self.lm = take_apart(model, vocabulary=student.head.vocabulary)
        self._own: dict[str, _Own] = {}
        self._packs: bool | None = None  # None: not tried yet

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Merge ``adapter`` into this copy.

        Raises:
            ModelError: the adapter is of a kind that has no plain product form (DoRA, rsLoRA, per-layer ranks).
        """
        config = adapter.config
        if any(config.get(name) for name in OTHER_FORMS):
            raise ModelError("only plain LoRA adapters can be merged for sampling")
        scale = config["lora_alpha"] / config["r"]
        for name, down in adapter.tensors.items():
            if not name.endswith(_DOWN):
                continue
            up = adapter.tensors[name.removesuffix(_DOWN) + _UP]
            self._own_layer(name.removeprefix(_PREFIX).removesuffix(_DOWN)).hold(up, down, scale)
        if self._packs is None:
            self._packs = self._can_run()
            if not self._packs:
                for target, own in self._own.items():
                    self.lm.model.set_submodule(target, own.replaced)
                self._own.clear()
                self.load(adapter)

    def let_go(self) -> None:
        """Free the weights of its own where they are in main memory (a card has its own ways to make room). It cannot draw before
        the next ``load``."""
        for own in self._own.values() if self.lm.device.type == "cpu" else ():
            own.let_go()

    def _own_layer(self, target: str) -> _Own:
        if target not in self._own:
            module: Any = self.lm.model.get_submodule(target)
            own = self._own[target] = _Own(
                module, packed=self._packs is not False and can_replace(module)
            )
            self.lm.model.set_submodule(target, own.layer)
        return self._own[target]

    def _can_run(self) -> bool:
        """Whether the model only calls its layers. The number formats are those of ``SamplingMode`` merged, the values any."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.lm.device)
        try:
            self.lm.body(input_ids=ids, position_ids=torch.arange(2)[None].to(ids), use_cache=False)
        except ReadsWeights:
            return False
        return True


class _Own:
    """A linear layer with a weight of its own."""

    def __init__(self, replaced: Any, *, packed: bool) -> None:
        self.replaced = replaced
        self._base: torch.Tensor = replaced.weight.detach()
        # GPT-2's linear layer keeps its weight transposed.
        self._transposed = isinstance(replaced, Conv1D)
        self.layer: Any = PackedLinear(replaced) if packed else copy.copy(replaced)
        if not packed:
            self.layer._parameters = dict(replaced._parameters)
            self.layer.weight = nn.Parameter(self._base.new_empty(0), requires_grad=False)

    def hold(self, up: torch.Tensor, down: torch.Tensor, scale: float) -> None:
        """Make the weight ``base + scale * up down``."""
        factors = (down.T, up.T) if self._transposed else (up, down)
        if isinstance(self.layer, PackedLinear):
            self.layer.hold(torch.addmm(self._base, *factors, alpha=scale))
        else:
            room = self.layer.weight.data
            self.layer.weight.data = torch.addmm(self._base, *factors, alpha=scale, out=room)

    def let_go(self) -> None:
        """Hold nothing."""
        if isinstance(self.layer, PackedLinear):
            self.layer.let_go()
        else:
            self.layer.weight.data = self._base.new_empty(0)
