"""The samplers and teachers on a GPU, held to the conformance tests of all others. Float32, so that numbers can be
compared, but for vLLM's adapters, whose kernels take 16 bits only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tests.gpu.device import load, needs_cuda, needs_vllm
from tests.sampling import conformance, test_conformance
from tests.sampling.conformance import Candidate

from rnow.protocols import Sampler
from rnow.sampling.transformers import TransformersSampler
from rnow.sampling.vllm_engine import EngineBackend
from rnow.sampling.weights import SamplingMode

pytestmark = [pytest.mark.gpu, needs_cuda]


def embedded(mode: SamplingMode) -> Callable[[Callable[..., Path]], Candidate]:
    """The transformers sampler, decoding in a thread of its own as it does on a GPU."""

    def build(tiny_model_dir: Callable[..., Path]) -> Candidate:
        lm = load(tiny_model_dir(vocab_size=conformance.HEAD_ROWS))
        lm.model.lm_head.weight.data[conformance.VOCABULARY :] *= 40
        unused = [TransformersSampler(lm, mode=mode) for _ in range(conformance.SAMPLERS)]
        policy = conformance.make_policy(lm)

        def make() -> TransformersSampler:
            sampler = unused.pop()
            sampler.load_policy(policy.adapter(), version=conformance.VERSION)
            return sampler

        @torch.no_grad()
        def logits(ids: Sequence[int]) -> torch.Tensor:
            given = torch.tensor([list(ids)], device=lm.device)
            return policy.model(input_ids=given).logits[0].float().cpu()

        return Candidate(make=make, logits=logits, tolerance=1e-4)

    return build


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(embedded("merged"), id="transformers-merged"),
        pytest.param(embedded("shared"), id="transformers-shared"),
        pytest.param(
            conformance.vllm(EngineBackend, 1, dtype="bfloat16"), id="vllm-engine", marks=needs_vllm
        ),
        pytest.param(
            conformance.vllm(conformance.OnServer, 1, dtype="bfloat16"),
            id="vllm-server",
            marks=needs_vllm,
        ),
        pytest.param(conformance.vllm_teacher, id="vllm-teacher", marks=needs_vllm),
    ],
)
def candidate(
    request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]
) -> Iterator[Candidate]:
    built = request.param(tiny_model_dir)
    yield built
    built.close()


@pytest.fixture(scope="module")
def sampler(candidate: Candidate) -> Sampler:
    return candidate.make()


globals().update(
    {name: test for name, test in vars(test_conformance).items() if name.startswith("test_")}
)
