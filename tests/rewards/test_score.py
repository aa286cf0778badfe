"""score_rewards: order, bounds, and what it costs."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from rnow.errors import StopRequested
from rnow.project.user_code import load_rewards
from rnow.rewards import RewardRunner, score_rewards
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup
from rnow.usercode.host import CodeHost


def make_groups(count: int, size: int, *rewards: str) -> list[RolloutGroup]:
    groups = []
    for row in range(count):
        prompt = Prompt(
            id=f"d/{row}",
            dataset="d",
            row=row,
            messages=({"role": "user", "content": "Hi"},),
            rewards=rewards,
        )
        rollouts = tuple(
            Rollout(
                prompt_id=prompt.id,
                index=index,
                turns=(),
                messages=({"role": "assistant", "content": f"{row}.{index}"},),
                status="completed",
                end_reason="answer",
            )
            for index in range(size)
        )
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


class Recorder:
    """A rewarder that answers late ones first and counts how many are at work."""

    def __init__(self, fail_on: str | None = None) -> None:
        self.at_work = 0
        self.most = 0
        self.cancelled = 0
        self.fail_on = fail_on

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        try:
            if prompt.id == self.fail_on:
                raise RuntimeError("broken rewarder")
            await asyncio.sleep(0.01 / (1 + prompt.row) if self.fail_on is None else 30)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.at_work -= 1
        return RewardResult(total=prompt.row + rollout.index / 10)


def test_results_keep_the_order_of_the_groups() -> None:
    groups = make_groups(5, 3)
    rewards = asyncio.run(score_rewards(groups, Recorder()))
    assert list(rewards) == [rollout.id for group in groups for rollout in group.rollouts]
    for group in groups:
        for rollout in group.rollouts:
            expected = RewardResult(total=group.prompt.row + rollout.index / 10)
            assert rewards[rollout.id] == expected


def test_a_prompt_without_rewards_gives_none() -> None:
    class Silent(Recorder):
        async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
            return None if prompt.row else await super().score(prompt, rollout)

    assert list(asyncio.run(score_rewards(make_groups(2, 2), Silent()))) == ["d/0#0", "d/0#1"]


def test_no_more_at_once_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.rewards.score.MAX_CONCURRENT", 3)
    recorder = Recorder()
    asyncio.run(score_rewards(make_groups(6, 4), recorder))
    assert recorder.most == 3


def test_a_broken_rewarder_ends_the_others_and_is_raised() -> None:
    recorder = Recorder(fail_on="d/1")
    with pytest.raises(RuntimeError, match="broken rewarder"):
        asyncio.run(score_rewards(make_groups(3, 2), recorder))
    assert recorder.cancelled == 4
    assert recorder.at_work == 0


def test_a_stop_ends_rewards_that_take_their_time() -> None:
    class Slow(Recorder):
        async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            raise AssertionError

    asked = iter([None, StopRequested("stop")])

    def poll() -> None:
        if (stop := next(asked)) is not None:
            raise stop

    slow = Slow()
    with pytest.raises(StopRequested):
        asyncio.run(score_rewards(make_groups(2, 2), slow, poll=poll))
    assert slow.cancelled == 4


def test_no_groups() -> None:
    assert asyncio.run(score_rewards([], Recorder())) == {}


REWARDS = """
from rnow.core import RewardArgs, reward

@reward
def sync_reward(args: RewardArgs, messages: list) -> float:
    return 1.0

@reward
async def async_reward(args: RewardArgs, messages: list) -> float:
    return 1.0
"""


@pytest.mark.parametrize("name", ["sync_reward", "async_reward"])
def test_trivial_rewards_cost_next_to_nothing(name: str, tmp_path: Path) -> None:
    """128 rollouts take ten to twenty milliseconds on two idle cores; the bound leaves room for a busy machine."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    runner = RewardRunner(load_rewards(tmp_path), CodeHost(tmp_path / "rewards.py", "rewards"))
    groups = make_groups(32, 4, name)

    async def best_of(times: int) -> float:
        best = float("inf")
        for _ in range(times):
            started = time.perf_counter()
            rewards = await score_rewards(groups, runner)
            best = min(best, time.perf_counter() - started)
            assert len(rewards) == 128
            assert all(reward.total == 1 for reward in rewards.values())
        return best

    try:
        assert asyncio.run(best_of(10)) < 0.06
    finally:
        runner.close()
