"""Rows as a source of samples, and their held-out loss."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from rnow.algorithm.records import Evidence, SampledEvidence, TeacherNeeds
from rnow.training.held_out import AT_ONCE, held_out_loss
from rnow.training.metrics import row_metrics
from rnow.training.residency import StageClock
from rnow.training.rows import NoSampler, RowSource, TokenRow
from rnow.types import Adapter, Sample, SamplingParams


def row(number: int, length: int = 4, dataset: str = "rows") -> TokenRow:
    mask = [False, *[True] * (length - 1)]
    return TokenRow.of(f"{dataset}/{number}#0", dataset, range(number, number + length), mask)


def source(rows: int, *, batch_size: int = 4, shuffle: bool = True, seed: int = 0) -> RowSource:
    return RowSource(
        rows=[row(number) for number in range(rows)],
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
    )


def ids(of: RowSource, step: int) -> list[str]:
    data = asyncio.run(of.batch(step, StageClock()))
    assert not data.groups
    return [item.sample.id for item in data.training]


def test_a_row_is_the_sample_that_it_holds() -> None:
    sample = row(7).sample()
    assert sample.token_ids == (7, 8, 9, 10)
    assert sample.loss_mask == (False, True, True, True)
    assert len(sample.sampler_logprobs) == 4
    assert row(7).loss_tokens == 3


def test_an_epoch_is_every_row_once() -> None:
    of = source(10)
    assert of.steps_per_epoch == 3
    sizes = [len(ids(of, step)) for step in (1, 2, 3)]
    assert sizes == [4, 4, 2], "the last step takes what is left"
    epochs = [
        [name for step in range(start, start + 3) for name in ids(of, step)] for start in (1, 4)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"rows/{n}#0" for n in range(10))
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_its_number_and_the_seed_alone() -> None:
    of = source(10)
    assert [ids(of, step) for step in (5, 1, 5)] == [ids(source(10), step) for step in (5, 1, 5)]
    assert ids(source(10, seed=1), 1) != ids(of, 1)
    assert ids(source(10, shuffle=False), 2) == [f"rows/{n}#0" for n in range(4, 8)]


def test_what_a_step_trains_on_is_counted() -> None:
    data = asyncio.run(source(8).batch(1, StageClock()))
    assert row_metrics(data) == {
        "tokens/prompt": 4.0,
        "tokens/completion": 12.0,
        "tokens/total": 16.0,
    }


class ByToken:
    """Finds token n e^-n probable."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        self.asked.append(len(samples))
        return {
            sample.id: SampledEvidence(
                teacher_logprobs=-torch.tensor(sample.token_ids[1:], dtype=torch.float32)
            )
            for sample in samples
        }


def test_the_loss_is_the_mean_over_tokens_not_over_rows() -> None:
    rows = [row(1, 2), row(3, 4)]  # tokens 2, and 4 5 6
    found = asyncio.run(held_out_loss(rows, ByToken()))
    assert found == {"loss": 17 / 4, "perplexity": math.exp(17 / 4)}
    several = asyncio.run(held_out_loss([row(1, 2, "a"), row(3, 4, "b")], ByToken()))
    assert (several["loss"], several["loss/a"], several["loss/b"]) == (17 / 4, 2.0, 5.0)
    assert asyncio.run(held_out_loss([row(900, 3)], ByToken()))["perplexity"] == math.exp(700)


def test_many_rows_are_scored_some_at_a_time() -> None:
    student = ByToken()
    asyncio.run(held_out_loss([row(1)] * (AT_ONCE + 1), student))
    assert student.asked == [AT_ONCE, 1]


def test_nothing_is_sampled() -> None:
    sampler = NoSampler()
    sampler.load_policy(Adapter(tensors={}, config={}), version=1)
    params = SamplingParams(max_tokens=1, stop_token_ids=(0,))
    with sampler.live_rollout(), pytest.raises(RuntimeError, match="nothing is sampled"):
        asyncio.run(sampler.complete((1,), params, 0))
