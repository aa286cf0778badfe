"""The top-k bucket and its residual: value and gradient against naive forms, and by enumeration against the full KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tests.algorithm import reference
from tests.algorithm.direct import CASES, HIDDEN, ROWS, VOCABULARY, Both, Case, gradient_of, make
from torch import Tensor

from rnow.algorithm.bucket import TopKDivergence
from rnow.algorithm.head import Tiling
from rnow.algorithm.rewarded import RewardTerm

Name = Literal["reverse", "forward"]


def objective(both: Both, k: int, **fields: Any) -> TopKDivergence:
    return TopKDivergence(top_k=k, temperature=both.case.temperature, **fields)


def naive(both: Both, logits: Tensor, settings: TopKDivergence) -> Tensor:
    """``[R]``: the losses, row by row, differentiable."""
    logprobs = reference.log_softmax(logits)
    evidence, losses = both.micro.evidence, []
    for row in range(ROWS):
        x = int(both.micro.tokens.targets[row])
        ids, teacher = evidence["ids"][row].tolist(), evidence["logprobs"][row].tolist()
        loss = reference.bucket_kl(logprobs[row], ids, teacher, settings.divergence)
        if settings.divergence == "reverse":
            ratio = min(
                settings.ratio_cap,
                torch.exp(logprobs[row, x].detach() - both.micro.sampler_logprobs[row]).item(),
            )
            teacher_x = evidence["teacher_logprobs"][row].item()
            rho = reference.residual(logprobs[row].detach(), x, ids, teacher, teacher_x)
            rho = ratio * max(-settings.kl_clamp, min(settings.kl_clamp, rho))
            loss = loss + rho * logprobs[row, x]
        losses.append(settings.kl_penalty_coef * loss)
    return torch.stack(losses)


@pytest.mark.parametrize("tile", [1, 4, 1000])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
@pytest.mark.parametrize("name", ["reverse", "forward"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradient(
    case: Case, name: Name, k: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiling = Tiling(rows=tile, width=tile)
    monkeypatch.setattr("rnow.algorithm.head.tiling_for", lambda head: tiling)
    both = make(case).with_top_k(k)
    settings = objective(both, k, divergence=name, kl_penalty_coef=0.3, kl_clamp=1.5, ratio_cap=1.5)
    losses, streams, found = gradient_of(settings, both)
    hidden = both.hidden.clone().requires_grad_()
    expected = naive(both, both.student_logits(hidden), settings)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)
    outside = (both.micro.evidence["ids"] != both.micro.tokens.targets[:, None]).all(-1)
    assert streams["outside"].tolist() == outside.tolist()
    if k == 1 and case == CASES["plain"]:
        assert 0 < streams["kl_clamped"].sum() < ROWS, "the clamp should bite somewhere"


def over_all_tokens(
    both: Both, one: Callable[[Both], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Expectations over x ~ p of what ``one`` says of a row ``[R]`` and of a gradient ``[R, H]``, by enumeration."""
    logprobs = reference.log_softmax(both.student_logits(both.hidden))
    teacher = reference.log_softmax(both.teacher_logits)
    value = torch.zeros(ROWS, dtype=torch.float64)
    gradient = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    for x in range(VOCABULARY):
        micro = replace(
            both.micro,
            tokens=replace(both.micro.tokens, targets=torch.full((ROWS,), x)),
            sampler_logprobs=logprobs[:, x],
            evidence={**both.micro.evidence, "teacher_logprobs": teacher[:, x]},
        )
        values, gradients = one(replace(both, micro=micro))
        value += logprobs[:, x].exp() * values
        gradient += logprobs[:, x, None].exp() * gradients
    return value, gradient


def full_kl(both: Both) -> tuple[Tensor, Tensor]:
    hidden = both.hidden.clone().requires_grad_()
    kl = reference.reverse_kl(both.student_logits(hidden), both.teacher_logits)
    (gradient,) = torch.autograd.grad(kl.sum(), hidden)
    return kl.detach(), gradient


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_its_expectation_is_the_full_kl_and_its_gradient(case: Case, k: int) -> None:
    both = make(case).with_top_k(k)
    settings = objective(both, k, kl_clamp=1e9)

    def one(drawn: Both) -> tuple[Tensor, Tensor]:
        _, streams, gradient = gradient_of(settings, drawn)
        return streams["teacher_kl"], gradient

    value, gradient = over_all_tokens(both, one)
    kl, expected = full_kl(both)
    torch.testing.assert_close(value, kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["truncated", "renormalised", "bucket alone"])
