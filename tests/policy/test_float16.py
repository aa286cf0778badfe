"""The gradient through a float16 base, at the scale of a real step: one token's share of 16,384."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policy.batches import make_batch
from torch import Tensor, nn

from rnow.algorithm.objective import Terms
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import Batch, SampledEvidence, UpdateResult
from rnow.models.loading import load_causal_lm
from rnow.policy.float16 import TRIES, add_gradients
from rnow.policy.student import LoraPolicy, OptimizerSettings

N = 16_384
MASKS = ("..." + 60 * "X", "....." + 40 * "X", ".." + 50 * "X")


@pytest.fixture
def make(tiny_model_dir: Callable[..., Path]) -> Callable[..., LoraPolicy]:
    folder = tiny_model_dir(
        hidden_size=256, num_hidden_layers=1, initializer_range=0.02, tie_word_embeddings=True
    )

    def build(dtype: torch.dtype, **objective: Any) -> LoraPolicy:
        lm = load_causal_lm(folder, vocabulary=100, dtype=dtype, device=torch.device("cpu"))
        policy = LoraPolicy(
            lm,
            rank=4,
            alpha=8,
            seed=0,
            base_name="x",
            objective=PolicyGradient(**({"loss_fn": "importance_sampling"} | objective)),
            # betas 0: the first moment is the gradient.
            optimizer=OptimizerSettings(learning_rate=1e-9, betas=(0.0, 0.0), max_grad_norm=1e9),
        )
        generator = torch.Generator().manual_seed(1)
        started = {
            name: 0.02 * torch.randn(tensor.shape, generator=generator)
            if "lora_B" in name
            else tensor.clone()
            for name, tensor in policy.adapter().tensors.items()
        }
        policy.load_adapter(started)
        return policy

    return build


def _on_policy(policy: LoraPolicy, spread: float = 0.1) -> Batch:
    """Each model's own samples, ``spread`` nats from their teacher: the advantages are alike in every dtype."""
    batch = make_batch(MASKS)
    live = policy._accumulate(batch).by_sample()["logprobs"]
    samples = []
    for index, item in enumerate(batch.samples):
        on = torch.tensor(item.sample.loss_mask)
        own = torch.zeros(len(on)).masked_scatter(on, live[item.sample.id])
        noise = torch.randn(len(on), generator=torch.Generator().manual_seed(index)) * spread
        sample = replace(item.sample, sampler_logprobs=tuple(own.tolist()))
        evidence = SampledEvidence(teacher_logprobs=(own - noise)[on])
        samples.append(replace(item, sample=sample, evidence=evidence))
    return Batch(samples=tuple(samples), num_loss_tokens=N)


def _gradient(policy: LoraPolicy, batch: Batch) -> tuple[Tensor, UpdateResult]:
    result = policy.update(batch)
    moments = policy.state_dict()["moments"]
    parts = [value.flatten() for name, value in moments.items() if name.endswith("exp_avg")]
    return torch.cat(parts).double(), result


def _compare(found: Tensor, expected: Tensor) -> tuple[float, float]:
    cosine = found @ expected / (found.norm() * expected.norm())
    return cosine.item(), (found.norm() / expected.norm()).item()


@pytest.mark.parametrize("coefficient", [0.1, 1e-5])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 1])
def test_is_that_of_float32_at_every_scale(
    make: Callable[..., LoraPolicy], coefficient: float, micro_batch_tokens: int
) -> None:
    found = {}
    for dtype in (torch.float32, torch.float16):
        policy = make(dtype, kl_penalty_coef=coefficient)
        policy._micro_batch_tokens = micro_batch_tokens
        found[dtype], result = _gradient(policy, _on_policy(policy))
        assert not result.skipped
        assert not result.zero_gradient
        assert result.metrics["grad_norm"] == pytest.approx(found[dtype].norm().item(), rel=1e-4)
    cosine, norm = _compare(found[torch.float16], found[torch.float32])
    assert cosine > 0.999
    assert norm == pytest.approx(1.0, abs=0.01)


class Straight:
    """A forward pass whose gradient with respect to one weight goes through float16, times ``gain``."""

    def __init__(self, losses: Tensor, gain: float) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(1))
        self.losses, self.gain, self.calls = losses, gain, 0

    def compute(self) -> Terms:
        self.calls += 1
        through = _Float16.apply(self.weight.expand(len(self.losses)), self.gain)
        assert isinstance(through, Tensor)
        return Terms(losses=self.losses * through, streams={})

    def add(self) -> Tensor | None:
        add_gradients(self.compute, [self.weight, self.unused], 2)
        return self.weight.grad


class _Float16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, gain: float) -> Tensor:
        ctx.gain = gain
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return (gradients[0].half() * ctx.gain).float(), None


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 3e4])
def test_the_power_follows_the_losses(size: float) -> None:
    straight = Straight(torch.tensor([size, size / 4]), 1.0)
    assert straight.add() == pytest.approx(size * 1.25 / 2, rel=1e-3)
    assert straight.calls == 1
    straight.add()
    assert straight.weight.grad == pytest.approx(size * 1.25, rel=1e-3), "the second adds up"
    assert straight.unused.grad is None


def test_an_overflow_on_the_way_is_tried_again_smaller() -> None:
    straight = Straight(torch.tensor([1.0, 0.5]), 3e4)
    assert straight.add() == pytest.approx(1.5 * 3e4 / 2, rel=1e-3)
    assert 1 < straight.calls < TRIES


def test_what_overflows_at_any_scale_stays_non_finite() -> None:
    straight = Straight(torch.tensor([1.0, 0.5]), float("inf"))
    gradient = straight.add()
    assert gradient is not None
    assert not torch.isfinite(gradient).all()
    assert straight.calls == TRIES


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_tried_again(loss: float) -> None:
    straight = Straight(torch.tensor([loss, 0.5]), 1.0)
    straight.add()
    assert straight.calls == 1
    assert not torch.isfinite(straight.weight.grad).all()  # type: ignore[arg-type]


def test_losses_of_zero_have_a_gradient_of_zero() -> None:
    assert Straight(torch.zeros(2), 1.0).add() == 0.0


def test_nothing_to_learn_is_said(make: Callable[..., LoraPolicy]) -> None:
    policy = make(torch.float32)
    assert policy.update(_on_policy(policy, spread=0.0)).zero_gradient
    assert not policy.update(_on_policy(policy)).zero_gradient
