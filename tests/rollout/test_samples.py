"""Which rollouts are trained on, and under which name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rnow.rollout.samples import build_samples, sample_id
from rnow.types import Prompt, Rollout, ScoredGroup, ScoredRollout

PROMPT = Prompt(id="words/3", dataset="words", row=3, messages=())


def rollout(index: int, **changes: Any) -> Rollout:
    fields: dict[str, Any] = {
        "prompt_id": PROMPT.id,
        "index": index,
        "token_ids": (1, 2, 3),
        "loss_mask": (False, True, True),
        "sampler_logprobs": (0.0, -0.1, -0.2),
        "turns": (),
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
    group = ScoredGroup(
        prompt=PROMPT, rollouts=tuple(ScoredRollout(rollout=r, reward=None) for r in rollouts)
    )
    samples = build_samples([group])
    assert [sample.id for sample in samples] == ["words/3#0", "words/3#1", "words/3#4"]
    assert {sample.dataset for sample in samples} == {"words"}
    assert samples[1].token_ids == (1, 2, 4), "an answer that was cut is learned from"
    assert samples[0].loss_mask == (False, True, True)
    assert samples[0].sampler_logprobs == (0.0, -0.1, -0.2)


def test_a_tool_result_that_nobody_read_is_left_out() -> None:
    """A page of 100,000 tokens that overflowed the window must reach neither the teacher nor the update."""
    mask = (False, True, False, True) + (False,) * 9
    cut = rollout(0, status="truncated", token_ids=tuple(range(13)), loss_mask=mask)
    cut = replace(cut, sampler_logprobs=(0.0, -0.1, 0.0, -0.2) + (0.0,) * 9)
    group = ScoredGroup(prompt=PROMPT, rollouts=(ScoredRollout(rollout=cut, reward=None),))
    (sample,) = build_samples([group])
    assert sample.token_ids == (0, 1, 2, 3)
    assert sample.loss_mask == (False, True, False, True)
    assert sample.sampler_logprobs == (0.0, -0.1, 0.0, -0.2)


def test_ids_name_prompt_and_index() -> None:
    assert sample_id(PROMPT, rollout(7)) == "words/3#7"


def test_nothing_gives_nothing() -> None:
    assert build_samples([]) == []
