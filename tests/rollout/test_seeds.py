from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.rollout.collect import rollout_seed
from rnow.types import Purpose

# blake2b of "0|train|1|dataset_0/17|0|0", worked out apart from our code.
PINNED_SEED = 410014376783462275

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
