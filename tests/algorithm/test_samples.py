"""Which rollouts are trained on, and under which name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.rollouts import turns_of

from rnow.algorithm.batching import build_samples
from rnow.types import Completion, Prompt, Rollout, RolloutGroup, Turn

PROMPT = Prompt(id="words/3", dataset="words", row=3, messages=())


def rollout(
    index: int,
    token_ids: tuple[int, ...] = (1, 2, 3),
    loss_mask: tuple[bool, ...] = (False, True, True),
    sampler_logprobs: tuple[float, ...] = (0.0, -0.1, -0.2),
    **changes: Any,
) -> Rollout:
    turns, unanswered = turns_of(token_ids, loss_mask, sampler_logprobs)
    fields: dict[str, Any] = {
        "prompt_id": PROMPT.id,
        "index": index,
        "turns": turns,
        "unanswered_token_ids": unanswered,
        "messages": (),
        "status": "completed",
        "end_reason": "answer",
    }
    return Rollout(**fields | changes)


def test_samples_of_a_group() -> None:
    rollouts = [
        rollout(0),
        rollout(1, status="truncated", token_ids=(1, 2, 4)),
        rollout(2, status="failed", error="OSError: x"),
        rollout(3, loss_mask=(False, False, False)),
        rollout(4),
    ]
    samples = build_samples([RolloutGroup(prompt=PROMPT, rollouts=tuple(rollouts))])
    assert [sample.id for sample in samples] == ["words/3#0", "words/3#1", "words/3#4"]
    assert {sample.dataset for sample in samples} == {"words"}
    assert samples[1].token_ids == (1, 2, 4), "an answer that was cut is learned from"
    assert samples[0].loss_mask == (False, True, True)
    assert samples[0].sampler_logprobs == (0.0, -0.1, -0.2)


def test_a_tool_result_that_nobody_read_is_left_out() -> None:
    """A page of 100,000 tokens that overflowed the window must reach neither the teacher nor the update."""
    mask = (False, True, False, True) + (False,) * 9
    logprobs = (0.0, -0.1, 0.0, -0.2) + (0.0,) * 9
    cut = rollout(0, tuple(range(13)), mask, logprobs, status="truncated")
    (sample,) = build_samples([RolloutGroup(prompt=PROMPT, rollouts=(cut,))])
    assert sample.token_ids == (0, 1, 2, 3)
    assert sample.loss_mask == (False, True, False, True)
    assert sample.sampler_logprobs == (0.0, -0.1, 0.0, -0.2)


def test_what_was_shown_before_an_empty_completion_is_left_out() -> None:
    whole = rollout(0)
    empty = Completion(token_ids=(), logprobs=(), finish_reason="length", policy_version=0)
    last = Turn(observation_token_ids=(7, 8), completion=empty)
    cut = replace(whole, turns=(*whole.turns, last), status="truncated")
    (sample,) = build_samples([RolloutGroup(prompt=PROMPT, rollouts=(cut,))])
    assert sample.token_ids == (1, 2, 3)
    assert sample.loss_mask == (False, True, True)


def test_ids_name_prompt_and_index() -> None:
    assert rollout(7).id == "words/3#7"


def test_nothing_gives_nothing() -> None:
    assert build_samples([]) == []
