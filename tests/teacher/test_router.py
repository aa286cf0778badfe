"""Several teachers behind one: whose samples go to whom, and who is awake meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes import FakeTeacher

from rnow.algorithm.records import SAMPLED, TeacherNeeds, sampled_logprobs
from rnow.teacher.router import RoutedTeacher
from rnow.training.residency import Residency, StageClock
from rnow.types import Sample

ROLES = ("teacher", "teacher/code", "teacher/math")


def sample(name: str, teacher: str | None) -> Sample:
    return Sample(
        id=name,
        dataset="dataset_0",
        token_ids=(1, 2, 3),
        loss_mask=(False, True, True),
        sampler_logprobs=(0.0, -1.0, -1.0),
        teacher=teacher,
    )


SAMPLES = [
    sample("d/0#0", "teacher/math"), sample("d/1#0", "teacher/code"), sample("d/2#0", "teacher/math"),
    sample("d/3#0", "teacher"),
]  # fmt: skip


class Noted(FakeTeacher):
    """Says a number of its own, and notes what it is asked."""

    def __init__(self, says: float) -> None:
        super().__init__(says)
        self.asked: list[tuple[list[str], TeacherNeeds]] = []

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED) -> Any:
        self.asked.append(([one.id for one in samples], needs))
        return await super().score(samples, needs)


def test_each_sample_is_judged_by_the_teacher_of_its_row() -> None:
    teachers = {role: Noted(-float(1 + index)) for index, role in enumerate(ROLES)}
    order: list[str] = []

    @asynccontextmanager
    async def only(role: str) -> AsyncIterator[None]:
        order.append(role)
        yield

    router = RoutedTeacher(teachers, only)
    evidence = asyncio.run(router.score(SAMPLES, SAMPLED))
    said = {name: sampled_logprobs(found).tolist() for name, found in evidence.items()}
    assert said == {
        "d/0#0": [-3.0, -3.0], "d/1#0": [-2.0, -2.0], "d/2#0": [-3.0, -3.0], "d/3#0": [-1.0, -1.0],
    }  # fmt: skip
    assert teachers["teacher/math"].asked == [(["d/0#0", "d/2#0"], SAMPLED)], "in one go"
    assert order == list(ROLES), "in the order of the config, whatever that of the samples"
    asyncio.run(router.score(SAMPLES[1:2], SAMPLED))
    assert order[3:] == ["teacher/code"], "who has nothing to judge is not woken"


@pytest.mark.parametrize("teacher", [None, "teacher/mth"])
def test_a_sample_without_a_teacher_is_no_excuse_to_take_another(teacher: str | None) -> None:
    router = RoutedTeacher({role: FakeTeacher() for role in ROLES}, Residency().only)
    with pytest.raises(KeyError, match="d/9#0 has no teacher"):
        asyncio.run(router.score([*SAMPLES, sample("d/9#0", teacher)], SAMPLED))


class Shared:
    """A card with a trainer and two teachers; whoever scores insists on being alone there."""

    def __init__(self) -> None:
        self.awake: set[str] = {"trainer"}
        self.events: list[str] = []
        self.gpu = Residency()
        for role in ROLES[1:]:
            self.gpu.add(role, self._sleeper(role))
        self.gpu.add("trainer", self._sleeper("trainer"))
        self.teachers = {role: FakeTeacher(self._says(role)) for role in ROLES[1:]}

    def _sleeper(self, part: str) -> Any:
        async def sleep() -> None:
            if part in self.awake:
                self.awake.remove(part)
                self.events.append(f"sleep {part}")

        async def wake() -> None:
            if part not in self.awake:
                self.awake.add(part)
                self.events.append(f"wake {part}")

        return SimpleNamespace(sleep=sleep, wake=wake)

    def _says(self, role: str) -> Any:
        def says(sample: Sample, position: int) -> float:
            assert self.awake == {role}, f"{role} scores while {sorted(self.awake)} are there"
            return -0.5

        return says


def test_one_of_them_is_on_the_card_and_the_others_sleep() -> None:
    card, clock = Shared(), StageClock()
    router = RoutedTeacher(card.teachers, card.gpu.only)

    async def step() -> None:
        async with card.gpu.only("teacher", clock):
            with clock.stage("teacher"):
                await router.score(SAMPLES[:3], SAMPLED)
        async with card.gpu.only("trainer", clock):
            assert card.awake == {"trainer"}

    asyncio.run(step())
    assert card.events == [
        "sleep trainer", "wake teacher/code", "sleep teacher/code", "wake teacher/math",
        "sleep teacher/math", "wake trainer",
    ]  # fmt: skip
    changes = {f"time/wake_{part}" for part in ("teacher/code", "teacher/math", "trainer")}
    assert changes <= set(clock.metrics())


def test_nobody_else_takes_the_card_from_the_teachers() -> None:
    card = Shared()

    async def intrude() -> None:
        async with card.gpu.only("teacher"), card.gpu.only("trainer"):
            raise AssertionError("the trainer got the card")

    async def intrude_on_one() -> None:
        async with card.gpu.only("teacher/code"), card.gpu.only("teacher/math"):
            raise AssertionError("two teachers got the card")

    for attempt in (intrude, intrude_on_one):
        with pytest.raises(RuntimeError, match="asks for the card while teacher"):
            asyncio.run(attempt())
    asyncio.run(RoutedTeacher(card.teachers, card.gpu.only).score(SAMPLES[:2], SAMPLED))
