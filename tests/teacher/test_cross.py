"""A teacher behind a tokenizer of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import character_tokenizer
from tests.rollout.tokenizers import byte_level, known_bytes
from tests.teacher.conformance import VOCABULARY, make_sample

from rnow.algorithm.records import (
    SAMPLED,
    ChunkEvidence,
    Evidence,
    SampledEvidence,
    TeacherNeeds,
    TopKEvidence,
)
from rnow.errors import RnowError
from rnow.models.loading import load_causal_lm
from rnow.rollout.crossing import Crossing
from rnow.rollout.token_bytes import encode_plain
from rnow.teacher.cross import CrossTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Sample

PROMPT = (3, 4, 5)


class CountingTeacher:
    """Gives the n-th loss token of a sample -(n + 1) / 8, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Sample] = []

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        self.shown += samples
        return {
            sample.id: SampledEvidence(
                teacher_logprobs=-torch.arange(1.0, sum(sample.loss_mask) + 1) / 8
            )
            for sample in samples
        }


def cross(
    student: Any, teacher: Any, inner: Any, *, window: int = 100, prompt: tuple[int, ...] = PROMPT
) -> CrossTeacher:
    crossing = Crossing(
        student=known_bytes(student),
        teacher=known_bytes(teacher),
        tokenizer=teacher,
        stop_ids=frozenset([student.eos_token_id]),
        end_id=teacher.eos_token_id,
    )
    prompts = {"words/0": prompt, "words/1": prompt}
    return CrossTeacher(
        inner, crossing=crossing, prompts=prompts, window=window, where="teacher.tokenizer"
    )


def answered(row: int, ids: Sequence[int]) -> Sample:
    return Sample(
        id=f"words/{row}#2",
        dataset="words",
        token_ids=(90, 91, *ids),
        loss_mask=(False, False, *[True] * len(ids)),
        sampler_logprobs=(0.0, 0.0, *[-0.5] * len(ids)),
    )


def score(teacher: CrossTeacher, *samples: Sample) -> list[ChunkEvidence]:
    found = asyncio.run(teacher.score(samples))
    evidence = [found[sample.id] for sample in samples]
    assert all(isinstance(one, ChunkEvidence) for one in evidence)
    return evidence  # type: ignore[return-value]


def test_the_teacher_reads_its_own_prompt_and_its_own_tokens() -> None:
    student, teacher, inner = byte_level(merges=0), byte_level(merges=80), CountingTeacher()
    ids = [*encode_plain(student, "the cat"), student.eos_token_id]
    (found,) = score(cross(student, teacher, inner), answered(0, ids))
    (shown,) = inner.shown
    theirs = [*encode_plain(teacher, "the cat"), teacher.eos_token_id]
    assert shown.token_ids == (*PROMPT, *theirs)
    assert shown.loss_mask == (False,) * 3 + (True,) * 3
    assert found.chunk_starts.tolist() == [True, False, False, True, False, False, False, True]
    assert found.teacher_tokens.tolist() == [1] * 8
    expected = [-1 / 24] * 3 + [-1 / 16] * 4 + [-3 / 8]
    assert found.teacher_logprobs.tolist() == pytest.approx(expected, abs=1e-7)
    assert (found.teacher_logprobs.dtype, found.teacher_tokens.dtype) == (
        torch.float32,
        torch.int64,
    )


def test_several_tokens_of_the_teachers_add_up() -> None:
    student, teacher = byte_level(merges=80), byte_level(merges=0)
    (found,) = score(
        cross(student, teacher, CountingTeacher()), answered(0, encode_plain(student, "the cat"))
    )
    assert found.teacher_logprobs.tolist() == pytest.approx([-6 / 8, -(4 + 5 + 6 + 7) / 8])
    assert found.teacher_tokens.tolist() == [3, 4]
    assert found.chunk_starts.tolist() == [True, True]


def test_what_cannot_be_judged_counts_as_no_difference() -> None:
    student = byte_level(merges=0)
    ids = encode_plain(student, "abcd🙂")[:-1]
    (found,) = score(cross(student, student, CountingTeacher()), answered(0, ids))
    assert found.teacher_tokens.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert found.teacher_logprobs.tolist()[4:] == [-0.5] * 3
    assert found.chunk_starts.tolist() == [True] * 5 + [False] * 2


def test_beyond_the_teachers_window() -> None:
    student, inner = byte_level(merges=0), CountingTeacher()
    ids = [*encode_plain(student, "abcde"), student.eos_token_id]
    teacher = cross(student, student, inner, window=len(PROMPT) + 4)
    (found,) = score(teacher, answered(0, ids))
    assert len(inner.shown[0].token_ids) == len(PROMPT) + 4
    assert found.teacher_tokens.tolist() == [1, 1, 1, 1, 0, 0]


def test_too_little_that_can_be_judged() -> None:
    student = byte_level(merges=0)
    sample = answered(0, encode_plain(student, "ab🙂🙂"))
    with pytest.raises(RnowError) as caught:
        score(cross(student, character_tokenizer(), CountingTeacher()), sample)
    assert caught.value.message == "the teacher can judge 2 of the 10 tokens that the student wrote"
    assert caught.value.where == "teacher.tokenizer"
    # It is a share of all answers: one alone may have nothing.
    inner = CountingTeacher()
    other = answered(1, encode_plain(student, "a long answer"))
    _, found = score(cross(student, character_tokenizer(), inner), other, sample)
    assert found.teacher_tokens.tolist() == [1, 1] + [0] * 8
    nothing = answered(0, encode_plain(student, "🙂")[:2])
    _, found = score(cross(student, byte_level(), CountingTeacher()), other, nothing)
    assert found.teacher_tokens.tolist() == [0, 0]
    assert found.teacher_logprobs.tolist() == [-0.5, -0.5]


def test_only_sampled_tokens_are_judged() -> None:
    student = byte_level(merges=0)
    teacher = cross(student, student, CountingTeacher())
    with pytest.raises(AssertionError):
        asyncio.run(teacher.score([], TeacherNeeds(top_k=3)))


def test_with_equal_tokenizers_its_evidence_is_that_of_the_plain_teacher(
    tiny_model_dir: Callable[..., Path],
) -> None:
    lm = load_causal_lm(
        tiny_model_dir(num_hidden_layers=1),
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    plain, tokenizer = TransformersTeacher(lm), character_tokenizer()
    samples = []
    for row, text in enumerate(("some answer", "another, cut one")):
        ids = tokenizer.encode(text, add_special_tokens=False)
        end = [tokenizer.eos_token_id] * (row == 0)
        made = make_sample(f"words/{row}#0", 4 + len(ids) + len(end))
        samples.append(
            Sample(
                id=made.id,
                dataset=made.dataset,
                token_ids=(*PROMPT, 6, *ids, *end),
                loss_mask=(*[False] * 4, *[True] * (len(ids) + len(end))),
                sampler_logprobs=made.sampler_logprobs,
            )
        )
    expected = asyncio.run(plain.score(samples, SAMPLED))
    found = asyncio.run(
        cross(tokenizer, tokenizer, plain, prompt=(*PROMPT, 6)).score(samples, SAMPLED)
    )
    for sample in samples:
        ours, theirs = found[sample.id], expected[sample.id]
        assert isinstance(ours, ChunkEvidence)
        assert isinstance(theirs, SampledEvidence | TopKEvidence)
        assert torch.equal(ours.teacher_logprobs, theirs.teacher_logprobs)
        assert ours.chunk_starts.all()
        assert set(ours.teacher_tokens.tolist()) == {1}
