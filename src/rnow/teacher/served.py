"""A teacher behind a server that runs already, in any protocol that gives log-probabilities of a prompt's token ids."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rnow.algorithm.batching import at_loss_tokens
from rnow.algorithm.records import (
    SAMPLED,
    Evidence,
    SampledEvidence,
    TeacherNeeds,
    TopKEvidence,
)
from rnow.errors import ConfigError, ModelError, TemporaryError
from rnow.protocols import Tokenizer
from rnow.serving.client import VllmClient
from rnow.serving.find import ServerProtocol, find_client, scoring_clients
from rnow.serving.http import LOOK_AT_SERVER, BadAnswer, Refused, ServerDown
from rnow.serving.reach import CONNECT_SECONDS
from rnow.serving.scoring import ScoringClient, ServedModel
from rnow.teacher.check import ServedTeacherChecks, TeacherCheck, list_models, pick_model
from rnow.types import Sample

T = TypeVar("T")

API_KEY_VARIABLE = "RNOW_TEACHER_API_KEY"

CHECK_SECONDS = 120.0
"""Seconds for each answer of the checks before training: a few dozen tokens, perhaps behind what others asked."""

_POLL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a teacher's server is asked. The defaults suit a teacher on a GPU.

    Attributes:
        timeout: seconds per request, retries included.
        max_concurrency: samples scored at once.
        sampling_concurrency: completions in flight when the teacher answers prompts itself.
        top_k: how many of the likeliest tokens the evidence lists besides the sampled one.
        poll: called while the server starts and scores; may raise to stop.
    """

    timeout: float = 600.0
    max_concurrency: int = 4
    sampling_concurrency: int = 64
    top_k: int = 0
    poll: Callable[[], None] = lambda: None


DEFAULT = Asking()


