"""What a step's rollouts amount to when the student has tools."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnow.algorithm.records import TrainingSample
from rnow.training.metrics import (
    TROUBLE,
    call_metrics,
    reward_metrics,
    rollout_metrics,
    signal_metrics,
    teacher_metrics,
    tool_trouble,
)
from rnow.types import (
    Completion,
    Message,
    Prompt,
    RewardResult,
    Rollout,
    RolloutGroup,
    Sample,
    Turn,
)

PROMPT = Prompt(id="dataset_0/0", dataset="dataset_0", row=0, messages=())
TURN = Turn(
    observation_token_ids=(1,),
    completion=Completion(token_ids=(4,), logprobs=(-0.1,), finish_reason="stop", policy_version=0),
)
SAYS: Message = {"role": "assistant", "content": "x"}
WORKED: Message = {"role": "tool", "name": "calc", "content": "3"}
FAILED: Message = WORKED | {"failed": True}  # type: ignore[operator]


def rollout(*messages: Message, turns: int = 1, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "prompt_id": PROMPT.id,
        "index": 0,
        "turns": (TURN,) * turns,
        "messages": messages,
        "status": "completed",
        "end_reason": "answer",
    }
    return Rollout(**fields | changes)


def test_tools_and_endings() -> None:
    group = RolloutGroup(
        prompt=PROMPT,
        rollouts=(
            rollout(SAYS, WORKED, FAILED, SAYS, turns=2),
            rollout(SAYS),
            rollout(SAYS, WORKED, SAYS, WORKED, SAYS, turns=3, end_reason="max_turns"),
            rollout(SAYS, WORKED, SAYS, turns=2, status="truncated", end_reason="length"),
            rollout(SAYS, WORKED, status="failed", end_reason="failed"),
        ),
    )
    metrics = rollout_metrics([group], agentic=True)
    assert metrics["tools/calls_per_rollout"] == pytest.approx(5 / 4)
    assert metrics["tools/failure_fraction"] == pytest.approx(1 / 5)
    assert metrics["rollouts/turns"] == pytest.approx(8 / 4)
    assert metrics["rollouts/last_tool_fraction"] == pytest.approx(2 / 4)
    assert metrics["rollouts/max_turns_fraction"] == pytest.approx(1 / 4)
    assert metrics["rollouts/failed_fraction"] == pytest.approx(1 / 5)


def test_without_a_call_the_numbers_are_there_and_zero() -> None:
    metrics = rollout_metrics(
        [RolloutGroup(prompt=PROMPT, rollouts=(rollout(SAYS),))], agentic=True
    )
    assert metrics["tools/calls_per_rollout"] == 0
    assert metrics["tools/failure_fraction"] == 0


def test_without_tools_there_is_nothing_to_say_of_them() -> None:
    metrics = rollout_metrics([RolloutGroup(prompt=PROMPT, rollouts=(rollout(SAYS),))])
    assert not any(name.startswith("tools/") for name in metrics)
    assert "rollouts/turns" not in metrics


def test_trouble_with_the_tools_is_told_when_most_calls_fail() -> None:
    def group(*messages: Message) -> RolloutGroup:
        return RolloutGroup(prompt=PROMPT, rollouts=(rollout(SAYS, *messages),))

    slow = FAILED | {"content": "Error: took longer than 5 s\nand more"}  # type: ignore[operator]
    told = tool_trouble([group(*[slow] * TROUBLE, FAILED, WORKED)])
    assert told is not None
    assert told.startswith(f"{TROUBLE + 1} of {TROUBLE + 2} tool calls failed")
    assert told.endswith(f"({TROUBLE}): Error: took longer than 5 s")
    assert tool_trouble([group(*[FAILED] * TROUBLE, *[WORKED] * TROUBLE)]) is None
    assert tool_trouble([group(*[FAILED] * (TROUBLE - 1))]) is None, "a few say nothing"
    assert tool_trouble([]) is None


def test_each_reward_has_the_share_of_its_calls_that_failed() -> None:
    group = RolloutGroup(prompt=PROMPT, rollouts=tuple(rollout(SAYS, index=n) for n in range(4)))
    lost = rollout(SAYS, index=4, status="failed", end_reason="failed")
    others = RolloutGroup(prompt=PROMPT, rollouts=(lost,))
    both, broke = {"style": 1.0, "right": 0.0}, {"right": "KeyError"}
    rewards = {
        "dataset_0/0#0": RewardResult(total=1.0, breakdown=both),
        "dataset_0/0#1": RewardResult(total=1.0, breakdown=both, errors=broke),
        "dataset_0/0#2": RewardResult(total=1.0, breakdown=both, errors=broke),
        "dataset_0/0#3": RewardResult(total=0.0, breakdown={"right": 0.0}, errors=broke),
        "dataset_0/0#4": RewardResult(total=0.0, errors={"rollout": "gone"}),
    }
    metrics = reward_metrics([group, others], rewards)
    assert metrics["reward_failures/style"] == 0.0
    assert metrics["reward_failures/right"] == pytest.approx(3 / 4)
    assert metrics["reward/failure_fraction"] == pytest.approx(3 / 4)
    assert "reward_failures/rollout" not in metrics


def of(dataset: str, row: int, teacher: str) -> Prompt:
    return Prompt(id=f"{dataset}/{row}", dataset=dataset, row=row, messages=(), teacher=teacher)


def test_calls_are_counted_apart() -> None:
    """A teacher that calls too often is lost in the mean over all."""
    called, silent = rollout(SAYS, WORKED, WORKED, SAYS), rollout(SAYS)
    failed = rollout(SAYS, WORKED, status="failed", end_reason="failed")
    groups = [
        RolloutGroup(prompt=of("words", 0, "teacher/a"), rollouts=(called, silent, failed)),
        RolloutGroup(prompt=of("words", 1, "teacher/b"), rollouts=(silent, silent)),
        RolloutGroup(prompt=of("sums", 0, "teacher/b"), rollouts=(called, called)),
    ]
    assert call_metrics(groups, lambda prompt: prompt.dataset) == {
        "tools/calls_per_rollout/sums": 2.0,
        "tools/calls_per_rollout/words": 0.5,
    }
    assert call_metrics(groups, lambda prompt: prompt.teacher) == {
        "tools/calls_per_rollout/teacher/a": 1.0,
        "tools/calls_per_rollout/teacher/b": 1.0,
    }


def test_the_kl_of_each_teacher_is_over_the_tokens_it_judged() -> None:
    def item(name: str, teacher: str) -> TrainingSample:
        sample = Sample(
            id=name, dataset="d", token_ids=(1, 2), loss_mask=(False, True),
            sampler_logprobs=(0.0, -1.0), teacher=teacher,
        )  # fmt: skip
        return TrainingSample(sample=sample, reward_advantage=0.0, evidence=None)

    training = [item("d/0#0", "teacher/a"), item("d/1#0", "teacher/b"), item("d/2#0", "teacher/a")]
    kls = {
        "d/0#0": torch.tensor([1.0, 2.0, 3.0]), "d/1#0": torch.tensor([4.0]), "d/2#0": torch.tensor([10.0]),
    }  # fmt: skip
    assert teacher_metrics(training, {"teacher_kl": kls}) == {
        "teacher_kl/teacher/a": 4.0,
        "teacher_kl/teacher/b": 4.0,
    }
    assert teacher_metrics(training, {}) == {}


def test_groups_with_equal_rewards_are_counted() -> None:
    def group(*rewards: float | None, failed: int = 0) -> tuple[RolloutGroup, dict[str, Any]]:
        made = [
            rollout(SAYS, index=index, status="failed" if index < failed else "completed")
            for index in range(len(rewards))
        ]
        found = {
            one.id: RewardResult(total=reward, breakdown={"r": reward})
            for one, reward in zip(made, rewards, strict=True)
            if reward is not None
        }
        return RolloutGroup(prompt=PROMPT, rollouts=tuple(made)), found

    for parts, share in (
        ([group(1.0, 1.0)], 1.0),
        ([group(1.0, 0.0)], 0.0),
        ([group(5.0, 1.0, 1.0, failed=1)], 1.0),
        ([group(1.0), group(None, None)], None),
    ):
        groups = [one for one, _ in parts]
        rewards = {key: value for _, found in parts for key, value in found.items()}
        expected = {} if share is None else {"reward/equal_groups_fraction": share}
        assert signal_metrics(groups, rewards) == expected
