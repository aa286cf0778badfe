from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.algorithm import reference

from rnow.algorithm.surrogate import LossName, TokenLosses, token_losses

LOSSES: list[LossName] = ["ppo", "importance_sampling"]
DEFAULTS: dict[str, Any] = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "ratio_cap": 10.0}
# (log p_now, log p_sampler, advantage); wide enough for every bound to bite.
TOKENS = st.lists(
    st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.floats(-5, 5)), min_size=1, max_size=8
)


def _losses(
    values: list[tuple[float, float, float]], loss_fn: LossName, **settings: Any
) -> tuple[TokenLosses, torch.Tensor]:
    now, sampler, advantages = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*values, strict=True)
    )
    now.requires_grad_(True)
    found = token_losses(now, sampler, advantages, loss_fn=loss_fn, **(DEFAULTS | settings))
    (gradient,) = torch.autograd.grad(found.losses.sum(), now)
    return found, gradient


@pytest.mark.parametrize("loss_fn", LOSSES)
@given(values=TOKENS, low=st.floats(0, 0.5), high=st.floats(0, 2), cap=st.floats(3.5, 50))
def test_values_and_gradients_are_the_formula(
    loss_fn: LossName,
    values: list[tuple[float, float, float]],
    low: float,
    high: float,
    cap: float,
) -> None:
    settings = {"clip_ratio_low": low, "clip_ratio_high": high, "ratio_cap": cap}
    found, gradient = _losses(values, loss_fn, **settings)
    for index, (now, sampler, advantage) in enumerate(values):
        live = torch.tensor(now, dtype=torch.float64, requires_grad=True)
        naive = reference.token_loss(live, sampler, advantage, loss_fn=loss_fn, **settings)
        expected = torch.autograd.grad(naive, live)[0].item() if naive.requires_grad else 0.0
        assert found.losses[index].item() == pytest.approx(naive.item(), rel=1e-12, abs=1e-14)
        assert gradient[index].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("loss_fn", LOSSES)
@given(values=TOKENS)
def test_equal_logprobs_give_a_ratio_of_exactly_one(
    loss_fn: LossName, values: list[tuple[float, float, float]]
) -> None:
    on_policy = [(now, now, advantage) for now, _, advantage in values]
    found, gradient = _losses(on_policy, loss_fn)
    advantages = [advantage for _, _, advantage in values]
    assert found.ratio.tolist() == [1.0] * len(values)
    assert not found.clipped.any()
    assert found.losses.tolist() == [-advantage for advantage in advantages]
    # On policy both losses give the same step: the policy gradient -A.
    expected = [-advantage for advantage in advantages]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-15, abs=1e-300)


def _one(
    ratio: float, advantage: float, loss_fn: LossName, **settings: Any
) -> tuple[float, float, bool]:
    found, gradient = _losses([(-5.0 + math.log(ratio), -5.0, advantage)], loss_fn, **settings)
    return found.losses.item(), gradient.item(), bool(found.clipped.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (
            1.5,
            1.0,
            -1.2,
            0.0,
            True,
        ),  # good and already likelier than the upper bound: nothing to gain
        (0.5, 1.0, -0.5, -0.5, False),  # good but fallen below the lower bound: pulled back up
        (0.5, -1.0, 0.8, 0.0, True),  # bad and already below the lower bound
        (1.5, -1.0, 1.5, 1.5, False),  # bad but risen: pushed down with its whole ratio
        (30.0, -1.0, 10.0, 0.0, True),  # ... up to the cap
        (1.1, 2.0, -2.2, -2.2, False),  # inside the bounds
    ],
)
def test_the_six_cases_of_ppo(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: bool
) -> None:
    found = _one(ratio, advantage, "ppo")
    assert found == (pytest.approx(loss), pytest.approx(gradient), clipped)


def test_the_bounds_need_not_be_symmetric() -> None:
    wide = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4}
    assert _one(1.5, 1.0, "ppo", **wide) == (pytest.approx(-1.4), 0.0, True)
    assert _one(0.85, -1.0, "ppo", **wide) == (pytest.approx(0.9), 0.0, True)
    assert _one(1.3, 1.0, "ppo", **wide) == (pytest.approx(-1.3), pytest.approx(-1.3), False)


def test_importance_sampling_is_bounded_by_the_cap_alone() -> None:
    assert _one(5.0, 1.0, "importance_sampling") == (
        pytest.approx(-5.0),
        pytest.approx(-5.0),
        False,
    )
    assert _one(30.0, 1.0, "importance_sampling") == (pytest.approx(-10.0), 0.0, True)


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_absurd_gap_stays_finite(loss_fn: LossName, advantage: float) -> None:
    found, gradient = _losses(
        [(0.0, -2000.0, advantage), (-2000.0, 0.0, advantage)], loss_fn, ratio_cap=1e30
    )
    assert found.ratio.tolist() == pytest.approx([math.exp(20.0), math.exp(-20.0)])
    assert torch.isfinite(found.losses).all()
    assert gradient.tolist() == [0.0, 0.0]


def test_the_reported_ratio_and_clips_carry_no_gradient() -> None:
    now = torch.tensor([-1.0], requires_grad=True)
    found = token_losses(now, torch.tensor([-2.0]), torch.tensor([1.0]), loss_fn="ppo", **DEFAULTS)
    assert not found.ratio.requires_grad
    assert not found.clipped.requires_grad
    assert found.losses.requires_grad
