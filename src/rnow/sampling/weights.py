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
    more copy of the linear layers. Make it before PEFT wraps the base.
    """

    def __init__(self, student: CausalLM) -> None:
        tensors = [*student.model.parameters(), *student.model.buffers()]
        model = copy.deepcopy(student.model, {id(tensor): tensor for tensor in tensors})
        self.lm = take_apart(model, vocabulary=student.head.vocabulary)
        self._base: dict[str, torch.Tensor] = {}

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
            target = name.removeprefix(_PREFIX).removesuffix(_DOWN)
            up = adapter.tensors[name.removesuffix(_DOWN) + _UP]
            module = self._own_linear(target)
            base, merged = self._base[target], module.weight.data
            if isinstance(module, Conv1D):  # GPT-2's linear layer keeps its weight transposed
                torch.addmm(base, down.T, up.T, alpha=scale, out=merged)
            else:
                torch.addmm(base, up, down, alpha=scale, out=merged)

    def _own_linear(self, target: str) -> Any:
        module = self.lm.model.get_submodule(target)
        if target not in self._base:
            self._base[target] = module.weight.detach()
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        return module
