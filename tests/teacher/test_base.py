"""The base of the student as its teacher."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.sampling.conformance import load_student, make_policy

from rnow.policy.student import LoraPolicy
from rnow.teacher.base import ReferenceTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Sample

SAMPLE = Sample(
    id="a",
    dataset="dataset_0",
    token_ids=(5, 6, 7, 8, 9),
    loss_mask=(False, False, True, False, True),
    sampler_logprobs=(0.0,) * 5,
)


@pytest.fixture(scope="module")
def student(tiny_model_dir: Callable[..., Path]) -> tuple[TransformersTeacher, LoraPolicy, object]:
    lm = load_student(tiny_model_dir(vocab_size=128))
    trainer = TransformersTeacher(lm)
    before = trainer.score_now([SAMPLE])["a"].teacher_logprobs
    return trainer, make_policy(lm), before


def test_it_scores_as_the_base_did_before_there_was_an_adapter(student: tuple) -> None:
    trainer, policy, before = student
    teacher = ReferenceTeacher(trainer, policy.model.disable_adapter)
    scored = asyncio.run(teacher.score([SAMPLE]))["a"].teacher_logprobs
    assert torch.equal(scored, before)


def test_the_adapter_is_back_and_trainable_afterwards(student: tuple) -> None:
    trainer, policy, before = student
    now = trainer.score_now([SAMPLE])["a"].teacher_logprobs
    assert not torch.allclose(now, before), "the adapter does nothing, so this test shows nothing"
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    asyncio.run(ReferenceTeacher(trainer, policy.model.disable_adapter).score([SAMPLE]))
    assert torch.equal(trainer.score_now([SAMPLE])["a"].teacher_logprobs, now)
    assert [name for name, p in policy.model.named_parameters() if p.requires_grad] == trainable


def test_a_fault_while_scoring_leaves_the_adapter_on(
    student: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, policy, _ = student
    now = trainer.score_now([SAMPLE])["a"].teacher_logprobs

    def broken(samples: object, needs: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_now", broken)
        with pytest.raises(RuntimeError):
            asyncio.run(ReferenceTeacher(trainer, policy.model.disable_adapter).score([SAMPLE]))
    assert torch.equal(trainer.score_now([SAMPLE])["a"].teacher_logprobs, now)
