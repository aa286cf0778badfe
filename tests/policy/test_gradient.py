"""The whole gradient of the policy: against a naive form, and its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.algorithm import reference
from tests.policy.batches import (
    MASKS,
    assert_equal,
    assert_same_gradients,
    gradients,
    keep_apart,
    make_batch,
)
from tests.policy.conftest import MakePolicy
from torch import Tensor

from rnow.algorithm.batching import build_batch
from rnow.algorithm.records import Batch, SampledEvidence, TrainingSample
from rnow.policy.student import LoraPolicy

MIXED: dict[str, Any] = {"kl_penalty_coef": 0.7, "reward_coef": 0.4, "kl_clamp": 1.5}


def _naive_gradients(policy: LoraPolicy, batch: Batch) -> dict[str, Tensor]:
    """The model's own logits, one sequence at a time, the formulas of the reference, autograd."""
    objective = policy._objective
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for item in batch.samples:
        ids = torch.tensor(item.sample.token_ids)
        logits = policy.model(input_ids=ids[None]).logits[0].double()
        logprobs = reference.log_softmax(logits[:, :100] / objective.temperature)
        judged = None if item.evidence is None else iter(item.evidence.teacher_logprobs)
        for position, on in enumerate(item.sample.loss_mask):
            if not on:
                continue
            live = logprobs[position - 1, ids[position]]
            teacher = None if judged is None else next(judged)
            advantage = reference.shaped_advantage(
                item.reward_advantage,
                live.item(),
                None if teacher is None else teacher.item(),
                kl_penalty_coef=objective.kl_penalty_coef,
                reward_coef=objective.reward_coef,
                kl_clamp=objective.kl_clamp,
            )
            total = total + reference.token_loss(
                live,
                item.sample.sampler_logprobs[position],
                advantage,
                loss_fn=objective.loss_fn,
                clip_ratio_low=objective.clip_ratio_low,
                clip_ratio_high=objective.clip_ratio_high,
                ratio_cap=objective.ratio_cap,
            )
            count += 1
    found = torch.autograd.grad(total / count, list(policy._parameters.values()))
    return dict(zip(policy._parameters, found, strict=True))


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({}, MIXED | {"loss_fn": "ppo"}),
        ({}, MIXED | {"loss_fn": "importance_sampling"}),
        ({}, {"kl_penalty_coef": 0.1, "temperature": 0.8}),
        ({"vocab_size": 128}, {"kl_penalty_coef": 1.0, "loss_fn": "importance_sampling"}),
        ({"tie_word_embeddings": True}, {"kl_penalty_coef": 1.0}),
    ],
    ids=["ppo", "importance_sampling", "temperature", "padded_head", "tied_head"],
)
def test_is_the_gradient_of_the_formula(
    make_policy: MakePolicy, model: dict[str, Any], objective: dict[str, Any]
) -> None:
    policy = make_policy(model=model, objective=objective)
    batch = make_batch()
    assert_same_gradients(gradients(policy, batch), _naive_gradients(policy, batch))


def test_how_the_batch_is_cut_and_ordered_does_not_matter(make_policy: MakePolicy) -> None:
    batch = make_batch()
    one_by_one = make_policy(objective=MIXED, micro_batch_tokens=1)
    expected = gradients(one_by_one, batch)

    padded_width = len(MASKS) * max(map(len, MASKS))
    for budget in (padded_width, 30):
        policy = make_policy(objective=MIXED, micro_batch_tokens=budget)
        assert_same_gradients(gradients(policy, batch), expected)
        permuted = build_batch([batch.samples[i] for i in (3, 1, 7, 0, 6, 2, 5, 4)])
        assert_same_gradients(gradients(policy, permuted), expected)


def _followed_by_tool_output(item: TrainingSample, count: int) -> TrainingSample:
    sample = item.sample
    return replace(
        item,
        sample=replace(
            sample,
            token_ids=(*sample.token_ids, *range(5, 5 + count)),
            loss_mask=(*sample.loss_mask, *[False] * count),
            sampler_logprobs=(*sample.sampler_logprobs, *[0.0] * count),
        ),
    )


def test_what_follows_the_last_loss_token_does_not_matter(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=MIXED)
    batch = make_batch()
    longer = [_followed_by_tool_output(item, 3 * i) for i, item in enumerate(batch.samples)]
    assert_same_gradients(gradients(policy, build_batch(longer)), gradients(policy, batch))


def test_numbers_at_masked_tokens_are_never_read(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=MIXED)
    batch = make_batch()

    def spoilt(item: TrainingSample) -> TrainingSample:
        sample = item.sample
        sampler = tuple(
            value if on else float("nan")
            for value, on in zip(sample.sampler_logprobs, sample.loss_mask, strict=True)
        )
        return replace(item, sample=replace(sample, sampler_logprobs=sampler))

    spoilt_batch = build_batch([spoilt(item) for item in batch.samples])
    assert_equal(gradients(policy, spoilt_batch), gradients(policy, batch))


