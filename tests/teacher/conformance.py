"""The teachers under test, each beside the plain model whose log-probabilities it must give.

To hold another teacher to the same tests, add a function to ``CANDIDATES``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rnow.algorithm.records import SAMPLED, Evidence, TeacherNeeds
from rnow.models.loading import load_causal_lm
from rnow.protocols import Teacher
from rnow.teacher.router import RoutedTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.training.residency import Residency
from rnow.types import Sample

VOCABULARY = 100
HEAD_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A teacher and what it is measured against.

    Attributes:
        make: a teacher at this temperature and micro-batch size (padded tokens, None = its own choice).
        logits: ids ``[T]`` -> float32 ``[T, HEAD_ROWS]`` of the plain model.
        tolerance: on log-probabilities, nats.
        served: it stands behind a server, which judges at temperature 1 only (``make`` refuses others) and cannot leave
            padding rows out of its softmax.
        close: ends what ``make`` started.
    """

    make: Callable[[float, int | None], Teacher]
    logits: Callable[[Sequence[int]], Tensor]
    tolerance: float
    served: bool = False
    close: Callable[[], None] = lambda: None

    def table(self, sample: Sample, temperature: float = 1.0) -> Tensor:
        """float64 ``[T, rows]``: row t is a naive full softmax over what follows token t."""
        rows = HEAD_ROWS if self.served else VOCABULARY
        logits = self.logits(sample.token_ids)[:, :rows] / temperature
        return torch.log_softmax(logits.double(), dim=-1)

    def expected(self, sample: Sample, temperature: float = 1.0) -> Tensor:
        """``[loss tokens]``: a naive full softmax."""
        table = self.table(sample, temperature)
        values = torch.zeros(len(sample.token_ids), dtype=torch.float64)
        for position, on in enumerate(sample.loss_mask):
            if on:
                values[position] = table[position - 1, sample.token_ids[position]]
        return values[torch.tensor(sample.loss_mask)].float()


def embedded(tiny_model_dir: Callable[..., Path], *, streamed: bool = False) -> Candidate:
    """The transformers teacher; its padding rows would take most of the mass if they were counted."""
    lm = load_causal_lm(
        tiny_model_dir(seed=1, vocab_size=HEAD_ROWS, num_hidden_layers=3 if streamed else 1),
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
        streamed=streamed,
    )
    lm.model.lm_head.weight.data[VOCABULARY:] *= 40

    @torch.no_grad()
    def logits(ids: Sequence[int]) -> Tensor:
        (found,) = lm.run([lambda: lm.model(input_ids=torch.tensor([list(ids)])).logits[0]])
        return found

    def make(temperature: float, micro_batch_tokens: int | None) -> TransformersTeacher:
        return TransformersTeacher(
            lm, temperature=temperature, micro_batch_tokens=micro_batch_tokens
        )

    return Candidate(make=make, logits=logits, tolerance=1e-5)


def vllm(how: Literal["managed", "served", "openai"]) -> Callable[[Callable[..., Path]], Candidate]:
    """The vLLM teacher on a server of its own, or on one that was started before: as vLLM, or as an OpenAI-compatible one."""

    def build(tiny_model_dir: Callable[..., Path]) -> Candidate:
        from rnow.serving.server import VllmServer
        from rnow.teacher.served import API_KEY_VARIABLE, Asking, ServedTeacher
        from rnow.teacher.vllm import VllmTeacher
        from rnow.teacher.vllm_server import TeacherServerSettings

        folder = tiny_model_dir(seed=1, vocab_size=HEAD_ROWS, num_hidden_layers=1)
        log = folder.parent / f"teacher-{how}.log"
        lm = load_causal_lm(
            folder, vocabulary=HEAD_ROWS, dtype=torch.float32, device=torch.device("cpu")
        )
        patch = pytest.MonkeyPatch()
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

        @torch.no_grad()
        def logits(ids: Sequence[int]) -> Tensor:
            return lm.model(input_ids=torch.tensor([list(ids)])).logits[0]

        if how == "managed":
            settings = TeacherServerSettings(
                local_dir=folder, log=log, dtype="float32", max_model_len=512
            )
            one = VllmTeacher.managed(settings)

            def managed(temperature: float, micro_batch_tokens: int | None) -> VllmTeacher:
                if temperature == 1.0:
                    return one
                return VllmTeacher.managed(settings, temperature=temperature)

            def close() -> None:
                one.close()
                patch.undo()

            return Candidate(
                make=managed,
                logits=logits,
                tolerance=1e-3,
                served=True,
                close=close,
            )

        server = VllmServer(
            folder,
            name="elsewhere",
            log=log,
            arguments=["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"],
        )
        asyncio.run(server.start())
        patch.setenv(API_KEY_VARIABLE, server._key)

        def served(temperature: float, micro_batch_tokens: int | None) -> ServedTeacher:
            asking = Asking(max_concurrency=min(micro_batch_tokens or 1, 4))
            protocol = "openai" if how == "openai" else "auto"
            return ServedTeacher.at(
                server.url, protocol=protocol, temperature=temperature, asking=asking
            )

        def stop() -> None:
            server.stop()
            patch.undo()

        return Candidate(
            make=served,
            logits=logits,
            tolerance=1e-3,
            served=True,
            close=stop,
        )

    return build


class InTwo:
    """A router in front of two teachers that are the same: half of the prompts are judged by either."""

    def __init__(self, make: Callable[[], Teacher]) -> None:
        self._router = RoutedTeacher({"teacher/a": make(), "teacher/b": make()}, Residency().only)

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        halves = [
            replace(sample, teacher=f"teacher/{'ab'[len(sample.token_ids) // 10 % 2]}")
            for sample in samples
        ]
        return await self._router.score(halves, needs)


def routed(tiny_model_dir: Callable[..., Path]) -> Candidate:
    """Several teachers behind one."""
    one = embedded(tiny_model_dir)
    return replace(
        one, make=lambda temperature, tokens: InTwo(lambda: one.make(temperature, tokens))
    )


CANDIDATES = [
    pytest.param(embedded, id="transformers"),
    pytest.param(partial(embedded, streamed=True), id="streamed"),
    pytest.param(routed, id="routed"),
    pytest.param(vllm("managed"), id="vllm-managed", marks=pytest.mark.vllm),
    pytest.param(vllm("served"), id="vllm-served", marks=pytest.mark.vllm),
    pytest.param(vllm("openai"), id="vllm-openai", marks=pytest.mark.vllm),
]


def pids(teacher: Any) -> set[int]:
    """Ids of a managed teacher's processes."""
    return teacher._server._process.pids()


def make_sample(
    name: str, length: int, loss: Sequence[int] | None = None, first: int = 5
) -> Sample:
    """A sequence whose positions ``loss`` (default: the second half) were sampled."""
    on = set(range(length // 2, length)) if loss is None else set(loss)
    return Sample(
        id=name,
        dataset="dataset_0",
        token_ids=tuple((first + 13 * position) % VOCABULARY for position in range(length)),
        loss_mask=tuple(position in on for position in range(length)),
        sampler_logprobs=(0.0,) * length,
    )
