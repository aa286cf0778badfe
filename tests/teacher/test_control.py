"""Controls: what stands in for a teacher when a run is to show what is not its teacher's doing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence

import pytest
import torch

from rnow.algorithm.records import (
    Evidence,
    HiddenEvidence,
    SampledEvidence,
    TeacherNeeds,
    TopKEvidence,
)
from rnow.protocols import Teacher
from rnow.teacher.control import NoTeacher, ShuffledTeacher, controlled
from rnow.types import Sample


def sample(name: str, prompt: int, length: int, logprobs: Sequence[float] | None = None) -> Sample:
    """Two prompt tokens that are ``prompt``, then ``length`` sampled ones with an observation after the first."""
    mask = (False, False, True, *[False] * (length > 1), *[True] * (length - 1))
    drawn = iter(logprobs or [-1.0] * length)
    return Sample(
        id=name,
        dataset="dataset_0",
        token_ids=(prompt, prompt, *range(len(mask) - 2)),
        loss_mask=mask,
        sampler_logprobs=tuple(next(drawn) if on else 0.0 for on in mask),
    )


class Numbering:
    """Says ``10 * (number of the sample) + (number of the loss token)``, in whatever form."""

    def __init__(self) -> None:
        self.asked: list[TeacherNeeds] = []

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        self.asked.append(needs)
        return {one.id: self._say(10.0 * i, one, needs) for i, one in enumerate(samples)}

    def _say(self, first: float, one: Sample, needs: TeacherNeeds) -> Evidence:
        values = first + torch.arange(sum(one.loss_mask), dtype=torch.float32)
        if needs.hidden:
            return HiddenEvidence(teacher_hidden=values[:, None], teacher=f"teacher/{first:g}")
        if needs.top_k:
            table = values[:, None].expand(-1, needs.top_k)
            return TopKEvidence(teacher_logprobs=values, ids=table.long(), logprobs=table)
        return SampledEvidence(teacher_logprobs=values)


def ask(teacher: Teacher, samples: Sequence[Sample], **needs: int) -> Mapping[str, Evidence]:
    return asyncio.run(teacher.score(samples, TeacherNeeds(**needs)))


GROUPS = [sample("a0", 1, 3), sample("a1", 1, 2), sample("b0", 2, 5), sample("b1", 2, 1)]


def test_shuffled_gives_each_the_word_on_an_answer_to_another_prompt() -> None:
    found = ask(ShuffledTeacher(Numbering()), GROUPS)
    assert {name: said.teacher_logprobs.tolist() for name, said in found.items()} == {
        "a0": [20, 21, 22],
        "a1": [30, 30],
        "b0": [0, 1, 2, 0, 1],
        "b1": [10],
    }


def test_shuffled_moves_every_tensor_alike_and_the_teachers_name_with_them() -> None:
    inner = Numbering()
    hidden = ask(ShuffledTeacher(inner), GROUPS, hidden=True)
    assert hidden["b0"].teacher_hidden.flatten().tolist() == [0, 1, 2, 0, 1]
    assert hidden["b0"].teacher == "teacher/0"
    top = ask(ShuffledTeacher(inner), GROUPS, top_k=2)["b0"]
    assert top.ids.tolist() == [[0, 0], [1, 1], [2, 2], [0, 0], [1, 1]]
    assert torch.equal(top.logprobs, top.ids.float())
    assert torch.equal(top.logprobs[:, 0], top.teacher_logprobs)
    assert inner.asked == [TeacherNeeds(hidden=True), TeacherNeeds(top_k=2)]


@pytest.mark.parametrize("sizes", [(4, 1), (1, 4), (3, 3, 3), (2, 5, 1)])
def test_shuffled_finds_a_stranger_however_many_answers_were_lost(sizes: tuple[int, ...]) -> None:
    samples = [sample(f"{p}-{k}", p, 2) for p, size in enumerate(sizes) for k in range(size)]
    found = ask(ShuffledTeacher(Numbering()), samples)
    for one in samples:
        donor = samples[int(found[one.id].teacher_logprobs[0]) // 10]
        assert donor.token_ids[0] != one.token_ids[0]


def test_shuffled_with_one_prompt_left_takes_another_answer_to_it() -> None:
    samples = [sample("a0", 1, 2), sample("a1", 1, 2), sample("a2", 1, 2)]
    found = ask(ShuffledTeacher(Numbering()), samples)
    assert [found[one.id].teacher_logprobs.tolist() for one in samples] == [
        [10, 11], [20, 21], [0, 1],
    ]  # fmt: skip
    assert ask(ShuffledTeacher(Numbering()), samples[:1])["a0"].teacher_logprobs.tolist() == [0, 1]
    assert ask(ShuffledTeacher(Numbering()), []) == {}


def test_none_is_a_constant_on_unlikely_tokens_and_asks_nobody() -> None:
    inner = Numbering()
    teacher = controlled(inner, "none")
    assert isinstance(teacher, NoTeacher)
    drawn = [math.log(0.5), math.log(0.09), math.log(0.11), math.log(1e-4)]
    one = sample("a", 1, 4, drawn)
    said = ask(teacher, [one])["a"].teacher_logprobs
    assert said.dtype == torch.float32
    kl = torch.tensor(drawn) - said
    torch.testing.assert_close(kl, torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert inner.asked == []


def test_without_a_control_it_is_the_teacher_itself() -> None:
    teacher = Numbering()
    assert controlled(teacher, None) is teacher
    assert controlled(None, None) is None
