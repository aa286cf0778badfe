"""From samples to padded micro-batches: the one place where tokens are shifted for next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rnow.algorithm.records import Batch, Evidence, MicroBatch, TrainingSample
from rnow.types import Sample


def build_training_samples(
    samples: Sequence[Sample],
    advantages: Mapping[str, float],
    evidence: Mapping[str, Evidence] | None,
) -> list[TrainingSample]:
    """Join samples with their reward advantage and teacher evidence, both by sample id."""
    return [
        TrainingSample(
            sample=sample,
            reward_advantage=advantages[sample.id],
            evidence=None if evidence is None else evidence[sample.id],
        )
        for sample in samples
    ]


def build_batch(training: Sequence[TrainingSample]) -> Batch:
    """A batch and its N."""
    return Batch(
        samples=tuple(training),
        num_loss_tokens=sum(sum(item.sample.loss_mask) for item in training),
    )


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices per micro-batch: longest first, each padded rectangle at most ``max_tokens``, at least one sequence.

    Sorting by length keeps the padding small; longest first makes running out of memory happen at once or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    plan: list[list[int]] = []
    width = 0
    for index in order:
        if plan and (len(plan[-1]) + 1) * width <= max_tokens:
            plan[-1].append(index)
        else:
            width = lengths[index]
            plan.append([index])
    return plan


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int = 0) -> Tensor:
    """int64 ``[B, T]``. Right padding needs no attention mask under causal attention: no real token sees a pad."""
    width = max(len(sequence) for sequence in sequences)
    return torch.tensor(
        [[*sequence, *([pad_id] * (width - len(sequence)))] for sequence in sequences],
        dtype=torch.long,
    )


def predicting_rows(masks: Sequence[Sequence[bool]], width: int) -> Tensor:
    """int64 ``[R]``: for each loss token at position t of sequence b, the flat index ``b * width + t - 1`` of the hidden
    state that predicts it. Rows follow sequence order, then position.

    Raises:
        ValueError: a mask is True at position 0, where nothing precedes the token.
    """
    if any(mask[0] for mask in masks):
        raise ValueError("loss_mask is True on the first token, which no hidden state predicts")
    return torch.tensor(
        [b * width + t - 1 for b, mask in enumerate(masks) for t, on in enumerate(mask) if on],
        dtype=torch.long,
    )


def masked_values(samples: Sequence[Sample], name: str) -> list[float]:
    """Values of a per-token field at the loss tokens, in the order of ``predicting_rows``."""
    return [
        value
        for sample in samples
        for value, on in zip(getattr(sample, name), sample.loss_mask, strict=True)
        if on
    ]


def collate(training: Sequence[TrainingSample], device: torch.device | str) -> MicroBatch:
    """Pad, flatten and shift the samples of one micro-batch."""
    samples = [item.sample for item in training]
    token_ids = pad_right([sample.token_ids for sample in samples])
    masks = [sample.loss_mask for sample in samples]
    counts = [sum(mask) for mask in masks]
    advantages = torch.tensor([item.reward_advantage for item in training], dtype=torch.float32)
    teacher = None
    if training[0].evidence is not None:
        teacher = torch.cat(
            [
                item.evidence.teacher_logprobs.cpu()[torch.tensor(item.sample.loss_mask)]
                for item in training
                if item.evidence is not None
            ]
        )
    return MicroBatch(
        token_ids=token_ids.to(device),
        rows=predicting_rows(masks, token_ids.shape[1]).to(device),
        targets=torch.tensor(masked_values(samples, "token_ids"), dtype=torch.long, device=device),
        sampler_logprobs=torch.tensor(
            masked_values(samples, "sampler_logprobs"), dtype=torch.float32, device=device
        ),
        reward_advantages=advantages.repeat_interleave(torch.tensor(counts)).to(device),
        teacher_logprobs=None if teacher is None else teacher.to(device),
        sample_ids=tuple(sample.id for sample in samples),
        counts=tuple(counts),
    )