def test_hidden_states_that_predict_masked_tokens_get_no_gradient(make_policy: MakePolicy) -> None:
    policy = keep_apart(make_policy(objective=MIXED | {"loss_fn": "importance_sampling"}))
    batch = make_batch((MASKS[1], MASKS[3], MASKS[4]))
    seen: list[Tensor] = []

    def keep(_module: Any, _arguments: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    policy.lm.body.register_forward_hook(keep)
    policy._accumulate(batch)
    (hidden,) = seen
    assert hidden.grad is not None
    longest_first = sorted(batch.samples, key=lambda item: -len(item.sample.token_ids))
    for row, item in zip(hidden.grad, longest_first, strict=True):
        mask = item.sample.loss_mask
        for position, gradient in enumerate(row):
            predicts_loss_token = position + 1 < len(mask) and mask[position + 1]
            assert bool((gradient != 0).any()) == predicts_loss_token, (item.sample.id, position)


def test_every_token_of_the_step_weighs_the_same(make_policy: MakePolicy) -> None:
    """N * gradient(batch) = sum over sequences of N_i * gradient(sequence i alone)."""
    policy = make_policy(objective=MIXED)
    batch = make_batch()
    expected = {name: torch.zeros_like(p) for name, p in policy._parameters.items()}
    for item in batch.samples:
        alone = build_batch([item])
        for name, gradient in gradients(policy, alone).items():
            expected[name] += gradient * alone.num_loss_tokens / batch.num_loss_tokens
    assert_same_gradients(gradients(policy, batch), expected)


def test_a_sequence_without_loss_tokens_changes_nothing(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=MIXED, micro_batch_tokens=1)
    batch = make_batch()
    silent = replace(
        make_batch(("." * 15,)).samples[0],
        sample=replace(make_batch(("." * 15,)).samples[0].sample, id="dataset_0/silent#0"),
    )
    more = build_batch([*batch.samples, silent])
    assert more.num_loss_tokens == batch.num_loss_tokens
    assert_equal(gradients(policy, more), gradients(policy, batch))


def _judged_by_itself(policy: LoraPolicy, batch: Batch) -> Batch:
    """The same batch with a teacher that equals the student."""
    live = policy._accumulate(batch).by_sample()["logprobs"]

    def evidence(item: TrainingSample) -> SampledEvidence:
        return SampledEvidence(teacher_logprobs=live[item.sample.id])

    return build_batch([replace(item, evidence=evidence(item)) for item in batch.samples])


def test_without_kl_it_is_plain_grpo(make_policy: MakePolicy) -> None:
    grpo = make_policy(objective={"reward_coef": 1.0, "kl_penalty_coef": 0.0})
    expected = gradients(grpo, make_batch(teacher=False))
    assert_same_gradients(expected, _naive_gradients(grpo, make_batch(teacher=False)))

    assert_equal(gradients(grpo, make_batch()), expected)
    shaped = make_policy(objective={"reward_coef": 1.0, "kl_penalty_coef": 1.0})
    assert_equal(gradients(shaped, _judged_by_itself(shaped, make_batch())), expected)


def test_a_teacher_equal_to_the_student_teaches_nothing(make_policy: MakePolicy) -> None:
    policy = make_policy(objective={"kl_penalty_coef": 1.0})
    for gradient in gradients(policy, _judged_by_itself(policy, make_batch())).values():
        assert not gradient.any()


def test_only_the_teacher_pulls_when_rewards_are_for_tracking(make_policy: MakePolicy) -> None:
    policy = make_policy(objective={"kl_penalty_coef": 0.1})
    batch = make_batch()
    other = build_batch([replace(item, reward_advantage=9.0) for item in batch.samples])
    assert_equal(gradients(policy, other), gradients(policy, batch))


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["no_dropout", "base_with_dropout"])
def test_gradient_checkpointing_changes_memory_only(
    make_policy: MakePolicy, dropout: float
) -> None:
    model = {"attention_dropout": dropout}
    plain = make_policy(objective=MIXED, model=model)
    checkpointed = make_policy(objective=MIXED, model=model, gradient_checkpointing=True)
    forwards = [0]
    layer = checkpointed.lm.body.layers[0]
    layer.self_attn.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))

    found = gradients(checkpointed, make_batch())
    assert forwards == [2], "the forward pass was not repeated: checkpointing is off"
    assert_same_gradients(found, gradients(plain, make_batch()))
    assert not checkpointed.model.training


def test_every_number_of_recomputed_layers_gives_the_same_bits(make_policy: MakePolicy) -> None:
    model, batch = {"num_hidden_layers": 4}, make_batch()
    plain = gradients(make_policy(objective=MIXED, model=model), batch)
    for layers in (0, 1, 3, 4, None):
        policy = make_policy(
            objective=MIXED, model=model, gradient_checkpointing=True, recomputed_layers=layers
        )
        forwards = [0] * 4
        for index, layer in enumerate(policy.lm.body.layers):
            layer.self_attn.register_forward_hook(
                lambda *_, index=index, forwards=forwards: forwards.__setitem__(
                    index, forwards[index] + 1
                )
            )
        found = gradients(policy, batch)
        again = 4 if layers is None else layers
        assert forwards == [2] * again + [1] * (4 - again)
        for name, gradient in plain.items():
            assert torch.equal(found[name], gradient), (layers, name)


def test_live_logprobs_are_the_model_s_own_and_keyed_by_sample(make_policy: MakePolicy) -> None:
    policy = make_policy(micro_batch_tokens=30, objective={"temperature": 0.8})
    batch = make_batch()
    live = policy._accumulate(batch).by_sample()["logprobs"]
    assert live.keys() == {item.sample.id for item in batch.samples}
    for item in batch.samples:
        ids = torch.tensor(item.sample.token_ids)
        with torch.no_grad():
            logits = policy.model(input_ids=ids[None]).logits[0]
        logprobs = torch.log_softmax(logits.double() / 0.8, -1)[:-1].gather(1, ids[1:, None])[:, 0]
        expected = logprobs[torch.tensor(item.sample.loss_mask[1:])]
        torch.testing.assert_close(live[item.sample.id].double(), expected, rtol=0, atol=1e-5)
