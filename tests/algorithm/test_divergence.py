from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rnow.algorithm.policy_gradient import K3_EXPONENT_LIMIT, k3, shape_advantages


def k1(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The estimate that shapes the advantages."""
    shaped = shape_advantages(
        torch.zeros_like(student), student, teacher, kl_penalty_coef=1, reward_coef=0, kl_clamp=20
    )
    assert shaped.teacher_kl is not None
    return shaped.teacher_kl


LOGPROBS = st.lists(st.tuples(st.floats(-15, 0), st.floats(-15, 0)), min_size=1, max_size=8)


def _pair(values: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = zip(*values, strict=True)
    return torch.tensor(student, dtype=torch.float64), torch.tensor(teacher, dtype=torch.float64)


@given(LOGPROBS)
def test_both_are_their_formula(values: list[tuple[float, float]]) -> None:
    student, teacher = _pair(values)
    assert k1(student, teacher).tolist() == [s - t for s, t in values]
    expected = [math.exp(t - s) - 1 + (s - t) for s, t in values]
    assert k3(student, teacher).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(LOGPROBS)
def test_k3_is_never_negative(values: list[tuple[float, float]]) -> None:
    assert (k3(*_pair(values)) >= -1e-15).all()


def test_both_average_to_the_reverse_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    student, teacher = torch.log_softmax(logits, dim=-1)
    kl = (student.exp() * (student - teacher)).sum().item()
    assert kl > 0.1
    for estimate in (k1, k3):
        assert (student.exp() * estimate(student, teacher)).sum().item() == pytest.approx(
            kl, abs=1e-12
        )


def test_one_impossible_token_keeps_k3_finite() -> None:
    far = k3(torch.tensor([-500.0]), torch.tensor([0.0]))
    assert far.item() == pytest.approx(math.exp(K3_EXPONENT_LIMIT) - 1 - 500.0, rel=1e-6)
