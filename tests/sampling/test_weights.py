"""Merged weights: the same numbers as the PEFT model, from a base that is never touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sampling.conformance import HEAD_ROWS, VOCABULARY, load_student, make_policy

from rnow.algorithm.products import can_pack
from rnow.errors import ModelError
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.policy.student import LoraPolicy
from rnow.sampling.packed import PackedLinear
from rnow.sampling.weights import MergedWeights, sampling_mode

IDS = torch.tensor([[5, 16, 27, 38, 49, 60, 71, 82]])


@pytest.fixture(autouse=True)
def _packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layers of a larger model are."""
    monkeypatch.setattr("rnow.algorithm.products.PACKED_NUMBERS", 0)


@pytest.fixture
def student(tiny_model_dir: Callable[..., Path]) -> CausalLM:
    return load_student(tiny_model_dir(vocab_size=HEAD_ROWS))


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=IDS).logits[0, :, :VOCABULARY], dim=-1)


def test_the_merged_copy_speaks_like_the_peft_model(student: CausalLM) -> None:
    merged = MergedWeights(student)
    base = logprobs(student.model)
    policy = make_policy(student)
    merged.load(policy.adapter())
    assert (logprobs(policy.model) - base).abs().max() > 0.1, "the adapter does something"
    torch.testing.assert_close(logprobs(merged.lm.model), logprobs(policy.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("packs", [True, False])
def test_what_was_let_go_comes_back_bit_for_bit(
    student: CausalLM, packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packs:
        monkeypatch.setattr("rnow.algorithm.products._has_onednn", lambda: False)
    merged = MergedWeights(student)
    policy = make_policy(student)
    merged.load(policy.adapter())
    before = logprobs(merged.lm.model)
    held = [own.layer for own in merged._own.values()]
    assert all(isinstance(layer, PackedLinear) == packs for layer in held)
    merged.let_go()
    assert not any(layer._packed is not None if packs else layer.weight.numel() for layer in held)
    with pytest.raises((RuntimeError, AssertionError)):
        logprobs(merged.lm.model)
    merged.load(policy.adapter())
    assert torch.equal(logprobs(merged.lm.model), before)


def test_every_load_replaces_the_last(student: CausalLM) -> None:
    merged = MergedWeights(student)
    base = logprobs(student.model)
    policy = make_policy(student)
    strong = policy.adapter()
    merged.load(strong)
    nothing = replace(strong, tensors={name: t * 0 for name, t in strong.tensors.items()})
    merged.load(nothing)
    torch.testing.assert_close(logprobs(merged.lm.model), base, atol=1e-6, rtol=0)


class ReadsItsWeight(torch.nn.Module):
    """A layer that multiplies by another's weight itself."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mlp: Any = self.inner
        (x,) = args
        return mlp.down_proj(
            mlp.act_fn(torch.nn.functional.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x)
        )


@pytest.mark.parametrize("reads", [False, True])
def test_a_model_that_reads_its_weights_gets_plain_ones(student: CausalLM, reads: bool) -> None:
    for layer in student.body.layers if reads else ():
        layer.mlp = ReadsItsWeight(layer.mlp)
    merged = MergedWeights(student)
    policy = make_policy(student)
    if reads:  # the trainer's layer must add the adapter there as well
        adapter = policy.adapter()
        kept = {name: t for name, t in adapter.tensors.items() if "gate_proj" not in name}
        policy.load_adapter(kept | {n: t * 0 for n, t in adapter.tensors.items() if n not in kept})
    merged.load(policy.adapter())
    packed = [m for m in merged.lm.model.modules() if isinstance(m, PackedLinear)]
    assert bool(packed) == (not reads and can_pack(torch.ones(8, 8)))
    torch.testing.assert_close(logprobs(merged.lm.model), logprobs(policy.model), atol=1e-5, rtol=0)
    merged.load(policy.adapter())
    torch.testing.assert_close(logprobs(merged.lm.model), logprobs(policy.model), atol=1e-5, rtol=0)


def test_without_onednn_the_layers_stay_plain(
    student: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.algorithm.products._has_onednn", lambda: False)
    merged = MergedWeights(student)
    policy = make_policy(student)
    merged.load(policy.adapter())
    assert not any(isinstance(m, PackedLinear) for m in merged.lm.model.modules())
    torch.testing.assert_close(logprobs(merged.lm.model), logprobs(policy.model), atol=1e-5, rtol=0)


def test_the_base_never_changes(student: CausalLM) -> None:
    before = {name: t.clone() for name, t in student.model.state_dict().items()}
    merged = MergedWeights(student)
    policy = make_policy(student)
    for count in range(25):
        policy.load_adapter({name: t * (-1.1) ** count for name, t in make_adapter(policy).items()})
        merged.load(policy.adapter())
    after = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in policy.model.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def make_adapter(policy: LoraPolicy) -> dict[str, torch.Tensor]:
    return {name: t.clone() * 0.5 for name, t in policy.adapter().tensors.items()}


def test_what_no_adapter_touches_is_not_copied(student: CausalLM) -> None:
    merged = MergedWeights(student)
    policy = make_policy(student)
    merged.load(policy.adapter())
    assert merged.lm.head.weight.data_ptr() == student.head.weight.data_ptr()
    shared = student.model.get_input_embeddings().weight.data_ptr()
    assert merged.lm.model.get_input_embeddings().weight.data_ptr() == shared


def test_nothing_of_the_copy_is_trained(student: CausalLM) -> None:
    merged = MergedWeights(student)
    merged.load(make_policy(student).adapter())
    layers = [*merged.lm.model.modules()]
    own = [p for p in merged.lm.model.parameters() if p.data_ptr() not in pointers(student)]
    own += [layer._packed for layer in layers if isinstance(layer, PackedLinear)]  # type: ignore[misc]
    assert own, "the merged layers have weights of their own"
    assert not any(parameter.requires_grad for parameter in own)


def pointers(student: CausalLM) -> set[int]:
    return {parameter.data_ptr() for parameter in student.model.parameters()}


def test_the_head_stays_cut(student: CausalLM) -> None:
    assert MergedWeights(student).lm.head.vocabulary == VOCABULARY


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"x": 2}},
        {"alpha_pattern": {"x": 2}},
    ],
)
def test_adapters_that_are_no_plain_product_are_refused(
    student: CausalLM, change: dict[str, Any]
) -> None:
    merged = MergedWeights(student)
    adapter = make_policy(student).adapter()
    with pytest.raises(ModelError, match="plain LoRA"):
        merged.load(replace(adapter, config={**adapter.config, **change}))


def test_tied_embeddings_keep_their_rows(tiny_model_dir: Callable[..., Path]) -> None:
    lm = load_causal_lm(
        tiny_model_dir(tie_word_embeddings=True),
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    merged = MergedWeights(lm)
    policy = make_policy(lm)
    merged.load(policy.adapter())
    torch.testing.assert_close(logprobs(merged.lm.model), logprobs(policy.model), atol=1e-5, rtol=0)


def test_only_plain_float32_is_merged(student: CausalLM) -> None:
    assert sampling_mode(student) == "merged"
    assert sampling_mode(replace(student, quantization="nf4")) == "shared"
    assert sampling_mode(replace(student, quantization="int8")) == "shared"
    student.model.to(torch.bfloat16)
    assert sampling_mode(student) == "shared"
