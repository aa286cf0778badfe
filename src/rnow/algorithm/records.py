"""Records that hold tensors: the later half of the chain in ``rnow.types``.

What a teacher says of a sample has one row for each of its L loss tokens, in order: a teacher that saw another prompt before
the same answer says it in the same shape. Only ``PaddedTokens`` and ``MicroBatch`` are flattened and shifted, in ``batching``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from torch import Tensor

from rnow.types import RewardResult, RolloutGroup, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledEvidence:
    """The least a teacher can say: its log-probability of each token the student sampled.

    ``teacher_logprobs``: float32 ``[L]``, natural log.
    """

    teacher_logprobs: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKEvidence:
    """The teacher's k likeliest tokens at each position, beside its log-probability of the sampled one.

    Attributes:
        teacher_logprobs: as in ``SampledEvidence``, whether the sampled token is among the k or not.
        ids: int64 ``[L, k]``, likeliest first and no id twice in a row of the table.
        logprobs: float32 ``[L, k]``, natural log, not increasing along k.
    """

    teacher_logprobs: Tensor
    ids: Tensor
    logprobs: Tensor

    def tail(self) -> Tensor:
        """float32 ``[L]``: the probability of everything but the k, at least 0."""
        return (1.0 - self.logprobs.double().exp().sum(-1)).clamp_min(0.0).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenEvidence:
    """The teacher's final hidden states, from which its own head makes the whole distribution where it is needed.

    Attributes:
        teacher_hidden: ``[L, H of the teacher]`` after the last norm, the state that predicts each loss token, in the
            teacher's number format, in main memory.
        teacher: the role of the model they are of, whose head goes with them.
    """

    teacher_hidden: Tensor
    teacher: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEvidence:
    """What a teacher with another tokenizer says: a probability of each chunk of an answer, the shortest stretches that the
    tokens of both cut out.

    Attributes:
        teacher_logprobs: float32 ``[L]``, natural log; over the tokens of a chunk they add up to the teacher's of it, in
            equal shares. A token in no chunk has its sampler's own, so that it counts as no difference.
        chunk_starts: bool ``[L]``, where a chunk begins, or tokens without one. True at the first token.
        teacher_tokens: int64 ``[L]``, how many tokens of the teacher's the token's chunk has; 0 of a token in no chunk.
    """

    teacher_logprobs: Tensor
    chunk_starts: Tensor
    teacher_tokens: Tensor


Evidence = SampledEvidence | TopKEvidence | HiddenEvidence | ChunkEvidence
"""What a teacher returns per sample, as its caller needs it."""


def sampled_logprobs(evidence: Evidence) -> Tensor:
    """float32 ``[L]``: the teacher's log-probability of each loss token, of evidence that says it."""
    assert not isinstance(evidence, HiddenEvidence), "hidden states were asked for"
    return evidence.teacher_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherNeeds:
    """What is asked of a teacher about each loss token: by default its log-probability (``SampledEvidence``).

    Attributes:
        top_k: so many of its likeliest tokens besides (``TopKEvidence``); 0 asks for none.
        hidden: its hidden states instead (``HiddenEvidence``): of a model that this process holds.
    """

    top_k: int = 0
    hidden: bool = False


SAMPLED = TeacherNeeds()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSample:
    """A sample with everything the update needs. ``evidence=None`` means this run has no teacher."""

    sample: Sample
    reward_advantage: float
    evidence: Evidence | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """What one step trains on, and where it came from.

    Attributes:
        training: the samples of the step.
        groups: the rollouts behind them, those that gave no sample included; empty for samples that nobody rolled out.
        rewards: rollout id -> its reward, for the rollouts whose prompt names one.
        left_out: samples that are not trained on because their groups say nothing.
    """

    training: Sequence[TrainingSample]
    groups: Sequence[RolloutGroup] = ()
    rewards: Mapping[str, RewardResult] = field(default_factory=dict)
    left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The training samples of one optimizer step and the number of loss tokens they hold together (N)."""

    samples: tuple[TrainingSample, ...]
    num_loss_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Branches:
    """What makes a row of several samples give the numbers of each alone.

    Attributes:
        positions: int64 ``[B, T]``, of each token in its own sample.
        ends: int64 ``[B, T]``: query i of a row sees key j where ``j <= i < ends[j]``. A token of padding sees itself.
    """

    positions: Tensor
    ends: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedTokens:
    """B rows of at most T tokens, R loss tokens in all.

    Attributes:
        token_ids: int64 ``[B, T]``, padded on the right; causal attention needs no mask for that.
        rows: int64 ``[R]``, index into the flattened ``[B * T]`` hidden states of the state that predicts each target. One
            state may predict tokens of several samples.
        targets: int64 ``[R]``, the sampled ids.
        sample_ids: the sample ids, in row order, and ``counts``: how many of the R rows belong to each.
        branches: how rows of several samples are to be read; None where each row is one sample.
    """

    token_ids: Tensor
    rows: Tensor
    targets: Tensor
    sample_ids: tuple[str, ...]
    counts: tuple[int, ...]
    branches: Branches | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A slice of a batch: its tokens and what is known of the R loss tokens.

    Attributes:
        sampler_logprobs, reward_advantages: float32 ``[R]``.
        evidence: each tensor of the teacher's evidence at the loss tokens, ``[R, ...]``; empty without a teacher.
        teacher: whose hidden states are among it; None where none are.
    """

    tokens: PaddedTokens
    sampler_logprobs: Tensor
    reward_advantages: Tensor
    evidence: Mapping[str, Tensor]
    teacher: str | None = None


SkipReason = Literal["non-finite", "no tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What an update reports.

    Attributes:
        metrics: the scalars of the batch.
        streams: stream -> sample id -> float32 ``[loss tokens]``, at the first update of the batch; see ``Terms.streams``.
        skipped: why the optimizer did not step: ``non-finite`` loss or gradient, or ``no tokens`` to learn from.
        zero_gradient: every gradient of the batch was exactly zero: there was nothing to learn.
    """

    metrics: Mapping[str, float]
    streams: Mapping[str, Mapping[str, Tensor]]
    skipped: SkipReason | None = None
    zero_gradient: bool = False


class PolicyState(TypedDict):
    """What continues an optimizer: the number of ``updates`` so far, and its ``moments`` by name."""

    updates: int
    moments: Mapping[str, Tensor]
