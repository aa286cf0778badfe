"""The full-vocabulary divergences against a naive float64 form, value and gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.algorithm import reference
from tests.algorithm.direct import (
    CASES,
    HIDDEN,
    ROWS,
    TEACHER_HIDDEN,
    VOCABULARY,
    Both,
    Case,
    gradient_of,
    make,
)

from rnow.algorithm.exact import DivergenceName, ExactDivergence
from rnow.algorithm.head import Tiling
from rnow.algorithm.rewarded import RewardTerm

DIVERGENCES: tuple[DivergenceName, ...] = ("reverse", "forward", "jsd")


def objective(both: Both, **fields: Any) -> ExactDivergence:
    return ExactDivergence(
        heads={"teacher": both.teacher_head}, temperature=both.case.temperature, **fields
    )


TILINGS = {
    "small": Tiling(rows=1, width=1),
    "middle": Tiling(rows=4, width=5),
    "whole": Tiling(rows=1000, width=1000),
}


@pytest.fixture(params=TILINGS.values(), ids=TILINGS)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.algorithm.exact.tiling_for", lambda head, kept: request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradient(case: Case, name: DivergenceName) -> None:
    both = make(case)
    losses, streams, found = gradient_of(
        objective(both, divergence=name, kl_penalty_coef=0.3), both
    )
    hidden = both.hidden.clone().requires_grad_()
    logits = both.student_logits(hidden)
    expected = 0.3 * reference.divergence(logits, both.teacher_logits, name)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)

    logprobs = reference.log_softmax(logits).detach()
    targets = both.micro.tokens.targets[:, None]
    close: Any = {"atol": 1e-12, "rtol": 0}
    torch.testing.assert_close(streams["logprobs"], logprobs.gather(1, targets)[:, 0], **close)
    teacher = reference.log_softmax(both.teacher_logits).gather(1, targets)[:, 0]
    torch.testing.assert_close(streams["teacher_logprobs"], teacher, **close)
    torch.testing.assert_close(streams["entropy"], reference.entropy(logits.detach()), **close)
    kl = reference.reverse_kl(logits.detach(), both.teacher_logits)
    torch.testing.assert_close(streams["teacher_kl"], kl, **close)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_row_weighs_as_its_caller_says(name: DivergenceName) -> None:
    both = make(CASES["everything"])
    weights = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
    *_, found = gradient_of(objective(both, divergence=name), both, weights)
    *_, plain = gradient_of(objective(both, divergence=name), both)
    torch.testing.assert_close(found, weights[:, None] * plain, atol=1e-12, rtol=0)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("loss_fn", ["ppo", "importance_sampling"])
def test_rewards_are_a_term_of_their_own(loss_fn: Any, name: DivergenceName) -> None:
    both = make(CASES["everything"])
    rewarded = RewardTerm(reward_coef=0.8, loss_fn=loss_fn, ratio_cap=2.0)
    mixed = objective(both, divergence=name, kl_penalty_coef=0.3, rewarded=rewarded)
    losses, streams, found = gradient_of(mixed, both)
    hidden = both.hidden.clone().requires_grad_()
    logits = both.student_logits(hidden)
    expected = 0.3 * reference.divergence(logits, both.teacher_logits, name)
    logprobs = reference.log_softmax(logits)
    rewards = torch.stack(
        [
            reference.token_loss(
                logprobs[row, both.micro.tokens.targets[row]],
                both.micro.sampler_logprobs[row].item(),
                0.8 * both.micro.reward_advantages[row].item(),
                loss_fn=loss_fn,
                clip_ratio_low=0.2,
                clip_ratio_high=0.2,
                ratio_cap=2.0,
            )
            for row in range(ROWS)
        ]
    )
    torch.testing.assert_close(losses, (expected + rewards).detach(), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad((expected + rewards).sum(), hidden)
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)
    assert 0 < streams["clipped"].sum() < ROWS, "clipped and unclipped tokens must both be there"
    torch.testing.assert_close(streams["advantages"], 0.8 * both.micro.reward_advantages)
    assert {"advantage/mean", "ratio/max"} <= mixed.summaries.keys()
    assert "advantage/mean" not in objective(both).summaries


def test_the_sampled_rule_averages_to_its_gradient() -> None:
    """What a score function estimates is what ``exact`` computes: over all x, p_x times the sampled gradient."""
    from rnow.algorithm.policy_gradient import PolicyGradient

    both = make(CASES["everything"])
    sampled = PolicyGradient(
        loss_fn="importance_sampling", kl_penalty_coef=1.0, temperature=both.case.temperature
    )
    logprobs = reference.log_softmax(both.student_logits(both.hidden))
    teacher = reference.log_softmax(both.teacher_logits)
    total = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    for x in range(VOCABULARY):
        tokens = replace(both.micro.tokens, targets=torch.full((ROWS,), x))
        micro = replace(
            both.micro,
            tokens=tokens,
            sampler_logprobs=logprobs[:, x],
            reward_advantages=torch.zeros(ROWS, dtype=torch.float64),
            evidence={"teacher_logprobs": teacher[:, x]},
            teacher=None,
        )
        *_, gradient = gradient_of(sampled, replace(both, micro=micro))
        total += logprobs[:, x, None].exp() * gradient
    *_, expected = gradient_of(objective(both), both)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)


def test_a_teacher_equal_to_the_student_gives_no_gradient() -> None:
    both = make(Case())
    same = replace(
        both,
        teacher_head=both.head,
        micro=replace(both.micro, evidence={"teacher_hidden": both.hidden}),
    )
    for name in DIVERGENCES:
        losses, streams, found = gradient_of(objective(same, divergence=name), same)
        assert losses.abs().max() < 1e-15
        assert found.abs().max() < 1e-15
        assert streams["teacher_kl"].abs().max() < 1e-15


def test_without_rows() -> None:
    both = make(Case())
    tokens = replace(both.micro.tokens, targets=torch.zeros(0, dtype=torch.long))
    empty = torch.zeros(0, dtype=torch.float64)
    micro = replace(
        both.micro,
        tokens=tokens,
        sampler_logprobs=empty,
        reward_advantages=empty,
        evidence={"teacher_hidden": both.teacher_hidden[:0]},
    )
    hidden = both.hidden[:0].clone().requires_grad_()
    terms = objective(both).terms(hidden, both.head, micro)
    assert terms.losses.shape == terms.streams["teacher_kl"].shape == (0,)
    terms.losses.sum().backward()


def test_float32_stays_close_where_probabilities_are_tiny() -> None:
    both = make(CASES["plain"])
    far = replace(both, hidden=40 * both.hidden, teacher_hidden=both.teacher_hidden)
    expected, *_ = gradient_of(objective(far), far)
    single = replace(
        far,
        hidden=far.hidden.float(),
        weight=far.weight.float(),
        teacher_head=replace(far.teacher_head, weight=far.teacher_head.weight.float()),
        micro=replace(
            far.micro, evidence={"teacher_hidden": far.teacher_hidden.float()},
            sampler_logprobs=far.micro.sampler_logprobs.float(),
            reward_advantages=far.micro.reward_advantages.float(),
        ),
    )  # fmt: skip
    found, _, gradient = gradient_of(objective(single), single)
    assert gradient.isfinite().all()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_tokens_by_vocabulary_tensor(
    name: DivergenceName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing holds more than one chunk of rows with the width of the vocabulary, and the work is done on single tiles."""
    from torch.utils._python_dispatch import TorchDispatchMode

    both = make(CASES["everything"])
    weights = {both.weight.data_ptr(), both.teacher_head.weight.data_ptr()}
    largest: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in weights:
                    largest.add(tensor.numel())
            return out

    monkeypatch.setattr(
        "rnow.algorithm.exact.tiling_for", lambda head, kept: Tiling(rows=5, width=4)
    )
    with Watch():
        gradient_of(objective(both, divergence=name), both)
    assert max(largest) == 5 * VOCABULARY, "the buffers of a chunk"
    work = largest - {5 * VOCABULARY, 4 * VOCABULARY, ROWS * HIDDEN, ROWS * TEACHER_HIDDEN}
    assert max(work) <= max(5 * TEACHER_HIDDEN, ROWS * HIDDEN)
