"""Controls: what a run learns when its teacher says nothing of use. A curve that a control reaches too is not the teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from rnow.algorithm.batching import at_loss_tokens, evidence_tensors
from rnow.algorithm.records import SAMPLED, Evidence, SampledEvidence, TeacherNeeds
from rnow.protocols import Teacher
from rnow.types import Sample

ControlName = Literal["shuffled", "none"]

UNLIKELY = math.log(0.1)
"""Log-probability below which ``none`` calls a sampled token unlikely."""
PENALTY = 1.0
"""Nats by which ``none`` finds it less likely than the student does."""


class ShuffledTeacher:
    """The control ``shuffled``: a real teacher whose word is about somebody else's answer.

    Each sample gets the evidence of another one of the batch, loss token by loss token; a shorter one is gone through again. A
    sample that is alone, all others of its step having failed, keeps its own.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``."""
        evidence = await self._teacher.score(samples, needs)
        prompts = [_prompt(sample) for sample in samples]
        found: dict[str, Evidence] = {}
        for index, sample in enumerate(samples):
            other = _other(index, prompts)
            said = evidence[samples[other].id]
            rows = torch.arange(sum(sample.loss_mask)) % sum(samples[other].loss_mask)
            moved = {name: values[rows] for name, values in evidence_tensors(said).items()}
            found[sample.id] = replace(said, **moved)
        return found


class NoTeacher:
    """The control ``none``: no model is asked. A token that the student drew with a probability below 0.1 gets a KL of 1 nat,
    which makes a constant negative advantage, and any other one of 0."""

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``; ``needs`` is the least a teacher can say.

        Relative to the sampler's own log-probability: the KL is the student's minus this one, so it is the constant up to how
        far the student has moved since it sampled.
        """
        assert needs == SAMPLED, "refused with the config"
        return {
            sample.id: SampledEvidence(teacher_logprobs=_penalise(sample)) for sample in samples
        }


def controlled(teacher: Teacher | None, control: ControlName | None) -> Teacher | None:
    """What judges the training samples of a run: its teacher, or the control in its place."""
    if teacher is None or control is None:
        return teacher
    return ShuffledTeacher(teacher) if control == "shuffled" else NoTeacher()


def _prompt(sample: Sample) -> tuple[int, ...]:
    return sample.token_ids[: sample.loss_mask.index(True)]


def _other(index: int, prompts: Sequence[tuple[int, ...]]) -> int:
    """Half a batch further, or the next from there with another prompt: answers to the same one are much alike. Any other sample
    where all prompts are the same."""
    count = len(prompts)
    order = [(index + count // 2 + step) % count for step in range(count)]
    strangers = (other for other in order if prompts[other] != prompts[index])
    return next(strangers, next((other for other in order if other != index), index))


def _penalise(sample: Sample) -> Tensor:
    drawn = torch.tensor([*at_loss_tokens(sample, sample.sampler_logprobs)], dtype=torch.float32)
    return torch.where(drawn < UNLIKELY, drawn - PENALTY, drawn)
