"""A policy on a tiny Qwen3 model, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policy.batches import VOCABULARY

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.models.loading import load_causal_lm
from rnow.policy.student import LoraPolicy, OptimizerSettings

MakePolicy = Callable[..., LoraPolicy]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_policy(tiny_model_dir: Callable[..., Path]) -> MakePolicy:
    """``make_policy(started=True, model={}, objective={}, optimizer={}, **LoraPolicy arguments)``.

    A new adapter has B = 0, which hides half of every gradient; ``started`` gives B small random values instead.
    """

    def make(
        *,
        started: bool = True,
        model: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> LoraPolicy:
        folder = tiny_model_dir(**(model or {}))
        lm = load_causal_lm(
            folder, vocabulary=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
        )
        policy = LoraPolicy(
            lm,
            rank=4,
            alpha=8,
            seed=0,
            base_name=str(folder),
            objective=PolicyGradient(**(objective or {})),
            optimizer=OptimizerSettings(**({"learning_rate": 1e-2} | (optimizer or {}))),
            **arguments,
        )
        if started:
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

    return make
