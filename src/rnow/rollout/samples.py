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
    """One sample per rollout that has something to learn from: failed rollouts and empty completions are left out.

    A sample ends with the last token that the student wrote. A tool result that overflowed the window follows it in the
    rollout: it changes no number, and may be several windows long.
    """
    return [
        _sample(group.prompt, item.rollout)
        for group in scored
        for item in group.rollouts
        if item.rollout.status != "failed" and any(item.rollout.loss_mask)
    ]


def _sample(prompt: Prompt, rollout: Rollout) -> Sample:
    end = 1 + max(position for position, on in enumerate(rollout.loss_mask) if on)
    return Sample(
        id=sample_id(prompt, rollout),
        dataset=prompt.dataset,
        token_ids=rollout.token_ids[:end],
        loss_mask=rollout.loss_mask[:end],
        sampler_logprobs=rollout.sampler_logprobs[:end],
    )
