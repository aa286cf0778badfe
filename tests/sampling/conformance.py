"""The samplers under test, each beside the plain model whose distribution it must draw from.

To hold another sampler to the same tests, add a function to ``CANDIDATES`` (with ``pytest.param(..., marks=...)`` where it
needs a device or a package).
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.protocols import Sampler
from rnow.sampling.transformers import TransformersSampler
from rnow.sampling.vllm_engine import EngineBackend, environment
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_server import ServerBackend
from rnow.sampling.vllm_settings import VllmSettings
from rnow.sampling.weights import SamplingMode
from rnow.serving.server import VllmServer
from rnow.setup.vllm import probe_reference
from rnow.types import Completion, SamplingParams

VOCABULARY = 100
HEAD_ROWS = 128
STOP_IDS = tuple(range(0, 100, 7))
VERSION = 3
SAMPLERS = 2

Request = tuple[Sequence[int], SamplingParams, int]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sampler and what it is measured against.

    Attributes:
        make: another sampler of the same policy, with ``version`` loaded; at most ``SAMPLERS`` times.
        logits: ids ``[T]`` -> float32 logits ``[T, HEAD_ROWS]`` of the policy's model, padded rows included.
        tolerance: on log-probabilities, nats.
        exact: the same requests give bit-identical log-probabilities in any order of arrival.
        max_temperature: the highest it takes.
        version: what its completions are stamped with.
        close: called when the tests are done.
    """

    make: Callable[[], Sampler]
    logits: Callable[[Sequence[int]], Tensor]
    tolerance: float
    exact: bool = True
    max_temperature: float = 5.0
    version: int = VERSION
    close: Callable[[], None] = lambda: None

    def logprobs(self, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
        """``[T, VOCABULARY]``: row t is the distribution of the token after ids[t]."""
        return torch.log_softmax(self.logits(ids)[:, :VOCABULARY] / temperature, dim=-1)


def load_student(folder: Path) -> CausalLM:
    """A float32 student whose padding rows, were they not cut off, would take nearly all of the mass."""
    lm = load_causal_lm(
        folder, vocabulary=VOCABULARY, dtype=torch.float32, device=torch.device("cpu")
    )
    lm.model.lm_head.weight.data[VOCABULARY:] *= 40
    return lm


def make_policy(lm: CausalLM, **changes: Any) -> LoraPolicy:
    """A policy whose adapter does something: B is drawn, not 0."""
    optimizer = changes.pop("optimizer", OptimizerSettings(learning_rate=1e-2))
    objective = changes.pop("objective", PolicyGradient())
    policy = LoraPolicy(
        lm,
        rank=4,
        alpha=8,
        seed=1,
        base_name="tiny",
        objective=objective,
        optimizer=optimizer,
        **changes,
    )
    generator = torch.Generator().manual_seed(2)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in policy.adapter().tensors.items()
    }
    policy.load_adapter(tensors)
    return policy


def embedded(mode: SamplingMode) -> Callable[[Callable[..., Path]], Candidate]:
    """The transformers sampler in one of its two modes."""

    def build(tiny_model_dir: Callable[..., Path]) -> Candidate:
        lm = load_student(tiny_model_dir(vocab_size=HEAD_ROWS))
        # A merged copy can only be taken before PEFT wraps the base, so a few are made ahead.
        unused = [TransformersSampler(lm, mode=mode) for _ in range(SAMPLERS)]
        policy = make_policy(lm)

        def make() -> TransformersSampler:
            sampler = unused.pop()
            sampler.load_policy(policy.adapter(), version=VERSION)
            return sampler

        @torch.no_grad()
        def logits(ids: Sequence[int]) -> Tensor:
            return policy.model(input_ids=torch.tensor([list(ids)])).logits[0].float()

        return Candidate(make=make, logits=logits, tolerance=1e-5)

    return build


class OnServer(ServerBackend):
    """A vLLM server that was started for this."""

    def __init__(self, settings: VllmSettings) -> None:
        arguments = [
            *("--dtype", settings.dtype),
            *("--gpu-memory-utilization", str(settings.gpu_memory_utilization)),
            *("--max-num-seqs", str(settings.max_num_seqs)),
            *("--logprobs-mode", "processed_logprobs"),
            *("--enable-lora", "--max-lora-rank", str(settings.allowed_rank), "--enforce-eager"),
        ]
        if settings.max_model_len is not None:
            arguments += ["--max-model-len", str(settings.max_model_len)]
        if not torch.cuda.is_available():
            # A seeded request whose prompt is prefilled in two parts kills vLLM's CPU engine.
            arguments += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"]
        self.server = VllmServer(
            settings.local_dir.resolve(),
            name="student",
            log=settings.log,
            arguments=arguments,
            env=environment() | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        )
        asyncio.run(self.server.start())
        super().__init__(settings, url=self.server.url, api_key=self.server._key)

    def stop(self) -> None:
        super().stop()
        self.server.stop()


