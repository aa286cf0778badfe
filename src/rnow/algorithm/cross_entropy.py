"""The objective of sft and midtrain: how improbable the student finds the tokens of the rows.

For a loss token x with the student's logits z and p = softmax(z) the loss is -log p_x, and d loss / d z = p - e_x. It is taken by
``head.selected_logprobs``: two products with the head for each token, and never a [tokens, vocabulary] tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rnow.algorithm.head import Head, selected_logprobs
from rnow.algorithm.objective import Summary, Terms
from rnow.algorithm.records import SAMPLED, MicroBatch, TeacherNeeds

SUMMARIES: Mapping[str, Summary] = {
    "loss": Summary(stream="losses"),
    "loss/{dataset}": Summary(stream="losses", by_dataset=True),
    "entropy": Summary(stream="entropy"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Maximum likelihood of the loss tokens, whoever wrote them. It asks no teacher and reads neither sampler nor rewards."""

    @property
    def needs(self) -> TeacherNeeds:
        """See ``Objective.needs``."""
        return SAMPLED

    @property
    def summaries(self) -> Mapping[str, Summary]:
        """See ``Objective.summaries``."""
        return SUMMARIES

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See ``Objective.parameters``."""
        return {}

    def describe(self) -> str:
        """See ``Objective.describe``."""
        return "cross-entropy of the rows' tokens"

    def terms(self, hidden: Tensor, head: Head, micro: MicroBatch) -> Terms:
        """See ``Objective.terms``."""
        found = selected_logprobs(hidden, head, micro.tokens.targets)
        assert found.entropy is not None, "asked for"
        losses = -found.logprobs
        streams = {
            "losses": losses.detach(),
            "logprobs": found.logprobs.detach(),
            "entropy": found.entropy,
        }
        return Terms(losses=losses, streams=streams)
