"""Conditions of --keep-if: how they are read, and what they say of an answer."""

from __future__ import annotations

import pytest

from rnow.errors import InputError
from rnow.generation.keep import Condition, Judged, read_conditions, why_rejected

REWARDS = ["accuracy", "style"]


def condition(name: str, sign: str, number: float) -> Condition:
    return Condition(name=name, sign=sign, number=number)


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("reward>=1", [condition("reward", ">=", 1)]),
        (" reward >= 1.5 ", [condition("reward", ">=", 1.5)]),
        (
            "accuracy==1 and tokens<2e3",
            [condition("accuracy", "==", 1), condition("tokens", "<", 2000)],
        ),
        ("style>-0.5,turns!=2", [condition("style", ">", -0.5), condition("turns", "!=", 2)]),
        ("tokens<=.5", [condition("tokens", "<=", 0.5)]),
    ],
)
def test_conditions(text: str, conditions: list[Condition]) -> None:
    assert read_conditions(text, REWARDS) == tuple(conditions)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no condition"),
        ("reward", "is no condition"),
        ("reward=1", "is no condition"),
        ("reward>=", "is no condition"),
        ("reward>=one", "is no condition"),
        ("reward>=1 or tokens<2", "is no condition"),
        ("acuracy>=1", "nothing named 'acuracy'"),
    ],
)
def test_what_is_no_condition(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_conditions(text, REWARDS)
    assert caught.value.where == "--keep-if"
    assert caught.value.fix


def test_a_slip_is_recognised() -> None:
    with pytest.raises(InputError) as caught:
        read_conditions("acuracy>=1", REWARDS)
    assert caught.value.fix == "did you mean accuracy?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("reward>=1", None),
        ("reward>1", "not reward>1"),
        ("accuracy==1 and style<0", "not style<0"),
        ("style>=0", None),
        ("tokens<10", "not tokens<10"),
        ("turns==2 and tokens<=12", None),
    ],
)
def test_what_is_rejected(text: str, reason: str | None) -> None:
    answer = Judged(tokens=12, turns=2, total=1.0, rewards={"accuracy": 1.0, "style": 0.0})
    assert why_rejected(answer, read_conditions(text, REWARDS)) == reason


def test_a_reward_that_failed_rejects_only_where_it_is_asked_for() -> None:
    answer = Judged(
        tokens=1, turns=1, total=1.0, rewards={"accuracy": 1.0, "style": 0.0}, failed=("style",)
    )
    assert why_rejected(answer, read_conditions("accuracy>=1", REWARDS)) is None
    assert why_rejected(answer, read_conditions("style<=0", REWARDS)) == "reward style failed"
    assert why_rejected(answer, read_conditions("reward>=1", REWARDS)) == "reward style failed"


def test_a_row_without_the_reward() -> None:
    conditions = read_conditions("style>=0", REWARDS)
    assert why_rejected(Judged(tokens=1, turns=1), conditions) == "style is not among its rewards"
