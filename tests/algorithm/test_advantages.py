from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.algorithm import reference

from rnow.algorithm.advantages import (
    AdvantageEstimator,
    reward_advantages,
    rollout_advantages,
    without_signal,
)
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup, rollout_id

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
    # Of equal rewards the reference leaves a rounding error of 1e-15 that the division by 1e-6 raises to 1e-9.
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


@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
@pytest.mark.parametrize("size", [3, 7, 10])
@pytest.mark.parametrize(("estimator", "scale"), ESTIMATORS)
def test_equal_rewards_give_exactly_nothing(
    estimator: AdvantageEstimator, scale: bool, size: int, reward: float
) -> None:
    """Not the rounding of their mean, which Adam would bring to full size."""
    groups = [[reward] * size, [reward] * size]
    assert reward_advantages(groups, estimator, scale=scale) == [[0.0] * size] * 2


def _group(name: str, statuses: str, totals: dict[int, RewardResult]) -> Any:
    words = {"c": "completed", "t": "truncated", "f": "failed"}
    rollouts = tuple(
        Rollout(
            prompt_id=name,
            index=index,
            turns=(),
            messages=(),
            status=words[letter],  # type: ignore[arg-type]
            end_reason="answer",
        )
        for index, letter in enumerate(statuses)
    )
    prompt = Prompt(id=name, dataset="d", row=0, messages=())
    rewards = {rollout_id(name, index): result for index, result in totals.items()}
    return RolloutGroup(prompt=prompt, rollouts=rollouts), rewards


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
def test_a_reward_that_failed_counts_in_nobody_s_mean(estimator: AdvantageEstimator) -> None:
    group, rewards = _group(
        "p",
        "cctfcc",
        {
            0: RewardResult(total=1.0),
            1: RewardResult(total=0.5, breakdown={"a": 0.5, "b": 0.0}, errors={"b": "ValueError"}),
            2: RewardResult(total=0.0),
            3: RewardResult(total=0.0, errors={"rollout": "x"}),
            5: RewardResult(total=0.0, errors={"a": "ValueError"}),
        },
    )
    found = rollout_advantages([group], rewards, estimator, scale=False)
    assert list(found.values()) == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
def test_a_reward_that_failed_for_a_whole_group_leaves_the_others_to_learn_from(
    estimator: AdvantageEstimator,
) -> None:
    def scored(style: float, failed: str = "") -> RewardResult:
        errors = {"right": "KeyError"} | ({failed: "KeyError"} if failed else {})
        return RewardResult(total=style, breakdown={"style": style, "right": 0.0}, errors=errors)

    group, rewards = _group("p", "ccc", {0: scored(1.0), 1: scored(0.0), 2: scored(0.0, "style")})
    found = rollout_advantages([group], rewards, estimator, scale=False)
    assert list(found.values()) == [0.5, -0.5, 0.0]


def test_a_group_of_which_every_reward_failed_has_no_advantage() -> None:
    failed = RewardResult(total=0.0, errors={"a": "ValueError"})
    group, rewards = _group("p", "cc", {0: failed, 1: failed})
    other, more = _group("q", "cc", {0: RewardResult(total=1.0), 1: RewardResult(total=0.0)})
    for estimator in ("grpo", "reinforce"):
        found = rollout_advantages([group, other], rewards | more, estimator, scale=False)  # type: ignore[arg-type]
        assert list(found.values()) == [0.0, 0.0, 0.5, -0.5]


def test_equal_rewards_give_no_signal_and_no_division_by_zero() -> None:
    assert reward_advantages([[0.5, 0.5, 0.5]], "grpo") == [[0.0, 0.0, 0.0]]
    assert reward_advantages([[3.0]], "grpo") == [[0.0]]


@pytest.mark.parametrize(("estimator", "scale"), ESTIMATORS)
def test_nothing_in_nothing_out(estimator: AdvantageEstimator, scale: bool) -> None:
    assert reward_advantages([], estimator, scale=scale) == []
    assert reward_advantages([[], [2.0]], estimator, scale=scale) == [[], [0.0]]


@given(GROUPS)
def test_groups_without_signal_are_those_whose_rewards_are_all_equal(
    rewards: list[list[float]],
) -> None:
    groups, results = [], {}
    for row, values in enumerate(rewards):
        prompt = Prompt(id=f"d/{row}", dataset="d", row=row, messages=())
        rollouts = tuple(
            Rollout(
                prompt_id=prompt.id,
                index=index,
                turns=(),
                messages=(),
                status="completed",
                end_reason="answer",
            )
            for index in range(len(values))
        )
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
        results |= {
            rollout.id: RewardResult(total=value, breakdown={"r": value})
            for rollout, value in zip(rollouts, values, strict=True)
        }
    advantages = rollout_advantages(groups, results, "grpo", scale=True)
    left_out = without_signal(groups, advantages)
    assert left_out == {
        rollout.id
        for group, values in zip(groups, rewards, strict=True)
        for rollout in group.rollouts
        if len({*values}) == 1
    }
