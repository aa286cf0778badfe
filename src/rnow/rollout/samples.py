"""From scored rollouts to trained sequences."""

from __future__ import annotations

from collections.abc import Sequence

from rnow.types import Prompt, Rollout, Sample, ScoredGroup


def rollout_id(prompt_id: str, index: int) -> str:
    """The key of one rollout within a step."""
    return f"{prompt_id}#{index}"


def sample_id(prompt: Prompt, rollout: Rollout) -> str:
    """The key under which everything about one rollout of a step is filed."""
    return rollout_id(prompt.id, rollout.index)


def build_samples(scored: Sequence[ScoredGroup]) -> list[Sample]:
    """One sample per rollout that has something to learn from: failed rollouts and empty completions are left out."""
    return [
        Sample(
            id=sample_id(group.prompt, item.rollout),
            dataset=group.prompt.dataset,
            token_ids=item.rollout.token_ids,
            loss_mask=item.rollout.loss_mask,
            sampler_logprobs=item.rollout.sampler_logprobs,
        )
        for group in scored
        for item in group.rollouts
        if item.rollout.status != "failed" and any(item.rollout.loss_mask)
    ]
