"""Rows of several samples: what is planned holds every sample once, and a row reads as each of them alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnow.algorithm.batching import collate, pad, read_tokens
from rnow.algorithm.packing import (
    MAX_PADDING,
    MAX_ROW_TOKENS,
    common_prefix,
    lay_out,
    plan_lengths,
    plan_passes,
    row_tokens,
)
from rnow.algorithm.records import SampledEvidence, TrainingSample
from rnow.types import Sample

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)
SEQUENCES = st.lists(TOKENS, min_size=1, max_size=12)
"""Of three ids: they begin alike in every way there is."""


def outputs_of(sequences: Sequence[Sequence[int]]) -> list[int]:
    """A quarter of each is the student's."""
    return [-(-len(sequence) // 4) for sequence in sequences]


def seen_by(layout_ends: list[int], query: int) -> list[int]:
    """The keys that a query sees, by the rule of ``Branches``."""
    return [key for key in range(query + 1) if query < layout_ends[key]]


@given(SEQUENCES)
def test_each_token_sees_what_it_sees_alone(sequences: list[list[int]]) -> None:
    for row in (sequences, sorted(sequences)):
        layout = lay_out(row)
        for sequence, places in zip(row, layout.places, strict=True):
            assert [layout.token_ids[place] for place in places] == sequence
            for depth, place in enumerate(places):
                assert layout.positions[place] == depth
                assert seen_by(layout.ends, place) == places[: depth + 1]


@given(SEQUENCES)
def test_sorted_no_beginning_is_there_twice(sequences: list[list[int]]) -> None:
    beginnings = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    assert len(lay_out(sorted(sequences)).token_ids) == len(beginnings)


@given(TOKENS, TOKENS)
def test_common_prefix(one: list[int], other: list[int]) -> None:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert common_prefix(one, other) == common_prefix(tuple(other), tuple(one)) == count


@given(SEQUENCES, st.integers(1, 60), st.sampled_from([0.5, 8.0, 1e3, 1e9]))
def test_every_sample_is_in_one_row_of_a_pass_that_fits(
    sequences: list[list[int]], max_tokens: int, cells_per_token: float
) -> None:
    plan = plan_passes(
        sequences, outputs_of(sequences), max_tokens=max_tokens, cells_per_token=cells_per_token
    )
    assert sorted(i for rows in plan for row in rows for i in row) == [*range(len(sequences))]
    for rows in plan:
        layouts = [lay_out([sequences[i] for i in row]) for row in rows]
        padded = len(rows) * max(len(layout.token_ids) for layout in layouts)
        alone = len(rows) == 1 and len(rows[0]) == 1
        assert padded <= max_tokens or alone


def groups_of(
    seed: int, *, groups: int, size: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    found = []
    for _ in range(groups):
        shared = [draw.randrange(1000) for _ in range(draw.randint(*prompt))]
        for _ in range(size):
            own = [draw.randrange(1000) for _ in range(draw.randint(*answer))]
            found.append((*shared, *own))
    return found


SHAPES = {
    "words": {"groups": 32, "size": 4, "prompt": (20, 30), "answer": (4, 36)},
    "long prompts": {"groups": 4, "size": 8, "prompt": (150, 250), "answer": (1, 64)},
    "no two alike": {"groups": 40, "size": 1, "prompt": (1, 300), "answer": (1, 100)},
    "long answers": {"groups": 2, "size": 8, "prompt": (100, 200), "answer": (200, 3000)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_tokens", [512, 4096, 16384])
@pytest.mark.parametrize("cells_per_token", [300.0, 6000.0])
def test_little_is_padding_and_no_more_is_computed_than_apart(
    shape: str, max_tokens: int, cells_per_token: float
) -> None:
    for seed in range(3):
        sequences = groups_of(seed, **SHAPES[shape])
        plan = plan_passes(
            sequences, outputs_of(sequences), max_tokens=max_tokens, cells_per_token=cells_per_token
        )
        held = padded = 0
        for rows in plan:
            lengths = [len(lay_out([sequences[i] for i in row]).token_ids) for row in rows]
            held, padded = held + sum(lengths), padded + len(rows) * max(lengths)
            assert all(
                len(row) == 1 or n <= MAX_ROW_TOKENS for row, n in zip(rows, lengths, strict=True)
            )
        assert padded - held <= MAX_PADDING * padded
        assert held <= sum(map(len, sequences))


def test_a_group_is_computed_once_where_that_costs_less() -> None:
    sequences = groups_of(0, groups=2, size=4, prompt=(200, 200), answer=(64, 64))

    def computed(cells_per_token: float) -> int:
        plan = plan_passes(
            sequences, outputs_of(sequences), max_tokens=4096, cells_per_token=cells_per_token
        )
        return sum(
            len(lay_out([sequences[i] for i in row]).token_ids) for rows in plan for row in rows
        )

    assert computed(4608.0) == 2 * (200 + 4 * 64)
    assert computed(10.0) == 8 * 264, "attention to a long row would cost more than the prompts"


def test_equal_answers_are_read_for_each_sample_and_count_so() -> None:
    """A student that has become sure writes the same answer again and again: the head sees every one of them."""
    same = [tuple(range(100))] * 40
    plan = plan_passes(same, [50] * 40, max_tokens=500, cells_per_token=1e6)
    assert [sum(map(len, rows)) for rows in plan] == [10] * 4
    for rows in plan:
        assert sum(len(lay_out([same[i] for i in row]).token_ids) for row in rows) <= 100 * len(
            rows
        )


def test_a_prefix_of_prompts_is_shared_by_their_groups() -> None:
    """The system prompt, then the prompt, then what was answered before: as far as they are equal."""
    system = tuple(range(300))
    first, second = (*system, 400, 401), (*system, 500)
    turns = [(*first, 1, 2, 3, 7), (*first, 1, 2, 9, 9), (*second, 4), (*second, 5, 6)]
    (rows,) = plan_passes(turns, outputs_of(turns), max_tokens=4096, cells_per_token=1e6)
    assert rows == ((0, 1, 2, 3),)
    layout = lay_out([turns[i] for i in rows[0]])
    assert len(layout.token_ids) == 300 + 2 + 2 + 2 + 2 + 1 + 1 + 2


def test_the_order_of_the_samples_changes_no_pass() -> None:
    sequences = groups_of(1, **SHAPES["words"])
    turned = sequences[::-1]
    last = len(sequences) - 1
    plan, again = (
        plan_passes(given, outputs_of(given), max_tokens=512, cells_per_token=700.0)
        for given in (sequences, turned)
    )
    for rows, other in zip(plan, again, strict=True):
        assert [[sequences[i] for i in row] for row in rows] == [
            [turned[i] for i in row] for row in other
        ]
    assert {i for rows in plan for row in rows for i in row} == {
        last - i for rows in again for row in rows for i in row
    }


@given(SEQUENCES, st.integers(1, 60))
def test_lengths_alone_give_the_same_plan(sequences: list[list[int]], max_tokens: int) -> None:
    sequences.sort()
    shared = [0, *(common_prefix(a, b) for a, b in itertools.pairwise(sequences))]
    lengths = [*map(len, sequences)]
    settings = {"max_tokens": max_tokens, "cells_per_token": 50.0}
    plan = plan_lengths(lengths, shared, outputs_of(sequences), **settings)
    assert plan == plan_passes(sequences, outputs_of(sequences), **settings)
    for row in (row for rows in plan for row in rows):
        laid_out = len(lay_out([sequences[i] for i in row]).token_ids)
        assert row_tokens(lengths, shared, row) == laid_out


def sample_of(number: int, token_ids: list[int], mask: list[bool]) -> Sample:
    return Sample(
        id=f"p/{number}#0",
        dataset="d",
        token_ids=tuple(token_ids),
        loss_mask=tuple(mask),
        sampler_logprobs=(-1.0,) * len(mask),
    )


@given(st.lists(st.tuples(TOKENS, st.randoms()), min_size=1, max_size=8), st.integers(1, 4))
def test_the_row_that_predicts_a_token_ends_with_what_precedes_it(
    drawn: list[tuple[list[int], random.Random]], in_a_row: int
) -> None:
    samples = [
        sample_of(n, ids, [False, *(draw.random() < 0.5 for _ in ids[1:])])
        for n, (ids, draw) in enumerate(drawn)
    ]
    counts = [len(samples[i : i + in_a_row]) for i in range(0, len(samples), in_a_row)]
    tokens = pad(samples, "cpu", counts)
    batch, width = tokens.token_ids.shape
    assert tokens.counts == tuple(sum(sample.loss_mask) for sample in samples)
    wanted = [
        (list(s.token_ids[:t]), s.token_ids[t])
        for s in samples
        for t, on in enumerate(s.loss_mask)
        if on
    ]
    found = []
    for place, target in zip(tokens.rows.tolist(), tokens.targets.tolist(), strict=True):
        row, query = divmod(place, width)
        ids = tokens.token_ids[row].tolist()
        keys = range(query + 1)
        if tokens.branches is not None:
            keys = seen_by(tokens.branches.ends[row].tolist(), query)
            assert tokens.branches.positions[row, query] == len(keys) - 1
        found.append(([ids[key] for key in keys], target))
    assert found == wanted
    assert batch == len(counts)


def test_tokens_after_the_last_that_predicts_are_left_out() -> None:
    assert read_tokens(sample_of(0, [5, 6, 7, 8], [False, True, True, False])) == (5, 6)
    assert read_tokens(sample_of(0, [5, 6], [False, False])) == (5,)


def test_a_row_of_several_carries_what_was_said_of_each() -> None:
    training = [
        TrainingSample(
            sample=sample_of(n, [1, 2, 3, n], [False, False, True, True]),
            reward_advantage=float(n),
            evidence=SampledEvidence(teacher_logprobs=torch.tensor([-10.0 * n, -10.0 * n - 1])),
        )
        for n in range(3)
    ]
    micro = collate(training, "cpu", (3,))
    assert micro.tokens.token_ids.tolist() == [[1, 2, 3]], "the last token predicts nothing"
    assert micro.tokens.rows.tolist() == [1, 2] * 3
    assert micro.reward_advantages.tolist() == [0, 0, 1, 1, 2, 2]
    assert micro.evidence["teacher_logprobs"].tolist() == [0, -1, -10, -11, -20, -21]


def test_a_loss_on_the_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="first token"):
        pad([sample_of(0, [1, 2], [True, True])], "cpu", (1,))
