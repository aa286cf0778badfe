from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.algorithm.seeds import rollout_seed, uniforms
from rnow.types import Purpose

# blake2b of "0|train|1|dataset_0/17|0|0" and the first Philox4x64 block under key 12345, worked out apart from our code.
PINNED_SEED = 410014376783462275
PINNED_UNIFORMS = [
    0.6463801884227345,
    0.7742675977164786,
    0.7864362639285933,
    0.15959668272284822,
]

BASE: dict[str, Any] = {
    "run_seed": 0,
    "purpose": "train",
    "step": 1,
    "prompt_id": "dataset_0/17",
    "rollout_index": 0,
    "turn": 0,
}


def test_the_seed_of_a_rollout_never_changes() -> None:
    # Pinned: a change here breaks the reproduction of every earlier run.
    assert rollout_seed(**BASE) == PINNED_SEED
    assert uniforms(12345, 0, 4).tolist() == PINNED_UNIFORMS


@pytest.mark.parametrize(
    "change",
    [
        {"run_seed": 1},
        {"purpose": "eval"},
        {"purpose": "test"},
        {"step": 2},
        {"prompt_id": "dataset_0/18"},
        {"rollout_index": 1},
        {"turn": 1},
    ],
    ids=str,
)
def test_every_part_of_the_key_counts(change: dict[str, Any]) -> None:
    assert rollout_seed(**(BASE | change)) != rollout_seed(**BASE)


def test_parts_of_the_key_do_not_run_together() -> None:
    purposes: list[Purpose] = ["train", "eval", "test"]
    keys = list(
        itertools.product(range(3), purposes, (1, 11, 111), ("a", "a|1", "1"), (1, 11), (1, 11))
    )
    assert len({rollout_seed(*key) for key in keys}) == len(keys)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9), st.text(max_size=20))
def test_a_seed_fits_a_signed_64_bit_integer(run_seed: int, step: int, prompt_id: str) -> None:
    seed = rollout_seed(run_seed, "train", step, prompt_id, 0, 0)
    assert 0 <= seed < 2**63


@given(
    seed=st.integers(0, 2**63 - 1),
    block=st.integers(0, 50),
    count=st.integers(1, 40),
)
def test_a_stream_can_be_entered_at_any_block(seed: int, block: int, count: int) -> None:
    whole = uniforms(seed, 0, 4 * block + count)
    assert np.array_equal(uniforms(seed, 4 * block, count), whole[4 * block :])
    assert whole.dtype == np.float64
    assert (whole >= 0).all()
    assert (whole < 1).all()


def test_neighbouring_seeds_give_unrelated_uniform_numbers() -> None:
    one, two = uniforms(1000, 0, 4096), uniforms(1001, 0, 4096)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.08
    for stream in (one, two):
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.08
        counts, _ = np.histogram(stream, bins=16, range=(0.0, 1.0))
        # chi-squared with 15 degrees of freedom: beyond 45 once in 10,000
        assert ((counts - 256) ** 2 / 256).sum() < 45
