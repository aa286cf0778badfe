"""A policy that leaves the card between its updates learns exactly what one that stays learns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.test_offload import stored
from tests.policy.batches import make_batch
from tests.policy.conftest import MakePolicy
from tests.policy.test_nf4 import REQUESTS, load, packed
from tests.policy.test_nf4 import make_policy as make_nf4_policy
from tests.sampling.conformance import complete_all

from rnow.models.loading import CausalLM, take_apart
from rnow.models.offload import tensors_of
from rnow.policy.student import LoraPolicy
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher.transformers import TransformersTeacher


def nap(*sleepers: Any) -> None:
    async def sleep_and_wake() -> None:
        for sleeper in sleepers:
            await sleeper.sleep()
        for sleeper in sleepers:
            await sleeper.wake()

    asyncio.run(sleep_and_wake())


def owned(lm: CausalLM) -> CausalLM:
    """The same model without the file behind it: on a CPU float32 weights are mapped from there, and cannot be freed."""
    for tensor in tensors_of(lm.model):
        tensor.data = tensor.data.clone()
    return take_apart(lm.model, vocabulary=lm.head.vocabulary, quantization=lm.quantization)


def learned(policy: LoraPolicy) -> dict[str, torch.Tensor]:
    """Adapter and moments, copied."""
    found = dict(policy.adapter().tensors) | policy.state_dict()["moments"]
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_updates_around_naps_are_bit_identical(
    make_policy: MakePolicy, checkpointing: bool
) -> None:
    staying, moving = (
        make_policy(recomputed_layers=None if checkpointing else 0) for _ in range(2)
    )
    batch = make_batch()
    for _ in range(3):
        nap(moving)
        expected, got = staying.update(batch), moving.update(batch)
        assert got.metrics == expected.metrics
        for sample, logprobs in expected.streams["logprobs"].items():
            assert torch.equal(got.streams["logprobs"][sample], logprobs)
    assert_equal(learned(moving), learned(staying))


def test_nothing_of_it_stays_behind_and_every_object_is_itself(
    tiny_model_dir: Callable[..., Path],
) -> None:
    policy = make_nf4_policy(owned(load(tiny_model_dir(), "none")))
    policy.update(make_batch())
    before = learned(policy)
    base = {name: p for name, p in policy.model.named_parameters() if "lora_" not in name}
    values = {name: p.detach().clone() for name, p in base.items()}
    objects = {name: id(p) for name, p in policy.model.named_parameters()}
    optimized = [id(p) for group in policy._adamw.param_groups for p in group["params"]]
    moments = [id(state["exp_avg"]) for state in policy._adamw.state.values()]

    asyncio.run(policy.sleep())
    assert stored(base.values()) == 0
    assert stored([policy.lm.head.weight]) == 0, "the head is a view of the base"
    assert_equal(learned(policy), before)
    with pytest.raises(RuntimeError, match="these weights sleep"):
        policy.update(make_batch())
    with pytest.raises(RuntimeError, match="the trainer sleeps"):
        policy.load_state_dict(policy.state_dict())

    asyncio.run(policy.wake())
    assert {name: id(p) for name, p in policy.model.named_parameters()} == objects
    assert [id(p) for g in policy._adamw.param_groups for p in g["params"]] == optimized
    assert [id(state["exp_avg"]) for state in policy._adamw.state.values()] == moments
    assert_equal({name: p.detach() for name, p in base.items()}, values)
    assert_equal(learned(policy), before)
    policy.update(make_batch())
    assert not torch.equal(
        next(iter(policy.adapter().tensors.values())), next(iter(before.values()))
    )


def test_a_checkpoint_is_loaded_into_a_policy_that_slept(make_policy: MakePolicy) -> None:
    policy, other = make_policy(), make_policy()
    policy.update(make_batch())
    nap(other)
    other.load_adapter(policy.adapter().tensors)
    other.load_state_dict(policy.state_dict())
    nap(other)
    policy.update(make_batch())
    other.update(make_batch())
    assert_equal(learned(other), learned(policy))


@pytest.mark.parametrize("mode", ["merged", "shared"])
def test_the_embedded_samplers_weights_follow(
    tiny_model_dir: Callable[..., Path], mode: str
) -> None:
    lm = owned(load(tiny_model_dir(vocab_size=128), "none"))
    sampler = TransformersSampler(lm, mode=mode)  # type: ignore[arg-type]
    policy = make_nf4_policy(lm)
    policy.take_along(lambda: tensors_of(sampler.model))
    sampler.load_policy(policy.adapter(), version=1)
    expected = complete_all(sampler, REQUESTS)
    adapter = learned(policy)

    asyncio.run(policy.sleep())
    trained = {id(p) for p in policy._parameters.values()}
    assert stored(t for t in tensors_of(sampler.model) if id(t) not in trained) == 0
    assert_equal(learned(policy), adapter)
    asyncio.run(policy.wake())
    assert complete_all(sampler, REQUESTS) == expected
    sampler.load_policy(policy.adapter(), version=1)
    assert complete_all(sampler, REQUESTS) == expected


def test_an_nf4_base_comes_back_with_its_scales(tiny_model_dir: Callable[..., Path]) -> None:
    pytest.importorskip("bitsandbytes")
    lm = load(tiny_model_dir(vocab_size=128), "nf4")
    sampler = TransformersSampler.for_student(lm)
    assert sampler.mode == "shared"
    policy = make_nf4_policy(lm)
    before = packed(lm)
    expected = complete_all(sampler, REQUESTS)
    nap(policy)
    assert_equal(packed(lm), before)
    assert complete_all(sampler, REQUESTS) == expected


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_teacher_says_the_same_after_a_nap(
    tiny_model_dir: Callable[..., Path], quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    lm = owned(load(tiny_model_dir(vocab_size=128), quantization))
    teacher = TransformersTeacher(lm)
    ids = list(REQUESTS[3][0])
    expected = teacher.compute_logprobs(ids)
    asyncio.run(teacher.sleep())
    assert stored(tensors_of(lm.model)) == 0
    with pytest.raises(RuntimeError, match="sleep"):
        teacher.compute_logprobs(ids)
    asyncio.run(teacher.wake())
    assert teacher.compute_logprobs(ids) == expected