def test_the_forms_without_a_residual_are_biased(form: str) -> None:
    """What others ship: the sum over the k alone, both sides renormalised over the k, or the bucket without its residual."""
    both = make(CASES["plain"]).with_top_k(3)
    ids, teacher = both.micro.evidence["ids"], both.micro.evidence["logprobs"]
    hidden = both.hidden.clone().requires_grad_()
    chosen = reference.log_softmax(both.student_logits(hidden)).gather(1, ids)
    if form == "renormalised":
        chosen, teacher = torch.log_softmax(chosen, -1), torch.log_softmax(teacher, -1)
    loss = (chosen.exp() * (chosen - teacher)).sum(-1)
    if form == "bucket alone":
        rest, teacher_rest = 1 - chosen.exp().sum(-1), 1 - teacher.exp().sum(-1)
        loss = loss + rest * torch.log(rest / teacher_rest)
    (gradient,) = torch.autograd.grad(loss.sum(), hidden)
    _, expected = full_kl(both)
    error = (gradient - expected).norm() / expected.norm()
    assert error > 0.03, "then the residual would not be needed"


def test_a_detached_kl_as_an_advantage_has_no_gradient_on_average() -> None:
    """The bug that a direct loss avoids: a full KL, without gradient, as the advantage of the sampled token."""
    both = make(CASES["plain"]).with_top_k(3)
    kl, expected = full_kl(both)

    def one(drawn: Both) -> tuple[Tensor, Tensor]:
        hidden = drawn.hidden.clone().requires_grad_()
        logprobs = reference.log_softmax(drawn.student_logits(hidden))
        live = logprobs.gather(1, drawn.micro.tokens.targets[:, None])[:, 0]
        (gradient,) = torch.autograd.grad((kl * live).sum(), hidden)
        return kl, gradient

    _, gradient = over_all_tokens(both, one)
    assert gradient.abs().max() < 1e-12
    assert expected.abs().max() > 0.1


def test_rewards_beside_it() -> None:
    both = make(CASES["everything"]).with_top_k(4)
    rewarded = RewardTerm(reward_coef=0.8, loss_fn="importance_sampling")
    losses, _, found = gradient_of(objective(both, 4, kl_penalty_coef=0.3, rewarded=rewarded), both)
    plain, _, without = gradient_of(objective(both, 4, kl_penalty_coef=0.3), both)
    hidden = both.hidden.clone().requires_grad_()
    logprobs = reference.log_softmax(both.student_logits(hidden))
    live = logprobs.gather(1, both.micro.tokens.targets[:, None])[:, 0]
    ratio = torch.exp(live - both.micro.sampler_logprobs)
    term = -ratio * 0.8 * both.micro.reward_advantages
    (gradient,) = torch.autograd.grad(term.sum(), hidden)
    torch.testing.assert_close(losses - plain, term.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found - without, gradient, atol=1e-10, rtol=0)


def test_all_ids_are_the_exact_divergence() -> None:
    """With k = V the bucket is empty: its floor must not be felt."""
    both = make(CASES["plain"]).with_top_k(VOCABULARY)
    _, streams, found = gradient_of(objective(both, VOCABULARY), both)
    kl, expected = full_kl(both)
    torch.testing.assert_close(streams["teacher_kl"], kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not streams["outside"].any()


def test_float32_evidence_of_a_teacher_that_is_certain() -> None:
    """1 - Q is rounding then: any c does, as long as nothing becomes infinite."""
    both = make(CASES["plain"])
    sharp = replace(both, teacher_logits=60 * both.teacher_logits).with_top_k(4)
    evidence = {
        name: t.float() if t.is_floating_point() else t for name, t in sharp.micro.evidence.items()
    }
    evidence["teacher_logprobs"] = evidence["teacher_logprobs"].clamp_min(-1000.0)
    micro = replace(
        sharp.micro,
        evidence=evidence,
        sampler_logprobs=sharp.micro.sampler_logprobs.float(),
        reward_advantages=sharp.micro.reward_advantages.float(),
    )
    single = replace(sharp, hidden=sharp.hidden.float(), weight=sharp.weight.float(), micro=micro)
    losses, streams, gradient = gradient_of(objective(single, 4), single)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert streams["teacher_kl"].isfinite().all()