def vllm(
    kind: type[EngineBackend] | type[OnServer], samplers: int, *, dtype: str = "float32"
) -> Callable[[Callable[..., Path]], Candidate]:
    """vLLM with the policy's adapter hot-loaded over a base on disk. It starts in half a minute, so ``make`` gives one of
    at most ``samplers`` that really differ."""

    def build(tiny_model_dir: Callable[..., Path]) -> Candidate:
        source = tiny_model_dir(vocab_size=HEAD_ROWS)
        lm = load_student(source)
        folder = source.with_name(f"{source.name}-padded")
        if not folder.exists():
            shutil.copytree(source, folder)
            lm.model.save_pretrained(folder)
        policy = make_policy(lm)
        started: list[VllmSampler] = []
        made = itertools.count()

        def make() -> VllmSampler:
            number = next(made)
            if number < samplers:
                work = folder.with_name(f"{folder.name}-{kind.__name__}-{number}")
                settings = VllmSettings(
                    local_dir=folder,
                    vocabulary=VOCABULARY,
                    work_dir=work,
                    log=work.with_suffix(".log"),
                    dtype=dtype,
                    engine={"enforce_eager": True},
                    max_num_seqs=64,
                    max_lora_rank=policy.adapter().config["r"],
                    probe=prompt(16),
                )
                sampler = VllmSampler(kind(settings))
                sampler.watch(probe_reference(lm))
                started.append(sampler)
                sampler.load_policy(policy.adapter(), version=VERSION)
            return started[number % samplers]

        @torch.no_grad()
        def logits(ids: Sequence[int]) -> Tensor:
            return policy.model(input_ids=torch.tensor([list(ids)])).logits[0].float()

        def close() -> None:
            for sampler in started:
                sampler.close()

        return Candidate(
            make=make,
            logits=logits,
            tolerance=1e-3 if dtype == "float32" else 0.15,
            exact=False,
            max_temperature=2.0,
            close=close,
        )

    return build


def vllm_teacher(tiny_model_dir: Callable[..., Path]) -> Candidate:
    """A teacher's server that answers itself: the plain model, no adapter, padding left out by a bias."""
    from rnow.teacher.vllm import VllmTeacher
    from rnow.teacher.vllm_sampler import VllmTeacherSampler
    from rnow.teacher.vllm_server import TeacherServerSettings

    source = tiny_model_dir(vocab_size=HEAD_ROWS)
    lm = load_student(source)
    folder = source.with_name(f"{source.name}-teacher")
    if not folder.exists():
        shutil.copytree(source, folder)
        lm.model.save_pretrained(folder)
    settings = TeacherServerSettings(
        local_dir=folder,
        log=folder.with_suffix(".log"),
        dtype="float32",
        max_model_len=512,
        samples=True,
    )
    teacher = VllmTeacher.managed(settings)
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def make() -> Sampler:
        return VllmTeacherSampler(
            teacher, vocabulary=VOCABULARY, padding=range(VOCABULARY, HEAD_ROWS)
        )

    def close() -> None:
        teacher.close()
        patch.undo()

    @torch.no_grad()
    def logits(ids: Sequence[int]) -> Tensor:
        return lm.model(input_ids=torch.tensor([list(ids)])).logits[0].float()

    return Candidate(
        make=make,
        logits=logits,
        tolerance=1e-3,
        exact=False,
        max_temperature=2.0,
        version=0,
        close=close,
    )


CANDIDATES = [
    pytest.param(embedded("merged"), id="transformers-merged"),
    pytest.param(embedded("shared"), id="transformers-shared"),
    pytest.param(vllm(EngineBackend, 2), id="vllm-engine", marks=pytest.mark.vllm),
    pytest.param(vllm(OnServer, 1), id="vllm-server", marks=pytest.mark.vllm),
    pytest.param(vllm_teacher, id="vllm-teacher", marks=pytest.mark.vllm),
]


def params(max_tokens: int = 12, **changes: Any) -> SamplingParams:
    """Sampling parameters with many stop ids, so that rows end at different times."""
    return SamplingParams(**{"max_tokens": max_tokens, "stop_token_ids": STOP_IDS} | changes)


def prompt(length: int, first: int = 5) -> tuple[int, ...]:
    """Some prompt of that many tokens."""
    return tuple((first + 11 * position) % VOCABULARY for position in range(length))


def complete_all(sampler: Sampler, requests: Sequence[Request]) -> list[Completion]:
    """All requests as concurrent rollouts, answers in the order of the requests."""

    async def one(request: Request) -> Completion:
        with sampler.live_rollout():
            return await sampler.complete(*request)

    async def everything() -> list[Completion]:
        return await asyncio.gather(*map(one, requests))

    return asyncio.run(everything())
