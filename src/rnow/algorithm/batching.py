"""From rollouts to padded micro-batches: the one place where turns are flattened, and where tokens are shifted for
next-token prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import chain, compress, islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rnow.algorithm.packing import lay_out
from rnow.algorithm.records import (
    Batch,
    Branches,
    Evidence,
    HiddenEvidence,
    MicroBatch,
    PaddedTokens,
    TrainingSample,
)
from rnow.types import Prompt, Rollout, RolloutGroup, Sample

T = TypeVar("T")


def build_samples(groups: Sequence[RolloutGroup]) -> list[Sample]:
    """One sample per rollout that has something to learn from: failed rollouts and empty completions are left out."""
    return [
        build_sample(group.prompt, rollout)
        for group in groups
        for rollout in group.rollouts
        if rollout.status != "failed" and rollout.completion_tokens
    ]


def build_sample(prompt: Prompt, rollout: Rollout) -> Sample:
    """The turns of a rollout as one sequence. It ends with the last token that the student wrote: a tool result that
    overflowed the window changes no number, and may be several windows long."""
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    logprobs: list[float] = []
    for turn in rollout.turns:
        shown, written = turn.observation_token_ids, turn.completion.token_ids
        token_ids += [*shown, *written]
        loss_mask += [False] * len(shown) + [True] * len(written)
        logprobs += [*[0.0] * len(shown), *turn.completion.logprobs]
    if loss_mask and not loss_mask[-1]:
        # The last completion is empty: what was shown before it predicts nothing.
        end = 1 + max(position for position, on in enumerate(loss_mask) if on)
        token_ids, loss_mask, logprobs = token_ids[:end], loss_mask[:end], logprobs[:end]
    return Sample(
        id=rollout.id,
        dataset=prompt.dataset,
        token_ids=tuple(token_ids),
        loss_mask=tuple(loss_mask),
        sampler_logprobs=tuple(logprobs),
        teacher=prompt.teacher,
    )


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
    padded = np.full((len(sequences), width), pad_id, np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(padded)


def predicting_rows(masks: Sequence[Sequence[bool]], width: int) -> Tensor:
    """int64 ``[R]``: for each loss token at position t of sequence b, the flat index ``b * width + t - 1`` of the hidden
    state that predicts it. Rows follow sequence order, then position.

    Raises:
        ValueError: a mask is True at position 0, where nothing precedes the token.
    """
    if any(mask[0] for mask in masks):
        raise ValueError("loss_mask is True on the first token, which no hidden state predicts")
    on = [np.flatnonzero(np.frombuffer(bytes(mask), np.bool_)) for mask in masks]
    return torch.from_numpy(np.concatenate([at + (b * width - 1) for b, at in enumerate(on)]))


def pad(
    samples: Sequence[Sample],
    device: torch.device | str,
    per_row: Sequence[int] | None = None,
) -> PaddedTokens:
    """Pad, flatten and shift: what a forward pass over ``samples`` needs.

    Args:
        per_row: how many samples each row has, in order. Then a row ends with the last token whose state predicts anything;
            None is one whole sample a row.

    Raises:
        ValueError: a loss mask is True on the first token, which no hidden state predicts.
    """
    masks = [sample.loss_mask for sample in samples]
    counts = tuple(sum(mask) for mask in masks)
    targets = chain.from_iterable(at_loss_tokens(sample, sample.token_ids) for sample in samples)
    if per_row is None:
        token_ids = pad_right([sample.token_ids for sample in samples])
        rows, branches = predicting_rows(masks, token_ids.shape[1]), None
    else:
        token_ids, rows, branches = _lay_out_rows(samples, per_row, device)
    return PaddedTokens(
        token_ids=token_ids.to(device),
        rows=rows.to(device),
        targets=torch.from_numpy(np.fromiter(targets, np.int64, sum(counts))).to(device),
        sample_ids=tuple(sample.id for sample in samples),
        counts=counts,
        branches=branches,
    )


def read_tokens(sample: Sample) -> tuple[int, ...]:
    """The tokens whose states predict a loss token, with those between: all before the last one of them; one at least."""
    mask = sample.loss_mask
    last = len(mask) - 1 - mask[::-1].index(True) if True in mask else 1
    return sample.token_ids[: max(1, last)]


def _lay_out_rows(
    samples: Sequence[Sample], per_row: Sequence[int], device: torch.device | str
) -> tuple[Tensor, Tensor, Branches | None]:
    """Token ids ``[B, T]``, predicting rows ``[R]``, and how to read them."""
    if any(sample.loss_mask[0] for sample in samples):
        raise ValueError("loss_mask is True on the first token, which no hidden state predicts")
    remaining = iter(samples)
    parts = [list(islice(remaining, count)) for count in per_row]
    layouts = [lay_out([read_tokens(sample) for sample in part]) for part in parts]
    width = max(len(layout.token_ids) for layout in layouts)
    rows = [
        b * width + place
        for b, (part, layout) in enumerate(zip(parts, layouts, strict=True))
        for sample, places in zip(part, layout.places, strict=True)
        for place in compress(places, sample.loss_mask[1:])
    ]
    branches = None
    if len(samples) > len(layouts):
        alone = range(1, width + 1)
        ends = [[*layout.ends, *alone[len(layout.ends) :]] for layout in layouts]
        branches = Branches(
            positions=pad_right([layout.positions for layout in layouts]).to(device),
            ends=torch.tensor(ends, dtype=torch.long, device=device),
        )
    token_ids = pad_right([layout.token_ids for layout in layouts])
    return token_ids, torch.tensor(rows, dtype=torch.long), branches


def collate(
    training: Sequence[TrainingSample],
    device: torch.device | str,
    per_row: Sequence[int] | None = None,
) -> MicroBatch:
    """One micro-batch: its tokens, and what sampler, rewards and teacher said of the loss tokens. Samples whose evidence
    another head reads (``head_of``) cannot share one. ``per_row`` as in ``pad``."""
    samples = [item.sample for item in training]
    tokens = pad(samples, device, per_row)
    drawn = chain.from_iterable(at_loss_tokens(one, one.sampler_logprobs) for one in samples)
    sampler = np.fromiter(drawn, np.float32, sum(tokens.counts))
    advantages = torch.tensor([item.reward_advantage for item in training], dtype=torch.float32)
    return MicroBatch(
        tokens=tokens,
        sampler_logprobs=torch.from_numpy(sampler).to(device),
        reward_advantages=advantages.repeat_interleave(torch.tensor(tokens.counts)).to(device),
        evidence=_collate_evidence(training, device),
        teacher=head_of(training[0]),
    )


def head_of(item: TrainingSample) -> str | None:
    """The teacher whose head reads the evidence of a sample; None where no head is needed."""
    return item.evidence.teacher if isinstance(item.evidence, HiddenEvidence) else None


def at_loss_tokens(sample: Sample, values: Iterable[T]) -> Iterator[T]:
    """Those of a sample's per-token values that belong to its loss tokens, in order."""
    return compress(values, sample.loss_mask)


def _collate_evidence(
    training: Sequence[TrainingSample], device: torch.device | str
) -> dict[str, Tensor]:
    first = training[0].evidence
    if first is None:
        return {}
    return {
        name: torch.cat([getattr(item.evidence, name) for item in training]).to(device)
        for name in evidence_tensors(first)
    }


def evidence_tensors(evidence: Evidence) -> dict[str, Tensor]:
    """What a teacher said of a sample in numbers, by field."""
    values = {field.name: getattr(evidence, field.name) for field in fields(evidence)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
