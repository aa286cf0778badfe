"""A teacher that reads another prompt before the student's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tests.teacher.conformance import embedded

from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.teacher.privileged import PrivilegedTeacher, with_prompt
from rnow.types import Sample

TWO_TURNS = Sample(
    id="dataset_0/3#1",
    dataset="dataset_0",
    token_ids=(1, 2, 3, 40, 41, 4, 5, 42),
    loss_mask=(False, False, False, True, True, False, False, True),
    sampler_logprobs=(0.0, 0.0, 0.0, -0.1, -0.2, 0.0, 0.0, -0.3),
)


class Listening:
    """Remembers what it was asked."""

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        self.samples, self.needs = list(samples), needs
        return {}


@pytest.mark.parametrize("prompt", [(7,), (7, 8, 9), (7, 8, 9, 10, 11)])
def test_the_first_observation_is_replaced_and_later_ones_stay(prompt: tuple[int, ...]) -> None:
    told = with_prompt(TWO_TURNS, prompt)
    assert told.token_ids == (*prompt, 40, 41, 4, 5, 42)
    assert told.loss_mask == (*[False] * len(prompt), True, True, False, False, True)
    assert told.sampler_logprobs == (*[0.0] * len(prompt), -0.1, -0.2, 0.0, 0.0, -0.3)
    assert (told.id, told.dataset) == (TWO_TURNS.id, TWO_TURNS.dataset)


def test_prompts_are_found_by_the_samples_prompt_and_needs_are_passed_on() -> None:
    listening = Listening()
    other = Sample(
        id="dataset_0/33#1",
        dataset="dataset_0",
        token_ids=(1, 2),
        loss_mask=(False, True),
        sampler_logprobs=(0.0, -1.0),
    )
    teacher = PrivilegedTeacher(listening, {"dataset_0/3": (9, 9)})
    needs = TeacherNeeds(top_k=2)
    asyncio.run(teacher.score([TWO_TURNS, other], needs))
    assert listening.samples == [with_prompt(TWO_TURNS, (9, 9)), other]
    assert listening.needs is needs


def test_evidence_is_that_of_the_answer_after_the_teachers_prompt(
    tiny_model_dir: Callable[..., Path],
) -> None:
    candidate = embedded(tiny_model_dir)
    teacher = PrivilegedTeacher(candidate.make(1.0, None), {"dataset_0/3": (50, 51, 52, 53, 54)})
    found = asyncio.run(teacher.score([TWO_TURNS], SAMPLED))
    judged = found[TWO_TURNS.id].teacher_logprobs  # type: ignore[union-attr]
    table = torch.log_softmax(
        candidate.logits((50, 51, 52, 53, 54, 40, 41, 4, 5, 42))[:, :100].double(), dim=-1
    )
    expected = torch.stack([table[4, 40], table[5, 41], table[8, 42]]).float()
    torch.testing.assert_close(judged, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(judged, candidate.expected(TWO_TURNS), atol=1e-2)
