"""A streamed teacher on a card: the scores of a resident one, what it holds, and that it leaves and comes back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.gpu.device import CUDA, VOCABULARY, needs_cuda
from tests.teacher.conformance import make_sample

from rnow.algorithm.records import SAMPLED, TeacherNeeds
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.teacher.transformers import TransformersTeacher

pytestmark = [pytest.mark.gpu, needs_cuda]

SHAPE = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 2048}
SAMPLES = [make_sample(str(index), 20 + 17 * index, first=index) for index in range(12)]


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def load(folder: Path, *, streamed: bool, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    return load_causal_lm(
        folder, vocabulary=VOCABULARY, dtype=dtype, device=CUDA, streamed=streamed
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [SAMPLED, TeacherNeeds(top_k=5)], ids=str)
def test_scores_are_those_of_a_resident_teacher(
    tiny_model_dir: Callable[..., Path], dtype: torch.dtype, needs: TeacherNeeds
) -> None:
    folder = tiny_model_dir(**SHAPE)
    whole, streamed = (
        TransformersTeacher(load(folder, streamed=kind, dtype=dtype), micro_batch_tokens=200)
        for kind in (False, True)
    )
    expected = whole.score_now(SAMPLES, needs)
    for _ in range(20):  # a copy that came too early or too late would show in one of them
        found = streamed.score_now(SAMPLES, needs)
        for name, evidence in expected.items():
            assert torch.equal(
                found[name].teacher_logprobs,  # type: ignore[union-attr]
                evidence.teacher_logprobs,  # type: ignore[union-attr]
            )


def test_two_layers_are_on_the_card(tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(**SHAPE)
    before = torch.cuda.memory_allocated()
    lm = load(folder, streamed=True)
    layer = sum(p.numel() for p in lm.model.model.layers[0].parameters()) * 2
    rest = sum(p.numel() for p in lm.model.parameters() if not p.is_meta) * 2
    torch.cuda.reset_peak_memory_stats()
    TransformersTeacher(lm, micro_batch_tokens=200).score_now(SAMPLES)
    assert torch.cuda.memory_allocated() - before <= 2.1 * layer + 1.1 * rest + 2**20
    assert torch.cuda.max_memory_allocated() - before <= 4 * layer + rest


def test_it_leaves_the_card_and_says_the_same_after(tiny_model_dir: Callable[..., Path]) -> None:
    teacher = TransformersTeacher(load(tiny_model_dir(**SHAPE), streamed=True))
    ids = [*range(5, 37)]
    expected = teacher.compute_logprobs(ids)
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        asyncio.run(teacher.sleep())
        assert torch.cuda.memory_allocated() < 0.05 * held
        asyncio.run(teacher.wake())
        assert teacher.compute_logprobs(ids) == expected