class ServedTeacher:
    """Scores the exact token ids the student sampled, by a server's prompt log-probabilities: one request per sample.

    ``ServedTeacher.at`` names the server. With ``top_k`` the evidence is ``TopKEvidence``; a vLLM server gives more than 20
    only where it was started with ``--max-logprobs``.

    A served teacher's distribution cannot be tempered and cannot leave padding ids out.

    Args:
        clients: the ways in which the server may be asked, the best first; the first that it answers is used.
        model: the name it is served under; None: the only base model there.
        where: the setting that names the server.
    """

    def __init__(
        self,
        clients: Sequence[ScoringClient],
        *,
        model: str | None,
        where: str,
        asking: Asking,
    ) -> None:
        self._clients = clients
        self._model = model
        self._where = where
        self._asking = asking
        self._vocabulary: int | None = None
        self._client: ScoringClient | None = None
        self._answering: ScoringClient | None = None
        if len(clients) == 1:
            self._use(clients[0])

    @classmethod
    def at(
        cls,
        url: str,
        model: str | None = None,
        *,
        protocol: ServerProtocol = "auto",
        temperature: float = 1.0,
        api_key: str | None = None,
        asking: Asking = DEFAULT,
    ) -> ServedTeacher:
        """A teacher on the server at ``url``.

        Args:
            model: the name it is served under; None: the only base model there.
            protocol: how it is asked; ``auto``: in the first way that it answers.
            api_key: None: the value of the environment variable RNOW_TEACHER_API_KEY, if it is set.
            asking: ``check`` lowers ``max_concurrency`` to 1 on a server with LoRA adapters.

        Raises:
            ConfigError: a temperature other than 1.
            InputError: the url is not an http(s) address.
        """
        refuse_temperature(temperature)
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        clients = scoring_clients(protocol, url, key, asking.timeout)
        return ServedTeacher(clients, model=model, where="teacher.url", asking=asking)

    def hurried(self, timeout: float) -> ServedTeacher:
        """The same teacher, once it is checked, each request given up after ``timeout`` seconds at the latest."""
        twin = copy.copy(self)
        if self._client is not None:
            twin._client = self._client.hurried(timeout)
        return twin

    # --- the server -----------------------------------------------------------------------------------------------

    async def surviving(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` gives.

        Raises:
            ServerDown: the server is gone.
        """
        return await ask()

    @property
    def answers(self) -> bool:
        """Whether the server can be asked for completions: it is vLLM's, as far as is known."""
        clients = [self._client] if self._client is not None else self._clients
        return any(isinstance(client, VllmClient) for client in clients)

    async def connect(self) -> tuple[VllmClient, str]:
        """The server for completions, and the model's name there. Only where it ``answers``."""
        client = await self._ready()
        assert isinstance(self._answering, VllmClient), "see answers"
        return self._answering, await self._name(client)

    async def _ready(self) -> ScoringClient:
        """The client that scores, once it is known how the server is asked."""
        return self._client or await self._settle(await self._served(await self._listing()))

    async def _settle(self, served: ServedModel) -> ScoringClient:
        client = await find_client(self._clients, served, within=CHECK_SECONDS)
        # Others may have asked meanwhile; all wait for their turn at one client.
        return self._client or self._use(client)

    def _use(self, client: ScoringClient) -> ScoringClient:
        self._answering = client.limited(self._asking.sampling_concurrency)
        self._client = client.limited(self._asking.max_concurrency)
        return self._client

    async def _listing(self) -> ScoringClient:
        """A client for what is asked in every protocol alike."""
        return self._clients[0]

    async def _name(self, client: ScoringClient) -> str:
        if self._model is None:
            self._model = (await self._served(client)).id
        return self._model

    async def _served(self, client: ScoringClient) -> ServedModel:
        models = await list_models(client)
        return pick_model(models, self._model, url=client.url, where=self._where)

    # --- scoring --------------------------------------------------------------------------------------------------

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """Log-probabilities of the loss tokens of each sample, keyed by sample id.

        Raises:
            TemporaryError: no answer, or a wrong one, after retries and the restart that a managed teacher has.
        """
        evidence = {
            sample.id: _evidence([], [], needs.top_k)
            for sample in samples
            if not any(sample.loss_mask)
        }
        try:
            await self.surviving(lambda: self._score_into(evidence, samples, needs.top_k))
        except ServerDown as error:
            error.where = error.where or self._where
            raise
        except (BadAnswer, Refused) as error:
            raise TemporaryError(
                error.message,
                where=self._where,
                why=error.why,
                fix=error.fix,
                details=error.details,
                title=error.title,
            ) from error
        return {sample.id: evidence[sample.id] for sample in samples}

    async def _score_into(
        self, evidence: dict[str, Evidence], samples: Sequence[Sample], top_k: int
    ) -> None:
        """Add what ``evidence`` lacks, each answer as it comes: what was answered before a failure is not asked again."""
        if all(sample.id in evidence for sample in samples):
            return
        client = await self._ready()
        model = await self._name(client)

        async def one(sample: Sample) -> None:
            evidence[sample.id] = await self._judge(client, model, sample, top_k)

        missing = [sample for sample in samples if sample.id not in evidence]
        tasks = [asyncio.create_task(one(sample)) for sample in missing]
        waiting = set(tasks)
        try:
            while waiting:
                self._asking.poll()
                done, waiting = await asyncio.wait(
                    waiting, timeout=_POLL, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
        finally:
            for task in waiting:
                task.cancel()
            # Of all tasks, those that failed beside the first too: asyncio shows a traceback of what nobody looked at.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _judge(
        self, client: ScoringClient, model: str, sample: Sample, top_k: int
    ) -> Evidence:
        # What follows the last loss token changes nothing.
        last = max(position for position, on in enumerate(sample.loss_mask) if on)
        ids = sample.token_ids[: last + 1]
        entries = await client.prompt_top_logprobs(ids, model=model, top_k=top_k)
        judged = [*at_loss_tokens(sample, entries)]
        evidence = _evidence([*at_loss_tokens(sample, sample.token_ids)], judged, top_k)
        if isinstance(evidence, TopKEvidence) and self._vocabulary is not None:
            highest = int(evidence.ids.max())
            if highest >= self._vocabulary:
                raise BadAnswer(
                    f"the teacher counts id {highest} among its {top_k} likeliest, which no tokenizer produces",
                    why="a server cannot leave the padding rows of a model's head out",
                    fix="use teacher.backend: transformers",
                )
        return evidence

    # --- checks before training -----------------------------------------------------------------------------------

    async def check(
        self,
        tokenizer: Tokenizer,
        vocabulary: int,
        *,
        longest: int | None = None,
        rows: int | None = None,
    ) -> TeacherCheck:
        """Whether this server can judge the student's tokens.

        Args:
            tokenizer: the student's HuggingFace tokenizer.
            vocabulary: how many ids it can produce.
            longest: tokens of the longest sequence that will be scored.
            rows: how many ids the teacher's head has, where that is known.

        Raises:
            StartFailed, ModelError: no answer; another model; another tokenizer; log-probabilities that cannot be right, or
                that change when asked again; sequences too long for it.
        """
        self._vocabulary = vocabulary
        try:
            checks = await self._checks(rows)
            return await checks.run(tokenizer, vocabulary, longest)
        except ServerDown as error:
            raise ModelError(
                error.message,
                title="Teacher unreachable",
                where=self._where,
                why=error.why,
                fix="start the server, or correct the url",
            ) from error
        except ModelError as error:
            error.where = error.where or self._where
            error.fix = error.fix or LOOK_AT_SERVER
            raise

    async def _checks(self, rows: int | None) -> ServedTeacherChecks:
        """The questions to the server as it is found: who has no answer to the first within seconds will have none later."""
        first = (await self._listing()).hurried(CONNECT_SECONDS)
        models = await list_models(first)
        served = pick_model(models, self._model, url=first.url, where=self._where)
        self._model = served.id
        client = self._client or await self._settle(served)
        if any(model.parent for model in models):
            # Concurrent prompt log-probabilities have killed engines with LoRA enabled (CPU build).
            client = self._client = client.limited(1)
        return ServedTeacherChecks(
            client=client.hurried(CHECK_SECONDS),
            served=served,
            where=self._where,
            top_k=self._asking.top_k,
            rows=rows,
        )


def _evidence(
    sampled: Sequence[int], judged: Sequence[Mapping[int, float] | None], top_k: int
) -> Evidence:
    """``judged``: for each loss token the log-probabilities of the sampled id and, with ``top_k``, of the likeliest."""
    entries = [entry or {} for entry in judged]
    values = torch.tensor(
        [entry[token] for token, entry in zip(sampled, entries, strict=True)], dtype=torch.float32
    )
    if not top_k:
        return SampledEvidence(teacher_logprobs=values)
    best = [
        sorted(entry.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k] for entry in entries
    ]
    ids = torch.tensor([[token for token, _ in row] for row in best], dtype=torch.long)
    logprobs = torch.tensor([[value for _, value in row] for row in best], dtype=torch.float32)
    return TopKEvidence(
        teacher_logprobs=values,
        ids=ids.reshape(len(best), top_k),
        logprobs=logprobs.reshape(len(best), top_k),
    )


def refuse_temperature(temperature: float) -> None:
    """
    Raises:
        ConfigError: a temperature other than 1.
    """
    if temperature != 1.0:
        raise ConfigError(
            f"a served teacher cannot judge samples drawn at temperature {temperature:g}",
            where="rollout.temperature",
            why="student and teacher must be tempered alike, and a server's prompt log-probabilities are those of "
            "temperature 1",
            fix="set the temperature to 1, or teacher.backend: transformers",
        )
