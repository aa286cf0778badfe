"""The update on a GPU: bfloat16, the fused AdamW, and a card that is really full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.device import CUDA, load, make_policy, needs_cuda
from tests.policy.batches import (
    assert_equal,
    assert_same_gradients,
    gradients,
    grouped,
    keep_apart,
    make_batch,
    weights,
)

from rnow.algorithm.records import sampled_logprobs
from rnow.errors import RnowError
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.teacher.transformers import TransformersTeacher

pytestmark = [pytest.mark.gpu, needs_cuda]

MakeDir = Callable[..., Path]

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
SEQUENCES, LENGTH = 32, 1024
LONG_MASKS = ("." * 8 + "X" * (LENGTH - 8),) * SEQUENCES


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_float32_gradients_are_those_of_the_cpu(tiny_model_dir: MakeDir) -> None:
    on_cpu = load_causal_lm(
        tiny_model_dir(), vocabulary=100, dtype=torch.float32, device=torch.device("cpu")
    )
    expected = gradients(make_policy(on_cpu), make_batch())
    found = gradients(make_policy(load(tiny_model_dir())), make_batch())
    on_cpu_again = {name: gradient.cpu() for name, gradient in found.items()}
    assert_same_gradients(on_cpu_again, expected, tolerance=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("queries", [4, 2])
def test_a_group_that_shares_its_prompt_has_the_gradients_of_separate_rows(
    tiny_model_dir: MakeDir, attention: str, queries: int
) -> None:
    folder = tiny_model_dir(num_attention_heads=queries, num_key_value_heads=2)
    lm = load_causal_lm(
        folder, vocabulary=100, dtype=torch.float32, device=CUDA, attn_implementation=attention
    )
    assert lm.sharing is not None, lm.separate
    group = grouped(make_batch(("." * 40 + "X" * 20, "." * 40 + "X" * 9, "." * 40 + "X" * 30) * 3))
    shared = gradients(make_policy(lm), group)
    lm = load_causal_lm(folder, vocabulary=100, dtype=torch.float32, device=CUDA)
    assert_same_gradients(shared, gradients(keep_apart(make_policy(lm)), group), tolerance=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_shared_prompt_in_bfloat16_is_found_equal_to_its_rounding(
    tiny_model_dir: MakeDir, quantization: str
) -> None:
    lm = load(tiny_model_dir(), dtype=torch.bfloat16, quantization=quantization)
    assert lm.sharing is not None, lm.separate
    samples = [item.sample for item in grouped(make_batch(("." * 40 + "X" * 20,) * 8)).samples]
    found = TransformersTeacher(lm).score_now(samples)
    alone = TransformersTeacher(replace(lm, sharing=None)).score_now(samples)
    for name, evidence in found.items():
        gap = sampled_logprobs(evidence) - sampled_logprobs(alone[name])
        assert gap.abs().max() < 0.2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_bfloat16_base_trains_a_float32_adapter(
    tiny_model_dir: MakeDir, quantization: str
) -> None:
    lm = load(tiny_model_dir(), dtype=torch.bfloat16, quantization=quantization)
    policy = make_policy(lm, recomputed_layers=None)
    base = {
        name: parameter.detach().clone()
        for name, parameter in policy.model.named_parameters()
        if not parameter.requires_grad
    }
    before = weights(policy)
    result = policy.update(make_batch())
    assert not result.skipped
    for name, tensor in policy.adapter().tensors.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cuda"
        assert not torch.equal(tensor, before[name]), name
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())


def test_bfloat16_gradients_point_where_those_of_float32_do(tiny_model_dir: MakeDir) -> None:
    exact = gradients(make_policy(load(tiny_model_dir())), make_batch())
    rounded = gradients(make_policy(load(tiny_model_dir(), dtype=torch.bfloat16)), make_batch())
    left = torch.cat([tensor.flatten() for tensor in exact.values()])
    right = torch.cat([rounded[name].flatten().float() for name in exact])
    assert torch.nn.functional.cosine_similarity(left, right, dim=0) > 0.98
    assert right.norm() == pytest.approx(left.norm().item(), rel=0.1)


def test_the_fused_optimizer_continues_bit_for_bit(tiny_model_dir: MakeDir) -> None:
    straight = make_policy(load(tiny_model_dir()))
    for _ in range(2):
        straight.update(make_batch())
    saved = {name: tensor.clone().cpu() for name, tensor in weights(straight).items()}
    state = straight.state_dict()
    moments = {name: tensor.clone().cpu() for name, tensor in state["moments"].items()}
    straight.update(make_batch())

    resumed = make_policy(load(tiny_model_dir()))
    resumed.load_adapter(saved)
    resumed.load_state_dict({"updates": state["updates"], "moments": moments})
    resumed.update(make_batch())
    assert_equal(weights(resumed), weights(straight))


# ---- a full card ----------------------------------------------------------------------------------------------------


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """The process may hold so many bytes of the card."""
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work`` gives, and the most memory it was given."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = work()
    return found, torch.cuda.max_memory_reserved()


@pytest.fixture
def wide(tiny_model_dir: MakeDir) -> CausalLM:
    return load(tiny_model_dir(**WIDE))


def test_out_of_memory_halves_the_micro_batch_of_an_update(wide: CausalLM) -> None:
    batch = make_batch(LONG_MASKS)
    tokens = SEQUENCES * LENGTH
    policy = make_policy(wide, micro_batch_tokens=tokens // 8)
    expected, small = peak_of(lambda: gradients(policy, batch))
    policy._micro_batch_tokens = tokens
    _, large = peak_of(lambda: gradients(policy, batch))
    assert policy._micro_batch_tokens == tokens, "there is room for all at first"
    assert large > 2.5 * small
    with room_for(int(1.5 * small)):
        found = gradients(policy, batch)
    assert SEQUENCES * (LENGTH - 1) // 8 <= policy._micro_batch_tokens < tokens
    assert_same_gradients(found, expected, tolerance=1e-4)


def test_out_of_memory_with_one_sequence_is_an_error(wide: CausalLM) -> None:
    batch = make_batch(LONG_MASKS[:2])
    policy = make_policy(wide, micro_batch_tokens=LENGTH)
    _, needed = peak_of(lambda: gradients(policy, batch))
    idle = torch.cuda.memory_allocated()
    with room_for(idle + (needed - idle) // 4), pytest.raises(RnowError) as caught:
        policy.update(batch)
    assert caught.value.title == "Out of memory"
    assert "one sequence of 1024 tokens" in caught.value.message


def test_out_of_memory_halves_the_micro_batch_of_a_teacher(wide: CausalLM) -> None:
    samples = [item.sample for item in make_batch(LONG_MASKS).samples]
    tokens = SEQUENCES * LENGTH
    careful = TransformersTeacher(wide, micro_batch_tokens=tokens // 8)
    bold = TransformersTeacher(wide, micro_batch_tokens=tokens)
    expected, small = peak_of(lambda: careful.score_now(samples))
    _, large = peak_of(lambda: bold.score_now(samples))
    assert large > 2.5 * small
    with room_for(int(1.5 * small)):
        found = bold.score_now(samples)
    for sample in samples:
        torch.testing.assert_close(
            found[sample.id].teacher_logprobs,
            expected[sample.id].teacher_logprobs,
            atol=1e-4,
            rtol=0,
        )
