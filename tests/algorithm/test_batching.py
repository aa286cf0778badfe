from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnow.algorithm.batching import (
    build_batch,
    build_training_samples,
    collate,
    pad_right,
    plan_micro_batches,
    predicting_rows,
)
from rnow.algorithm.records import SampledEvidence, TrainingSample
from rnow.types import Sample

LENGTHS = st.lists(st.integers(1, 40), max_size=20)
MASKS = st.lists(
    st.lists(st.booleans(), min_size=0, max_size=9).map(lambda mask: [False, *mask]),
    min_size=1,
    max_size=5,
)


def _training(masks: list[list[bool]], *, teacher: bool = True) -> list[TrainingSample]:
    """Every number tells where it came from: token t of sample b has id 100 * b + t, logprob -(100 * b + t), ..."""
    return [
        TrainingSample(
            sample=Sample(
                id=f"p/{b}#0",
                dataset="dataset_0",
                token_ids=tuple(100 * b + t for t in range(len(mask))),
                loss_mask=tuple(mask),
                sampler_logprobs=tuple(-(100.0 * b + t) for t in range(len(mask))),
            ),
            reward_advantage=float(b) + 0.5,
            evidence=SampledEvidence(
                teacher_logprobs=torch.tensor(
                    [-1000.0 - 100.0 * b - t for t, on in enumerate(mask) if on]
                )
            )
            if teacher
            else None,
        )
        for b, mask in enumerate(masks)
    ]


@given(MASKS)
def test_index_i_describes_token_i_and_the_row_before_predicts_it(masks: list[list[bool]]) -> None:
    micro = collate(_training(masks), "cpu")
    where = [(b, t) for b, mask in enumerate(masks) for t, on in enumerate(mask) if on]
    width = max(len(mask) for mask in masks)

    assert micro.tokens.token_ids.shape == (len(masks), width)
    assert micro.tokens.targets.tolist() == [100 * b + t for b, t in where]
    assert micro.sampler_logprobs.tolist() == [-(100.0 * b + t) for b, t in where]
    assert micro.reward_advantages.tolist() == [b + 0.5 for b, _ in where]
    assert micro.evidence["teacher_logprobs"].tolist() == [
        -1000.0 - 100.0 * b - t for b, t in where
    ]
    assert micro.tokens.counts == tuple(sum(mask) for mask in masks)
    assert micro.tokens.sample_ids == tuple(f"p/{b}#0" for b in range(len(masks)))
    # The hidden state picked for a token sits on the token before it, in the same sequence.
    assert micro.tokens.token_ids.flatten()[micro.tokens.rows].tolist() == [
        100 * b + t - 1 for b, t in where
    ]
    assert (micro.tokens.rows // width).tolist() == [b for b, _ in where]


def test_padding_is_on_the_right() -> None:
    assert pad_right([(1, 2, 3), (4,)], pad_id=9).tolist() == [[1, 2, 3], [4, 9, 9]]


def test_rows_by_hand() -> None:
    masks = [[False, True, False, True], [False, False, True]]
    assert predicting_rows(masks, width=4).tolist() == [0, 2, 5]


def test_a_first_token_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="first token"):
        predicting_rows([[False, True], [True, True]], width=2)
    with pytest.raises(ValueError, match="first token"):
        collate(_training([[False, True], [True, True]]), "cpu")


def test_a_micro_batch_without_a_loss_token() -> None:
    micro = collate(_training([[False, False], [False]]), "cpu")
    assert micro.tokens.rows.dtype == micro.tokens.targets.dtype == torch.long
    assert (
        micro.tokens.rows.numel()
        == micro.tokens.targets.numel()
        == micro.reward_advantages.numel()
        == 0
    )
    assert micro.tokens.counts == (0, 0)


def test_without_a_teacher_there_is_no_teacher_logprob() -> None:
    assert collate(_training([[False, True]], teacher=False), "cpu").evidence == {}


@given(MASKS)
def test_n_counts_the_loss_tokens_of_the_whole_batch(masks: list[list[bool]]) -> None:
    batch = build_batch(_training(masks))
    assert batch.num_loss_tokens == sum(on for mask in masks for on in mask)
    assert len(batch.samples) == len(masks)


def test_samples_are_joined_by_id_not_by_position() -> None:
    items = _training([[False, True], [False, True], [False, True]])
    samples = [item.sample for item in items]
    advantages = {item.sample.id: item.reward_advantage for item in reversed(items)}
    evidence = {item.sample.id: item.evidence for item in reversed(items) if item.evidence}
    joined = build_training_samples(samples, advantages, evidence)
    assert [item.reward_advantage for item in joined] == [0.5, 1.5, 2.5]
    assert [item.evidence for item in joined] == [item.evidence for item in items]
    assert all(item.evidence is None for item in build_training_samples(samples, advantages, None))
    with pytest.raises(KeyError):
        build_training_samples(samples, advantages, {samples[0].id: evidence[samples[0].id]})


@given(LENGTHS, st.integers(1, 120))
def test_a_plan_covers_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_micro_batches(lengths, budget)
    assert sorted(index for part in plan for index in part) == list(range(len(lengths)))
    for part in plan:
        padded = len(part) * max(lengths[index] for index in part)
        assert padded <= budget or len(part) == 1
    longest = [max(lengths[index] for index in part) for part in plan]
    assert longest == sorted(longest, reverse=True)


@given(LENGTHS, st.integers(1, 120))
def test_a_plan_is_greedy_enough(lengths: list[int], budget: int) -> None:
    plan = plan_micro_batches(lengths, budget)
    for part in plan[:-1]:
        assert (len(part) + 1) * lengths[part[0]] > budget


def test_a_plan_does_not_depend_on_the_order_of_equal_work() -> None:
    lengths = [random.Random(0).randint(1, 30) for _ in range(12)]
    plan = plan_micro_batches(lengths, 64)
    turned = plan_micro_batches(lengths[::-1], 64)
    assert [sorted(lengths[i] for i in part) for part in plan] == [
        sorted(lengths[::-1][i] for i in part) for part in turned
    ]
