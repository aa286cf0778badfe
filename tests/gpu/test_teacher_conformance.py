"""The teachers on a GPU, held to the conformance tests of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tests.gpu.device import load, needs_cuda, needs_vllm
from tests.teacher import conformance, test_conformance
from tests.teacher.conformance import HEAD_ROWS, VOCABULARY, Candidate

from rnow.teacher.transformers import TransformersTeacher

pytestmark = [pytest.mark.gpu, needs_cuda]


def embedded(tiny_model_dir: Callable[..., Path]) -> Candidate:
    """The transformers teacher on the card."""
    lm = load(tiny_model_dir(seed=1, vocab_size=HEAD_ROWS, num_hidden_layers=1))
    lm.model.lm_head.weight.data[VOCABULARY:] *= 40

    @torch.no_grad()
    def logits(ids: Sequence[int]) -> torch.Tensor:
        given = torch.tensor([list(ids)], device=lm.device)
        return lm.model(input_ids=given).logits[0].float().cpu()

    def make(temperature: float, micro_batch_tokens: int | None) -> TransformersTeacher:
        return TransformersTeacher(
            lm, temperature=temperature, micro_batch_tokens=micro_batch_tokens
        )

    return Candidate(make=make, logits=logits, tolerance=1e-4)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(embedded, id="transformers"),
        pytest.param(conformance.vllm("managed"), id="vllm-managed", marks=needs_vllm),
    ],
)
def candidate(
    request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]
) -> Iterator[Candidate]:
    built = request.param(tiny_model_dir)
    yield built
    built.close()


globals().update(
    {name: test for name, test in vars(test_conformance).items() if name.startswith("test_")}
)
