"""A teacher that is told more than the student: it scores the same answers after prompts of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rnow.algorithm.batching import at_loss_tokens
from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.protocols import Teacher
from rnow.types import Sample


class PrivilegedTeacher:
    """Puts the teacher's prompt in place of the student's, up to the student's first token; what tools and users said later
    stays. A sample whose prompt has no other words for the teacher is scored as it is.

    Evidence has one row per loss token, so that of the replaced sample is that of the student's.

    Args:
        teacher: scores what is put together.
        prompts: prompt id -> the teacher's prompt as token ids.
    """

    def __init__(self, teacher: Teacher, prompts: Mapping[str, Sequence[int]]) -> None:
        self._teacher = teacher
        self._prompts = prompts

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``."""
        return await self._teacher.score([self._as_told(sample) for sample in samples], needs)

    def _as_told(self, sample: Sample) -> Sample:
        prompt = self._prompts.get(sample.id.rpartition("#")[0])
        return sample if prompt is None else with_prompt(sample, prompt)


def with_prompt(sample: Sample, prompt: Sequence[int]) -> Sample:
    """The same answer after another prompt: the tokens before the first loss token are replaced, and all others kept."""
    first, told = sample.loss_mask.index(True), len(prompt)
    replaced = replace(
        sample,
        token_ids=(*prompt, *sample.token_ids[first:]),
        loss_mask=(*[False] * told, *sample.loss_mask[first:]),
        sampler_logprobs=(*[0.0] * told, *sample.sampler_logprobs[first:]),
    )
    wanted = tuple(at_loss_tokens(sample, sample.token_ids))
    assert tuple(at_loss_tokens(replaced, replaced.token_ids)) == wanted, sample.id
    return replaced
