from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.policy.student import OptimizerSettings, ScheduleName


def learning_rate(
    update: int, *, base: float, warmup: int, total: int, schedule: ScheduleName
) -> float:
    settings = OptimizerSettings(
        learning_rate=base, warmup_updates=warmup, total_updates=total, schedule=schedule
    )
    return settings.rate_of(update)


SCHEDULES: list[ScheduleName] = ["constant", "linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(warmup=st.integers(1, 10), base=st.floats(1e-6, 1))
def test_warm_up_rises_in_equal_steps_from_above_zero(
    schedule: ScheduleName, warmup: int, base: float
) -> None:
    rates = [
        learning_rate(update, base=base, warmup=warmup, total=warmup + 5, schedule=schedule)
        for update in range(warmup + 1)
    ]
    assert rates[:warmup] == pytest.approx([base * (n + 1) / warmup for n in range(warmup)])
    assert rates[warmup] == pytest.approx(base)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (
            "cosine",
            [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0, 0.0],
        ),
    ],
)
def test_shapes_with_a_warm_up_of_two_and_six_updates(
    schedule: ScheduleName, expected: list[float]
) -> None:
    rates = [
        learning_rate(update, base=1.0, warmup=2, total=6, schedule=schedule) for update in range(8)
    ]
    assert rates == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    base=st.floats(1e-6, 1),
    warmup=st.integers(0, 20),
    total=st.integers(0, 20),
    update=st.integers(0, 50),
)
def test_stays_between_zero_and_base(
    schedule: ScheduleName, base: float, warmup: int, total: int, update: int
) -> None:
    rate = learning_rate(update, base=base, warmup=warmup, total=total, schedule=schedule)
    assert 0.0 <= rate <= base * (1 + 1e-12)
