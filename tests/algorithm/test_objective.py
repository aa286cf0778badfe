"""What every objective keeps to."""

from __future__ import annotations

import pytest
import torch

from rnow.algorithm.batching import collate
from rnow.algorithm.cross_entropy import CrossEntropy
from rnow.algorithm.head import Head
from rnow.algorithm.objective import Objective
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import MicroBatch, SampledEvidence, TrainingSample
from rnow.policy.streams import PassStreams
from rnow.types import Sample

OBJECTIVES: list[Objective] = [
    CrossEntropy(),
    PolicyGradient(),
    PolicyGradient(loss_fn="importance_sampling", reward_coef=1.0, temperature=0.7),
]
MASKS = ((False, True, True), (False, False, True, False, True))


def micro_batch(*, teacher: bool = True) -> MicroBatch:
    training = []
    for row, mask in enumerate(MASKS):
        scores = torch.tensor([-1.0 - 0.25 * t for t, on in enumerate(mask) if on])
        sample = Sample(
            id=f"words/{row}#0",
            dataset=f"words_{row}",
            token_ids=tuple(range(1, len(mask) + 1)),
            loss_mask=mask,
            sampler_logprobs=tuple(-1.5 if on else 0.0 for on in mask),
        )
        evidence = SampledEvidence(teacher_logprobs=scores) if teacher else None
        training.append(
            TrainingSample(sample=sample, reward_advantage=row - 0.5, evidence=evidence)
        )
    return collate(training, "cpu")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.describe())
@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "no teacher"])
def test_what_every_objective_keeps_to(objective: Objective, teacher: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(weight=torch.randn(7, 3, generator=generator))
    hidden = torch.randn(4, 3, generator=generator, requires_grad=True)
    micro = micro_batch(teacher=teacher)
    terms = objective.terms(hidden, head, micro)
    assert terms.losses.shape == (4,)
    assert terms.losses.requires_grad
    assert "logprobs" in terms.streams, "transcripts and evaluations read it"
    for name, values in terms.streams.items():
        assert values.shape == (4,), name
        assert not values.requires_grad, name
    streams = {summary.stream for summary in objective.summaries.values()}
    assert terms.streams.keys() - streams <= {"logprobs", "teacher_logprobs"}, (
        "a stream that nobody sums up"
    )
    gathered = PassStreams()
    gathered.add(micro.tokens, terms.streams)
    metrics = gathered.metrics(
        objective.summaries, {"words/0#0": "words_0", "words/1#0": "words_1"}
    )
    assert metrics["loss"] == pytest.approx(terms.losses.mean().item())
    judged = teacher and "teacher_kl" in objective.summaries
    assert ("teacher_kl" in metrics) == judged
    assert ("teacher_kl/words_1" in metrics) == judged
    assert objective.needs.top_k >= 0
    assert objective.describe()
    terms.losses.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
