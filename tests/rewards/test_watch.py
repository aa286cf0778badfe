"""Rewards that fail: what is told, once, and when a run that learns from them ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rnow.errors import EXIT_FAILED, RnowError
from rnow.rewards.watch import MAX_UNREWARDED, RewardWatch, failures
from rnow.types import RewardResult

WORKED = RewardResult(total=1.0, breakdown={"style": 1.0, "right": 0.0})
HALF = RewardResult(
    total=0.0, breakdown={"style": 0.0, "right": 0.0}, errors={"style": "KeyError: 'a' (rewards.py:3)"}
)  # fmt: skip
BOTH = RewardResult(
    total=0.0, breakdown={"style": 0.0, "right": 0.0}, errors={"style": "KeyError: 'a' (rewards.py:3)", "right": "x"}
)  # fmt: skip
BROKEN = RewardResult(total=0.0, breakdown={"right": 0.0}, errors={"right": "returned None"})
LOST = RewardResult(total=0.0, errors={"rollout": "sampler died"})


def of(*results: RewardResult) -> dict[str, RewardResult]:
    return {f"d/0#{index}": result for index, result in enumerate(results)}


def test_a_failure_is_counted_among_the_rollouts_that_have_the_reward() -> None:
    style, right = failures([WORKED, HALF, BROKEN, HALF, LOST])[::-1]
    assert style.line() == (
        "reward \"style\" fails: KeyError: 'a' (rewards.py:3), in 2 of 3 rollouts"
    )
    assert right.line() == 'reward "right" fails: returned None, in 1 of 4 rollouts'
    assert failures([WORKED, LOST]) == []


def test_each_reward_is_told_of_once_whether_a_step_or_an_evaluation_meets_it_first() -> None:
    told: list[str] = []
    watch = RewardWatch(told.append, teaching=False)
    watch.look("of an evaluation", of(WORKED, HALF))
    watch.step(1, of(HALF, WORKED))
    watch.step(2, of(BROKEN, HALF))
    assert len(told) == 2
    assert told[0].endswith("in 1 of 2 rollouts of an evaluation")
    assert told[1].startswith('reward "right" fails: returned None')
    assert told[1].endswith("rollouts of step 2")


def test_where_none_has_worked_the_first_step_ends_the_run() -> None:
    watch = RewardWatch(lambda text: None, teaching=True)
    watch.look("of an evaluation", of(BOTH, LOST))
    with pytest.raises(RnowError, match="in step 1 every reward") as caught:
        watch.step(1, of(BOTH, BROKEN, LOST))
    assert caught.value.exit_code == EXIT_FAILED
    assert [detail.split('"')[1] for detail in caught.value.details] == ["right", "style"]
    assert "rnow test" in (caught.value.fix or "")


def test_after_it_worked_it_takes_three_steps_in_a_row() -> None:
    watch = RewardWatch(lambda text: None, teaching=True)
    watch.step(1, of(WORKED, HALF))
    for step in (2, 3):
        watch.step(step, of(BOTH, BOTH))
    watch.step(4, of(WORKED, BOTH))
    for step in (5, 6):
        watch.step(step, of(BOTH, BROKEN))
    with pytest.raises(RnowError, match=f"{MAX_UNREWARDED} steps in a row every reward"):
        watch.step(7, of(BROKEN))


def test_one_of_several_that_fails_on_every_rollout_ends_the_run_too() -> None:
    """Its zeros would be added to what the others give, and learned from."""
    trace = "Traceback (most recent call last):\n  File \"rewards.py\", line 3\nKeyError: 'a'"
    traced = replace(HALF, tracebacks={"style": trace})
    watch = RewardWatch(lambda text: None, teaching=True)
    with pytest.raises(RnowError, match='step 1 the reward "style" failed on every') as caught:
        watch.step(1, of(HALF, traced))
    assert caught.value.details[0].endswith("in 2 of 2 rollouts")
    assert [line.strip() for line in caught.value.details[1:]] == [
        line.strip() for line in trace.splitlines()
    ]
    watch = RewardWatch(lambda text: None, teaching=True)
    watch.step(1, of(HALF, WORKED))
    watch.step(2, of(HALF, HALF))
    watch.step(3, {})
    watch.step(4, of(BROKEN, WORKED))
    for step in (5, 6):
        watch.step(step, of(HALF))
    with pytest.raises(RnowError, match='3 steps in a row the reward "style"'):
        watch.step(7, of(HALF, LOST))


def test_rewards_that_only_track_end_nothing_and_a_step_without_rewards_says_nothing() -> None:
    tracking = RewardWatch(lambda text: None, teaching=False)
    teaching = RewardWatch(pytest.fail, teaching=True)
    for step in range(1, 9):
        tracking.step(step, of(BOTH))
        teaching.step(step, {})
        teaching.step(step, of(LOST))
