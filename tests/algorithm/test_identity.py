"""The expected gradient of the sampled rule is the gradient of the full-vocabulary reverse KL.

Every sequence a small student can write is enumerated with its exact probability. The KL of a later token is not summed
back to an earlier one (kl_discount 0), so the identity holds at each position with the distribution of prefixes taken as
given: the sum over prefixes uses detached prefix probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.algorithm import reference
from torch import Tensor

from rnow.algorithm.head import Head, Tiling, selected_logprobs
from rnow.algorithm.policy_gradient import shape_advantages
from rnow.algorithm.surrogate import LossName, token_losses

VOCABULARY, PADDED, HIDDEN, LONGEST, STOP = 7, 9, 4, 3, 0


class Student:
    """A recurrent cell in front of a frozen head: the distribution of a token depends on all tokens before it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.embedding = normal(VOCABULARY, HIDDEN).requires_grad_(True)
        self.recurrence = normal(HIDDEN, HIDDEN).requires_grad_(True)
        self.start = normal(HIDDEN).requires_grad_(True)
        self.weight = normal(PADDED, HIDDEN)
        self.teacher_weight = self.weight + 0.7 * normal(PADDED, HIDDEN)
        self.parameters = [self.embedding, self.recurrence, self.start]

    def hidden(self, prefix: tuple[int, ...]) -> Tensor:
        state = torch.tanh(self.start)
        for token in prefix:
            state = torch.tanh(self.recurrence @ state + self.embedding[token])
        return state

    def logits(self, prefix: tuple[int, ...], weight: Tensor, temperature: float) -> Tensor:
        return reference.logits(
            self.hidden(prefix)[None],
            weight,
            None,
            scale=1.0,
            softcap=None,
            temperature=temperature,
            vocabulary=VOCABULARY,
        )

    def logprobs(self, prefix: tuple[int, ...], weight: Tensor, temperature: float) -> Tensor:
        return reference.log_softmax(self.logits(prefix, weight, temperature))[0]


def _prefixes() -> Iterator[tuple[int, ...]]:
    """Everything the student can have written when it draws another token."""
    level: list[tuple[int, ...]] = [()]
    for _ in range(LONGEST):
        yield from level
        level = [
            (*prefix, token) for prefix in level for token in range(VOCABULARY) if token != STOP
        ]


def _sequences() -> Iterator[tuple[int, ...]]:
    """Everything the student can end up with: ended by the stop token, or cut at the longest length."""
    for prefix in _prefixes():
        for token in range(VOCABULARY):
            if token == STOP or len(prefix) == LONGEST - 1:
                yield (*prefix, token)


def _probability(student: Student, sequence: tuple[int, ...], temperature: float) -> float:
    logprob = 0.0
    for position, token in enumerate(sequence):
        values = student.logprobs(sequence[:position], student.weight, temperature)
        logprob += values[token].item()
    return float(torch.tensor(logprob, dtype=torch.float64).exp())


def _expected_gradient_of_the_sampled_rule(
    student: Student, temperature: float, loss_fn: LossName, kl_clamp: float
) -> tuple[list[Tensor], float]:
    hidden, targets, teacher, weights = [], [], [], []
    total = 0.0
    for sequence in _sequences():
        probability = _probability(student, sequence, temperature)
        total += probability
        for position, token in enumerate(sequence):
            prefix = sequence[:position]
            hidden.append(student.hidden(prefix))
            targets.append(token)
            scores = student.logprobs(prefix, student.teacher_weight, temperature)
            teacher.append(scores[token].detach())
            weights.append(probability)
    head = Head(weight=student.weight[:VOCABULARY])
    live = selected_logprobs(
        torch.stack(hidden),
        head,
        torch.tensor(targets),
        temperature=temperature,
        tiling=Tiling(rows=50, width=7),
    ).logprobs
    shaped = shape_advantages(
        torch.zeros_like(live),
        live,
        torch.stack(teacher),
        kl_penalty_coef=1.0,
        reward_coef=0.0,
        kl_clamp=kl_clamp,
    )
    losses = token_losses(
        live,
        live.detach(),
        shaped.advantages,
        loss_fn=loss_fn,
        clip_ratio_low=0.2,
        clip_ratio_high=0.2,
        ratio_cap=10.0,
    ).losses
    expected = (losses * torch.tensor(weights, dtype=torch.float64)).sum()
    return list(torch.autograd.grad(expected, student.parameters)), total


def _gradient_of_the_full_kl(student: Student, temperature: float) -> list[Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for prefix in _prefixes():
        probability = _probability(student, prefix, temperature)
        kl = reference.reverse_kl(
            student.logits(prefix, student.weight, temperature),
            # The teacher's answer depends on the prefix, not on the student's parameters.
            student.logits(prefix, student.teacher_weight, temperature).detach(),
        )
        total = total + probability * kl.sum()
    return list(torch.autograd.grad(total, student.parameters))


def _gap(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_expected_sampled_gradient_is_the_full_reverse_kl_gradient(
    loss_fn: LossName, temperature: float
) -> None:
    student = Student()
    found, total = _expected_gradient_of_the_sampled_rule(student, temperature, loss_fn, 1e9)
    expected = _gradient_of_the_full_kl(student, temperature)
    assert total == pytest.approx(1.0, abs=1e-12)
    assert min(part.abs().max().item() for part in expected) > 1e-2
    assert _gap(found, expected) < 1e-10


def test_the_clamp_is_what_breaks_the_identity() -> None:
    student = Student()
    found, _ = _expected_gradient_of_the_sampled_rule(student, 1.0, "importance_sampling", 0.1)
    assert _gap(found, _gradient_of_the_full_kl(student, 1.0)) > 1e-3
