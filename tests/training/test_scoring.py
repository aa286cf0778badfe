"""A teacher that is asked while the step is still sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence

import pytest
import torch

from rnow.algorithm.batching import build_samples
from rnow.algorithm.records import SAMPLED, Evidence, SampledEvidence, TeacherNeeds
from rnow.config import Config
from rnow.errors import TemporaryError
from rnow.plan.choices import scores_early
from rnow.training.scoring import Scoring
from rnow.types import Completion, Prompt, Rollout, RolloutGroup, Sample, Turn

PROMPT = Prompt(id="d/0", dataset="d", row=0, messages=({"role": "user", "content": "?"},))


def rollout(index: int, *, status: str = "completed") -> Rollout:
    completion = Completion(
        token_ids=(5, 6), logprobs=(-1.0, -2.0), finish_reason="stop", policy_version=0
    )
    return Rollout(
        prompt_id="d/0",
        index=index,
        turns=(Turn(observation_token_ids=(1, 2), completion=completion),),
        messages=(),
        status=status,  # type: ignore[arg-type]
        end_reason="stop",
    )


def in_loop(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    return run


class Slow:
    """Answers when it is let, and remembers what it was asked together."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.open = asyncio.Event()
        self.failure: Exception | None = None
        self.cancelled = 0

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        assert needs is SAMPLED
        self.asked.append([sample.id for sample in samples])
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure:
            raise self.failure
        return {
            sample.id: SampledEvidence(teacher_logprobs=torch.tensor([float(sample.id[-1]), 0.0]))
            for sample in samples
        }


@in_loop
async def test_each_rollout_is_asked_for_when_it_is_finished_and_none_twice() -> None:
    teacher = Slow()
    rollouts = [rollout(0), rollout(1), rollout(2, status="failed"), rollout(3)]
    async with Scoring(teacher, SAMPLED, early=True) as scoring:
        for one in rollouts[:3]:
            scoring.finished(PROMPT, one)
        await asyncio.sleep(0)
        assert teacher.asked == [["d/0#0"], ["d/0#1"]]
        teacher.open.set()
        samples = build_samples([RolloutGroup(prompt=PROMPT, rollouts=tuple(rollouts))])
        evidence = await scoring.evidence(samples)
    assert teacher.asked == [["d/0#0"], ["d/0#1"], ["d/0#3"]]
    assert evidence is not None
    assert {name: float(found.teacher_logprobs[0]) for name, found in evidence.items()} == {
        "d/0#0": 0.0, "d/0#1": 1.0, "d/0#3": 3.0,
    }  # fmt: skip


@in_loop
async def test_all_are_asked_for_together_otherwise() -> None:
    teacher = Slow()
    teacher.open.set()
    async with Scoring(teacher, SAMPLED, early=False) as scoring:
        scoring.finished(PROMPT, rollout(0))
        await asyncio.sleep(0)
        assert teacher.asked == []
        group = RolloutGroup(prompt=PROMPT, rollouts=(rollout(0), rollout(1)))
        await scoring.evidence(build_samples([group]))
    assert teacher.asked == [["d/0#0", "d/0#1"]]


@in_loop
async def test_no_teacher_says_nothing() -> None:
    async with Scoring(None, SAMPLED, early=True) as scoring:
        scoring.finished(PROMPT, rollout(0))
        assert await scoring.evidence([]) is None


@in_loop
async def test_what_a_teacher_raises_is_heard_at_the_end_of_the_sampling() -> None:
    teacher = Slow()
    teacher.failure = TemporaryError("the teacher is gone")
    teacher.open.set()
    async with Scoring(teacher, SAMPLED, early=True) as scoring:
        scoring.finished(PROMPT, rollout(0))
        await asyncio.sleep(0.01)
        with pytest.raises(TemporaryError, match="is gone"):
            await scoring.evidence([])


@in_loop
async def test_a_step_that_ends_asks_nothing_more() -> None:
    teacher = Slow()

    async def step() -> None:
        async with Scoring(teacher, SAMPLED, early=True) as scoring:
            scoring.finished(PROMPT, rollout(0))
            await asyncio.sleep(0)
            raise RuntimeError("the sampler")

    with pytest.raises(RuntimeError, match="the sampler"):
        await step()
    assert teacher.cancelled == 1


@pytest.mark.parametrize(
    ("changed", "early"),
    [
        ({}, True),
        ({"teacher": {"path": "t"}}, False),
        ({"sampler": {"url": "http://here:1"}}, False),
        ({"sampler": {"url": "http://here:1/"}}, False),
        ({"sampler": {"url": "http://there:1"}}, True),
        ({"teacher": {"path": "t", "url": "http://here:1", "control": "shuffled"}}, False),
        ({"teachers": {"math": {"path": "m", "url": "http://here:2"}}}, False),
    ],
)
def test_only_one_teacher_on_machines_of_its_own_is_asked_early(
    changed: dict[str, object], early: bool
) -> None:
    values: dict[str, object] = {
        "dataset_type": "distill",
        "model": {"path": "s"},
        "teacher": {"path": "t", "url": "http://here:1"},
    }
    assert scores_early(Config(**(values | changed))) is early  # type: ignore[arg-type]
