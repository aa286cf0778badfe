"""Hand-made batches for the tiny model, and what the tests read out of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rnow.algorithm.batching import build_batch
from rnow.algorithm.records import Batch, SampledEvidence, TrainingSample
from rnow.policy.student import LoraPolicy
from rnow.types import Sample

VOCABULARY = 100

# Prompt, answer, tool output, answer: the student's tokens are True. Lengths differ, so batches are padded.
MASKS = (
    "..XXXX",
    "...XX..XXX",
    ".XX",
    "....XXXXXXXX.",
    "..X..X..X",
    ".....XXXX",
    "..XXXXXXXXXX",
    "....X",
)


def make_sample(
    index: int, mask: str, *, teacher: bool = True, spread: float = 1.0
) -> TrainingSample:
    """A sample whose sampler and teacher disagree with any model by about ``spread`` nats around log(1 / V)."""
    generator = torch.Generator().manual_seed(100 + index)
    on = tuple(letter == "X" for letter in mask)
    length = len(mask)
    token_ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
    sampler = -4.6 + spread * torch.randn(length, generator=generator)
    scores = -4.6 + spread * torch.randn(length, generator=generator)
    sampler[~torch.tensor(on)] = 0.0
    return TrainingSample(
        sample=Sample(
            id=f"dataset_{index % 2}/{index}#0",
            dataset=f"dataset_{index % 2}",
            token_ids=tuple(token_ids.tolist()),
            loss_mask=on,
            sampler_logprobs=tuple(sampler.tolist()),
        ),
        reward_advantage=float(torch.randn(1, generator=generator)),
        evidence=SampledEvidence(teacher_logprobs=scores[torch.tensor(on)]) if teacher else None,
    )


def make_batch(masks: tuple[str, ...] = MASKS, **arguments: Any) -> Batch:
    """One sample per mask."""
    return build_batch([make_sample(i, mask, **arguments) for i, mask in enumerate(masks)])


def grouped(batch: Batch) -> Batch:
    """The same samples, all of which begin with the first one's prompt."""
    first = batch.samples[0].sample
    prompt = first.token_ids[: first.loss_mask.index(True)]
    own = (item.sample for item in batch.samples)
    samples = [replace(s, token_ids=(*prompt, *s.token_ids[len(prompt) :])) for s in own]
    return build_batch(
        [replace(item, sample=s) for item, s in zip(batch.samples, samples, strict=True)]
    )


def gradients(policy: LoraPolicy, batch: Batch) -> dict[str, Tensor]:
    """What one pass over the batch leaves in ``.grad``, by parameter name."""
    policy._accumulate(batch)
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in policy._parameters.items()
    }


def weights(policy: LoraPolicy) -> dict[str, Tensor]:
    """A copy of the adapter."""
    return {name: tensor.clone() for name, tensor in policy.adapter().tensors.items()}


def assert_same_gradients(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = 2e-5
) -> None:
    """Equal up to float32 rounding: ``tolerance`` times the largest entry of the whole gradient."""
    assert found.keys() == expected.keys()
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert largest > 1e-4, "a gradient of zero proves nothing"
    for name, tensor in expected.items():
        gap = (found[name] - tensor).abs().max().item()
        assert gap <= tolerance * largest, f"{name}: {gap:.3g} off, largest entry {largest:.3g}"


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def keep_apart(policy: LoraPolicy) -> LoraPolicy:
    """The same policy, each sample in a row of its own."""
    policy.lm = replace(policy.lm, sharing=None)
    return policy
