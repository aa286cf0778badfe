"""What the tests on a GPU share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.policy.student import LoraPolicy, OptimizerSettings

CUDA = torch.device("cuda")
VOCABULARY = 100

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


def load(
    folder: Path, *, dtype: torch.dtype = torch.float32, quantization: Any = "none"
) -> CausalLM:
    """A model on the card."""
    return load_causal_lm(
        folder, vocabulary=VOCABULARY, dtype=dtype, device=CUDA, quantization=quantization
    )


def make_policy(lm: CausalLM, **arguments: Any) -> LoraPolicy:
    """A policy whose adapter does something: B is drawn, not 0. The learning rate is high enough to be seen."""
    policy = LoraPolicy(
        lm,
        rank=4,
        alpha=8,
        seed=0,
        base_name="tiny",
        objective=PolicyGradient(reward_coef=1.0),
        optimizer=OptimizerSettings(learning_rate=1e-2),
        **arguments,
    )
    generator = torch.Generator().manual_seed(1)
    policy.load_adapter(
        {
            name: torch.randn(tensor.shape, generator=generator) * 0.05
            if "lora_B" in name
            else tensor.clone()
            for name, tensor in policy.adapter().tensors.items()
        }
    )
    return policy
