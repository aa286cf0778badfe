from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.algorithm import reference

from rnow.algorithm.advantages import AdvantageEstimator, reward_advantages

REWARDS = st.floats(-10, 10).map(lambda value: round(value, 3))
GROUPS = st.lists(st.lists(REWARDS, min_size=1, max_size=6), min_size=1, max_size=4)
ESTIMATORS: list[tuple[AdvantageEstimator, bool]] = [
    ("grpo", True),
    ("grpo", False),
    ("reinforce", True),
]


def _flat(groups: list[list[float]]) -> list[float]:
    return [value for group in groups for value in group]


@given(GROUPS, st.booleans())
def test_grpo_is_the_formula(groups: list[list[float]], scale: bool) -> None:
    found = reward_advantages(groups, "grpo", scale=scale)
    expected = reference.grpo(groups, scale=scale)
    assert [len(group) for group in found] == [len(group) for group in groups]
    # Equal rewards leave a rounding error of 1e-15 that the division by 1e-6 raises to 1e-9.
    assert _flat(found) == pytest.approx(_flat(expected), rel=1e-9, abs=1e-8)


@given(GROUPS)
def test_reinforce_centres_by_the_whole_batch(groups: list[list[float]]) -> None:
    found = reward_advantages(groups, "reinforce")
    assert [len(group) for group in found] == [len(group) for group in groups]
    assert _flat(found) == pytest.approx(_flat(reference.reinforce(groups)), abs=1e-12)


def test_a_group_by_hand() -> None:
    # mean 0.5, population standard deviation 0.5
    assert reward_advantages([[1.0, 0.0]], "grpo") == [pytest.approx([0.999998, -0.999998])]
    assert reward_advantages([[1.0, 0.0]], "grpo", scale=False) == [[0.5, -0.5]]
    assert reward_advantages([[1.0, 0.0], [5.0]], "reinforce") == [[-1.0, -2.0], [3.0]]


@pytest.mark.parametrize(("estimator", "scale"), ESTIMATORS)
@given(groups=GROUPS, constant=st.floats(-5, 5))
def test_a_constant_added_to_every_reward_changes_nothing(
    estimator: AdvantageEstimator, scale: bool, groups: list[list[float]], constant: float
) -> None:
    moved = [[reward + constant for reward in group] for group in groups]
    before = reward_advantages(groups, estimator, scale=scale)
    after = reward_advantages(moved, estimator, scale=scale)
    assert _flat(after) == pytest.approx(_flat(before), rel=1e-9, abs=1e-8)


@given(groups=GROUPS, constant=st.floats(-5, 5))
def test_a_constant_added_to_one_group_changes_nothing_under_grpo(
    groups: list[list[float]], constant: float
) -> None:
    moved = [[reward + constant for reward in groups[0]], *groups[1:]]
    before, after = reward_advantages(groups, "grpo"), reward_advantages(moved, "grpo")
    assert _flat(after) == pytest.approx(_flat(before), rel=1e-9, abs=1e-8)


def test_equal_rewards_give_no_signal_and_no_division_by_zero() -> None:
    assert reward_advantages([[0.5, 0.5, 0.5]], "grpo") == [[0.0, 0.0, 0.0]]
    assert reward_advantages([[3.0]], "grpo") == [[0.0]]


@pytest.mark.parametrize(("estimator", "scale"), ESTIMATORS)
def test_nothing_in_nothing_out(estimator: AdvantageEstimator, scale: bool) -> None:
    assert reward_advantages([], estimator, scale=scale) == []
    assert reward_advantages([[], [2.0]], estimator, scale=scale) == [[], [0.0]]
