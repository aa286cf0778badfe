"""The check of the models against each other, with teachers that are broken in every way."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import FakeEnvironment, FakeSampler, FakeTeacher

from rnow.errors import EXIT_BAD_INPUT, ModelError
from rnow.rollout.collect import RolloutSettings
from rnow.training.residency import Residency
from rnow.training.selfcheck import SelfCheck, run_selfcheck
from rnow.types import Prompt

END = 9
VOCABULARY = 100
PROMPTS = [
    Prompt(id=f"dataset_0/{row}", dataset="dataset_0", row=row, messages=()) for row in range(9)
]
SETTINGS = RolloutSettings(
    group_size=1,
    window=64,
    max_tokens=8,
    stop_token_ids=(END,),
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    run_seed=0,
    purpose="test",
)


def check(
    teacher: Any = None,
    *,
    student: Any = None,
    sampler: FakeSampler | None = None,
    prompts: Any = PROMPTS,
) -> SelfCheck:
    return asyncio.run(
        run_selfcheck(
            prompts,
            sampler or FakeSampler([[4, 5, END]], logprob=-0.5),
            student or FakeTeacher(-0.5),
            teacher,
            lambda prompt, index: FakeEnvironment((1, 2)),
            SETTINGS,
            VOCABULARY,
            Residency(),
        )
    )


def test_a_healthy_pair() -> None:
    found = check(FakeTeacher(-0.75))
    assert found == SelfCheck(max_gap=0.0, teacher_kl=pytest.approx(0.25), notes=())


def test_a_few_prompts_are_enough() -> None:
    sampler = FakeSampler([[4, END]])
    check(FakeTeacher(-0.75), sampler=sampler)
    assert len(sampler.requests) == 4
    assert check(FakeTeacher(-0.75), prompts=PROMPTS[:1]).teacher_kl == pytest.approx(0.25)


def test_without_a_teacher() -> None:
    assert check(None).teacher_kl is None


def test_a_sampler_that_disagrees_is_told_of() -> None:
    found = check(None, student=FakeTeacher(lambda sample, p: -0.5 if p == 2 else -0.8))
    assert found.max_gap == pytest.approx(0.3)
    (note,) = found.notes
    assert "sampler and trainer disagree by 0.2" in note


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (FakeTeacher(math.nan), "non-finite"),
        (FakeTeacher(-math.inf), "non-finite"),
        (FakeTeacher(lambda sample, p: math.nan if p == 3 else -0.5), "non-finite"),
        (FakeTeacher(0.01), "above 0"),
        (FakeTeacher(lambda sample, p: 0.5 if p == 4 else -0.5), "above 0"),
        (FakeTeacher(-math.log(VOCABULARY)), "same log-probability, -ln 100"),
    ],
)
def test_a_broken_teacher_is_refused(teacher: FakeTeacher, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        check(teacher)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert caught.value.fix


def test_a_student_that_gives_every_token_the_same_is_refused() -> None:
    with pytest.raises(ModelError, match="the student gives every token the same") as caught:
        check(FakeTeacher(-0.75), student=FakeTeacher(-math.log(VOCABULARY)))
    assert caught.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_student_or_a_sampler_without_numbers_is_refused(value: float) -> None:
    """Not taken for one that agrees: every comparison with NaN is false."""
    one = FakeTeacher(lambda sample, position: value if position == 3 else -0.5)
    with pytest.raises(ModelError, match="the student gives 4 non-finite log-probabilities in 12"):
        check(FakeTeacher(-0.75), student=one)
    with pytest.raises(ModelError, match="the sampler gives 12 non-finite"):
        check(FakeTeacher(-0.75), sampler=FakeSampler([[4, 5, END]], logprob=value))


def test_a_teacher_that_changes_its_mind_is_refused() -> None:
    noise = itertools.count()
    teacher = FakeTeacher(lambda sample, position: -0.5 - 0.01 * next(noise))
    with pytest.raises(ModelError, match="other log-probabilities when asked twice"):
        check(teacher)


def test_rounding_is_no_fault() -> None:
    noise = itertools.count()
    check(FakeTeacher(lambda sample, position: -0.5 - 1e-6 * next(noise)))
    check(FakeTeacher(5e-5))


def test_a_server_that_rounds_with_its_batch_is_healthy() -> None:
    """Four requests at once, twice: in bfloat16 the same tokens come back a few hundredths apart, single ones by more."""
    count = itertools.count()

    def noisy(sample: Any, position: int) -> float:
        number = next(count)
        return -2.0 + (0.2 if number == 13 else 0.02 * (-1) ** number * (number >= 12))

    check(FakeTeacher(noisy))


def test_a_teacher_that_is_not_a_number_the_second_time_is_refused() -> None:
    count = itertools.count()
    teacher = FakeTeacher(lambda sample, position: -0.5 if next(count) < 12 else math.nan)
    with pytest.raises(ModelError, match="asked twice"):
        check(teacher)


def test_no_token_at_all_is_no_crash() -> None:
    found = check(FakeTeacher(-0.5), sampler=FakeSampler([[]]))
    assert found.max_gap == 0.0


def test_every_teacher_is_asked_and_the_one_that_is_broken_is_named() -> None:
    """The first prompts are all judged by one of them."""
    prompts = [replace(p, teacher="teacher/b" if p.row == 7 else "teacher/a") for p in PROMPTS]
    sampler = FakeSampler([[4, 5, END]], logprob=-0.5)
    assert check(FakeTeacher(-0.75), prompts=prompts, sampler=sampler).teacher_kl == pytest.approx(
        0.25
    )
    assert len(sampler.requests) == 5
    broken = FakeTeacher(lambda sample, p: math.nan if sample.teacher == "teacher/b" else -0.75)
    with pytest.raises(
        ModelError, match="the teacher/b gives 3 non-finite log-probabilities in 3 tokens"
    ):
        check(broken, prompts=prompts)
