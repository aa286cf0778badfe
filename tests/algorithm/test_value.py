"""Generalised advantage estimation against its sums, and a value head that learns beside another objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.algorithm.direct import CASES, ROWS, Both, make
from torch import Tensor

from rnow.algorithm.objective import Objective
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.value import Valued, ValueHead, gae


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 0.95, 1.0])
def test_against_the_sums(gae_lambda: float) -> None:
    values = torch.randn(9, dtype=torch.float64)
    reward = 1.7
    found = gae(values, torch.full((9,), reward, dtype=torch.float64), gae_lambda)
    after = [*values.tolist()[1:], 0.0]
    rewards = [0.0] * 8 + [reward]
    deltas = [r + v - now for r, v, now in zip(rewards, after, values.tolist(), strict=True)]
    expected = [sum(gae_lambda ** (s - t) * deltas[s] for s in range(t, 9)) for t in range(9)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_lambda_1_is_the_reward_minus_the_value() -> None:
    values = torch.randn(5, dtype=torch.float64)
    found = gae(values, torch.full((5,), 2.0, dtype=torch.float64), 1.0)
    torch.testing.assert_close(found, 2.0 - values)


def test_no_tokens() -> None:
    assert gae(torch.zeros(0), torch.zeros(0), 0.9).shape == (0,)


def started(inner: Objective) -> Valued:
    head = ValueHead(5, "cpu").double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, generator=torch.Generator().manual_seed(3)))
        head.bias.fill_(0.2)
    return Valued(objective=inner, head=head, gae_lambda=0.9)


def rewarded(both: Both, *rewards: float) -> Both:
    counts = both.micro.tokens.counts
    each = torch.cat(
        [torch.full((n,), r, dtype=torch.float64) for n, r in zip(counts, rewards, strict=True)]
    )
    evidence = {"teacher_logprobs": torch.full((ROWS,), -1.0, dtype=torch.float64)}
    micro = replace(both.micro, reward_advantages=each, evidence=evidence, teacher=None)
    return replace(both, micro=micro)


INNER = PolicyGradient(loss_fn="importance_sampling", reward_coef=1.0, kl_penalty_coef=0.1)


def test_the_other_objective_is_given_the_advantages() -> None:
    both = rewarded(make(CASES["plain"]), 1.0, -0.5)
    valued = started(INNER)
    hidden = both.hidden.clone().requires_grad_()
    terms = valued.terms(hidden, both.head, both.micro)
    values = (both.hidden @ valued.head.weight + valued.head.bias).detach()
    parts = []
    for own, reward in zip(values.split([4, ROWS - 4]), (1.0, -0.5), strict=True):
        parts.append(gae(own, torch.full_like(own, reward), 0.9))
    advantages = torch.cat(parts)
    alone = hidden.detach().clone().requires_grad_()
    plain = INNER.terms(alone, both.head, replace(both.micro, reward_advantages=advantages))
    found: tuple[Tensor, ...] = torch.autograd.grad(
        terms.losses.sum(), [hidden, valued.head.weight, valued.head.bias]
    )
    (expected,) = torch.autograd.grad(plain.losses.sum(), alone)
    torch.testing.assert_close(found[0], expected, atol=1e-14, rtol=0)
    # d/dw of (V - R)^2 / 2 is (V - R) h, and R - V is the advantage.
    torch.testing.assert_close(found[1], -(advantages[:, None] * both.hidden).sum(0))
    torch.testing.assert_close(found[2], -advantages.sum())
    torch.testing.assert_close(terms.streams["value"], values)
    assert {"value/mean", "value/loss", "advantage/mean"} <= valued.summaries.keys()


def test_a_rollout_without_a_reward_teaches_nothing() -> None:
    both = rewarded(make(CASES["plain"]), float("nan"), 0.4)
    valued = started(replace(INNER, kl_penalty_coef=0.0))
    hidden = both.hidden.clone().requires_grad_()
    terms = valued.terms(hidden, both.head, both.micro)
    gradients = torch.autograd.grad(terms.losses.sum(), [hidden, valued.head.weight])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:4].any()
    assert gradients[0][4:].any()
    assert not terms.streams["value_losses"][:4].any()
