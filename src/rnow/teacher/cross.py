"""A teacher that reads with a tokenizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rnow.algorithm.batching import at_loss_tokens
from rnow.algorithm.records import (
    SAMPLED,
    ChunkEvidence,
    Evidence,
    TeacherNeeds,
    sampled_logprobs,
)
from rnow.errors import RnowError
from rnow.protocols import Teacher
from rnow.rollout.crossing import NO_CHUNK, Aligned, Crossing, measure_coverage
from rnow.teacher.served import ServedTeacher
from rnow.types import Sample, prompt_id_of


class CrossTeacher:
    """Scores an answer as the teacher itself would have read it: after the teacher's own rendering of the prompt, cut into the
    teacher's tokens. What it says of each token is ``ChunkEvidence``.

    The probability of a chunk is that of the one tokenization which the teacher's tokenizer makes. The teacher may write the
    same text in other tokens too, so the probability is too low, and the KL too high, by what those have.

    Args:
        teacher: scores the teacher's tokens.
        crossing: from the student's tokens to the teacher's.
        prompts: prompt id -> its ids as the teacher renders it.
        window: tokens that the teacher reads at most; what is beyond is in no chunk.
        where: the setting to name in errors.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        crossing: Crossing,
        prompts: Mapping[str, tuple[int, ...]],
        window: int,
        where: str,
    ) -> None:
        self._teacher = teacher
        self._crossing = crossing
        self._prompts = prompts
        self._window = window
        self._where = where

    def hurried(self, timeout: float) -> CrossTeacher:
        """The same teacher, each request to a server given up after ``timeout`` seconds at the latest."""
        if not isinstance(self._teacher, ServedTeacher):
            return self
        twin = copy.copy(self)
        twin._teacher = self._teacher.hurried(timeout)
        return twin

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """See ``Teacher.score``: only the sampled tokens can be judged.

        Raises:
            RnowError: the teacher can judge less than half of the tokens.
        """
        assert needs == SAMPLED, "other estimators are refused with the config"
        answers = {sample.id: self._read(sample) for sample in samples}
        self._check_coverage(answers.values())
        shown = [
            self._shown(sample, answer)
            for sample in samples
            if (answer := answers[sample.id]).token_ids
        ]
        found = await self._teacher.score(shown, SAMPLED)
        nothing = torch.zeros(0)
        return {
            sample.id: _evidence(
                sample,
                answers[sample.id],
                sampled_logprobs(found[sample.id]) if sample.id in found else nothing,
            )
            for sample in samples
        }

    def _read(self, sample: Sample) -> Aligned:
        """The answer in the teacher's tokens, as many as its window holds."""
        written = sum(sample.loss_mask)
        assert all(sample.loss_mask[-written:]), "several turns are refused with the config"
        answer = self._crossing.align(sample.token_ids[-written:] if written else ())
        return answer.cut(self._window - len(self._prompts[prompt_id_of(sample.id)]))

    def _shown(self, sample: Sample, answer: Aligned) -> Sample:
        """The sample as the teacher reads it."""
        prompt, count = self._prompts[prompt_id_of(sample.id)], len(answer.token_ids)
        return Sample(
            id=sample.id,
            dataset=sample.dataset,
            token_ids=(*prompt, *answer.token_ids),
            loss_mask=(*[False] * len(prompt), *[True] * count),
            sampler_logprobs=(0.0,) * (len(prompt) + count),
        )

    def _check_coverage(self, answers: Iterable[Aligned]) -> None:
        found = measure_coverage(answers)
        if not found.suffices:
            raise RnowError(
                f"the teacher can judge {found.covered} of the {found.tokens} tokens that the student wrote",
                title="Too little of the answers can be judged",
                where=self._where,
                why="what its tokenizer has no tokens for, the rest of a letter at the end of an answer that was cut, and "
                "what is beyond its window cannot be judged",
                fix="use a teacher whose tokenizer writes any text, or the student's own",
            )


def _evidence(sample: Sample, answer: Aligned, logprobs: Tensor) -> ChunkEvidence:
    """``logprobs``: float32 ``[M]``, the teacher's of each of its tokens."""
    # Number 0 is no chunk.
    ours, theirs = (torch.tensor(numbers).long() + 1 for numbers in (answer.ours, answer.theirs))
    count = max([NO_CHUNK, *answer.ours]) + 2
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, theirs, logprobs.double())
    sizes, tokens = (torch.bincount(numbers, minlength=count) for numbers in (ours, theirs))
    tokens[0] = 0
    own = torch.tensor([*at_loss_tokens(sample, sample.sampler_logprobs)])
    shares = (sums / sizes.clamp_min(1)).float()[ours]
    return ChunkEvidence(
        teacher_logprobs=torch.where(ours == 0, own, shares),
        chunk_starts=torch.cat([torch.ones(min(1, len(ours))).bool(), ours.diff() != 0]),
        teacher_tokens=tokens[ours],
    )
