"""What a step's rollouts amount to when the student has tools."""

from __future__ import annotations

from typing import Any

import pytest

from rnow.training.metrics import TROUBLE, rollout_metrics, tool_trouble
from rnow.types import Completion, Message, Prompt, Rollout, RolloutGroup, Turn

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
