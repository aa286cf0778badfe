"""What a training step minimises: one class per objective, and what it says of every token.

The policy knows no objective. It hands over hidden states, sums the losses, divides by N, the loss tokens of the whole
optimizer step over all micro-batches and ranks (dividing per micro-batch would weigh tokens by the accident of their
neighbours), and calls backward. What else an objective found out about each token it names as a stream; metrics and
transcripts take streams by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from rnow.algorithm.head import Head
from rnow.algorithm.records import MicroBatch, TeacherNeeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One micro-batch of R loss tokens under an objective.

    Attributes:
        losses: ``[R]`` with gradient, summed by the caller.
        streams: name -> ``[R]``, detached. ``logprobs``, the student's own of each token, is always there; with a teacher
            ``teacher_logprobs`` too.
    """

    losses: Tensor
    streams: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a stream becomes one number of the step.

    Attributes:
        stream: its name; a step whose micro-batches lack it (no teacher) has no such number.
        reduction: over the loss tokens of the batch; ``std`` is the population's.
        over_updates: where a batch is used for several updates, the number of the ``first`` (what the batch was like), or
            the ``largest`` of all (how far it was pushed).
        by_dataset: one number per dataset, whose name replaces ``{dataset}`` in the metric's.
    """

    stream: str
    reduction: Literal["mean", "max", "std"] = "mean"
    over_updates: Literal["first", "largest"] = "first"
    by_dataset: bool = False


class Objective(Protocol):
    """A loss on the tokens of a batch."""

    @property
    def needs(self) -> TeacherNeeds:
        """What the teacher must say."""
        ...

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """Metric name -> the stream it sums up, in the order in which they are logged. ``loss`` is among them: an update
        whose loss is not finite is skipped."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What it trains beside the adapter, by name."""
        ...

    def describe(self) -> str:
        """What is minimised, in a few words for the header of a run."""
        ...

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """Losses and streams of one micro-batch.

        Args:
            hidden: ``[R, H]`` the student's final hidden states that predict the loss tokens, with gradient.
            head: the student's frozen head.
            micro: the tokens, what the sampler and the teacher said of them, and their reward advantages.
        """
        ...
