from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.algorithm import reference

from rnow.algorithm.policy_gradient import shape_advantages

TOKENS = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=8
)


def _columns(values: list[tuple[float, float, float]]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True)]


@given(TOKENS, st.floats(0, 2), st.floats(0, 2), st.floats(0.5, 20))
def test_is_the_formula(
    values: list[tuple[float, float, float]], kl_coef: float, reward_coef: float, clamp: float
) -> None:
    rewards, student, teacher = _columns(values)
    shaped = shape_advantages(
        rewards, student, teacher, kl_penalty_coef=kl_coef, reward_coef=reward_coef, kl_clamp=clamp
    )
    expected = [
        reference.shaped_advantage(
            r, s, t, kl_penalty_coef=kl_coef, reward_coef=reward_coef, kl_clamp=clamp
        )
        for r, s, t in values
    ]
    assert shaped.advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert shaped.teacher_kl is not None
    assert shaped.teacher_kl.tolist() == [s - t for _, s, t in values]
    assert shaped.clamped.tolist() == [abs(s - t) > clamp for _, s, t in values]


def test_no_gradient_passes_through_the_advantage() -> None:
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    shaped = shape_advantages(
        torch.zeros(2),
        student,
        torch.tensor([-1.5, -0.5]),
        kl_penalty_coef=1.0,
        reward_coef=0.0,
        kl_clamp=20.0,
    )
    assert not shaped.advantages.requires_grad
    assert shaped.teacher_kl is not None
    assert not shaped.teacher_kl.requires_grad
    assert shaped.advantages.tolist() == [-0.5, 1.5]


def test_the_kl_term_is_neither_centred_nor_scaled() -> None:
    student = torch.full((4,), -1.0)
    teacher = torch.full((4,), -1.25)
    shaped = shape_advantages(
        torch.zeros(4), student, teacher, kl_penalty_coef=0.1, reward_coef=0.0, kl_clamp=20.0
    )
    assert shaped.advantages.tolist() == pytest.approx([-0.025] * 4)


@given(TOKENS)
def test_without_kl_or_with_teacher_equal_to_student_the_reward_is_left(
    values: list[tuple[float, float, float]],
) -> None:
    rewards, student, teacher = _columns(values)
    for teacher_logprobs, coefficient in ((None, 0.7), (teacher, 0.0), (student, 0.7)):
        shaped = shape_advantages(
            rewards,
            student,
            teacher_logprobs,
            kl_penalty_coef=coefficient,
            reward_coef=1.0,
            kl_clamp=20.0,
        )
        assert torch.equal(shaped.advantages, rewards)


def test_without_a_teacher_there_is_no_kl() -> None:
    shaped = shape_advantages(
        torch.ones(3), torch.zeros(3), None, kl_penalty_coef=1.0, reward_coef=2.0, kl_clamp=20.0
    )
    assert shaped.teacher_kl is None
    assert not shaped.clamped.any()
    assert shaped.advantages.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("discount", [0.5, 0.97, 1.0])
def test_future_kl_is_summed_back_within_its_rollout(discount: float) -> None:
    student, teacher = torch.randn(2, 20, dtype=torch.float64)
    counts = (7, 1, 0, 12)
    shaped = shape_advantages(
        torch.zeros(20, dtype=torch.float64),
        student,
        teacher,
        kl_penalty_coef=0.7,
        reward_coef=0.0,
        kl_clamp=1.0,
        kl_discount=discount,
        counts=counts,
    )
    expected, start = [], 0
    for count in counts:
        kl = (student - teacher)[start : start + count].clamp(-1, 1).tolist()
        for t in range(count):
            expected.append(-0.7 * sum(discount ** (s - t) * kl[s] for s in range(t, count)))
        start += count
    assert shaped.advantages.tolist() == pytest.approx(expected, abs=1e-12)
    assert shaped.teacher_kl is not None
    assert torch.equal(shaped.teacher_kl, student - teacher), "what is reported is not summed"
