"""QLoRA on the CPU: an NF4 base in the order a run uses it, sample -> score -> update -> sample.

The order matters: on some CPUs bitsandbytes repacks the weights in place in the first forward pass without gradients, and
the gradients after that are wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tests.sampling.conformance import complete_all, params, prompt
from torch import Tensor

from rnow.algorithm.batching import build_batch, build_training_samples
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import Batch
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Completion, Sample

CPU = torch.device("cpu")
REQUESTS = [(prompt(4 + seed), params(max_tokens=12), seed) for seed in range(6)]
ADAMW_BETA1 = 0.9


def load(folder: Path, quantization: str, device: torch.device = CPU) -> CausalLM:
    return load_causal_lm(
        folder,
        vocabulary=100,
        dtype=torch.float32,
        device=device,
        quantization=quantization,  # type: ignore[arg-type]
    )


def quantised_layers(lm: CausalLM) -> dict[str, torch.nn.Module]:
    """NF4 layers by the name they have in the plain model."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): module
        for name, module in lm.model.named_modules()
        if type(module).__name__ == "Linear4bit"
    }


def dequantised(folder: Path, quantised: CausalLM) -> CausalLM:
    """A plain float32 model that holds what the NF4 weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = load(folder, "none", quantised.device)
    for name, layer in quantised_layers(quantised).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.model.get_submodule(name).weight.data.copy_(weight)
    return plain


def make_policy(lm: CausalLM) -> LoraPolicy:
    policy = LoraPolicy(
        lm,
        rank=4,
        alpha=8,
        seed=3,
        base_name="tiny",
        objective=PolicyGradient(),
        # No clipping: the first moment is then (1 - beta1) times the gradient itself.
        optimizer=OptimizerSettings(
            learning_rate=1e-2, betas=(ADAMW_BETA1, 0.95), max_grad_norm=1e9
        ),
    )
    generator = torch.Generator().manual_seed(4)
    policy.load_adapter(
        {
            name: torch.randn(tensor.shape, generator=generator) * 0.1
            for name, tensor in policy.adapter().tensors.items()
        }
    )
    return policy


def packed(lm: CausalLM) -> dict[str, Tensor]:
    """Every byte of the quantised base, its scales included."""
    found = {}
    for name, layer in quantised_layers(lm).items():
        state = layer.weight.quant_state
        found[name] = layer.weight.data.clone()
        found[f"{name}.absmax"] = state.absmax.clone()
        found[f"{name}.offset"] = state.offset.clone()
    return found


def samples_of(done: list[Completion]) -> list[Sample]:
    samples = []
    for (ids, _, seed), completion in zip(REQUESTS, done, strict=True):
        drawn = len(completion.token_ids)
        samples.append(
            Sample(
                id=f"dataset_0/{seed}#0",
                dataset="dataset_0",
                token_ids=(*ids, *completion.token_ids),
                loss_mask=(*[False] * len(ids), *[True] * drawn),
                sampler_logprobs=(*[0.0] * len(ids), *completion.logprobs),
            )
        )
    return samples


def gradients(policy: LoraPolicy, batch: Batch) -> dict[str, Tensor]:
    """The adapter's gradients of one update, read from AdamW's first moment."""
    assert not policy.update(batch).skipped
    moments = policy.state_dict()["moments"]
    return {
        name.removesuffix(".exp_avg"): moment.clone() / (1 - ADAMW_BETA1)
        for name, moment in moments.items()
        if name.endswith(".exp_avg")
    }


@dataclass(frozen=True, kw_only=True)
class Story:
    """What one sample -> score -> update -> sample with an NF4 student left behind."""

    mode: str | None
    first: list[Completion]
    second: list[Completion]
    own: dict[str, Tensor]
    samples: list[Sample]
    found: dict[str, Tensor]
    expected: dict[str, Tensor]
    base_before: dict[str, Tensor]
    base_after: dict[str, Tensor]
    adapter_before: dict[str, Tensor]
    adapter_after: dict[str, Tensor]


def tell_story(tiny_model_dir: Callable[..., Path], device: torch.device) -> Story:
    """The story on one device."""
    folder = tiny_model_dir(num_hidden_layers=1)
    student = load(folder, "nf4", device)
    before = packed(student)
    plain = dequantised(folder, student)
    sampler = TransformersSampler.for_student(student)
    policy = make_policy(student)
    adapter_before = {name: t.clone() for name, t in policy.adapter().tensors.items()}
    teacher_folder = tiny_model_dir(seed=1, num_hidden_layers=1)
    teacher = TransformersTeacher(load(teacher_folder, "nf4", device))

    sampler.load_policy(policy.adapter(), version=0)
    first = complete_all(sampler, REQUESTS)
    samples = samples_of(first)
    evidence = teacher.score_now(samples)
    own = TransformersTeacher(student).score_now(samples)
    batch = build_batch(build_training_samples(samples, {s.id: 0.0 for s in samples}, evidence))
    found = gradients(policy, batch)
    sampler.load_policy(policy.adapter(), version=1)
    second = complete_all(sampler, REQUESTS)
    return Story(
        mode=sampler.mode,
        first=first,
        second=second,
        own={name: e.teacher_logprobs for name, e in own.items()},
        samples=samples,
        found=found,
        expected=gradients(make_policy(plain), batch),
        base_before=before,
        base_after=packed(student),
        adapter_before=adapter_before,
        adapter_after={name: t.clone() for name, t in policy.adapter().tensors.items()},
    )


@pytest.fixture(scope="module")
def story(tiny_model_dir: Callable[..., Path]) -> Story:
    return tell_story(tiny_model_dir, CPU)


def test_an_nf4_student_is_sampled_as_it_is(story: Story) -> None:
    assert story.mode == "shared"


def test_gradients_are_those_on_the_dequantised_weights(story: Story) -> None:
    assert story.found.keys() == story.expected.keys()
    assert len(story.found) == 14, "seven linear layers, A and B of each"
    for name, expected in story.expected.items():
        assert expected.norm() > 1e-6, name
        error = (story.found[name] - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: {error:.2g}"


def test_the_base_keeps_every_bit(story: Story) -> None:
    assert story.base_before.keys() == story.base_after.keys()
    changed = [
        name
        for name in story.base_before
        if not torch.equal(story.base_before[name], story.base_after[name])
    ]
    assert changed == []


def test_every_adapter_weight_moved(story: Story) -> None:
    for name, before in story.adapter_before.items():
        assert not torch.equal(before, story.adapter_after[name]), name


def test_sampler_and_trainer_agree_before_the_update(story: Story) -> None:
    for sample in story.samples:
        mask = torch.tensor(sample.loss_mask)
        drawn = torch.tensor(sample.sampler_logprobs)[mask]
        assert ((story.own[sample.id] - drawn).exp() - 1).abs().max() < 1e-4


def test_sampling_after_the_update_uses_the_new_adapter(story: Story) -> None:
    assert {completion.policy_version for completion in story.first} == {0}
    assert {completion.policy_version for completion in story.second} == {1}
    assert [c.logprobs for c in story.first] != [c.logprobs for c in story.second]
