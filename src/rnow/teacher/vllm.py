"""A teacher behind a vLLM server: one that runs already, or one that rnow starts."""

from __future__ import annotations

import asyncio
import copy
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
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
from rnow.errors import SAME_COMMAND, ConfigError, ModelError, TemporaryError
from rnow.processes.process import StartFailed
from rnow.protocols import Tokenizer
from rnow.serving.client import LOOK_AT_SERVER, BadAnswer, Refused, ServerDown, VllmClient
from rnow.serving.reach import CONNECT_SECONDS
from rnow.serving.server import VllmServer
from rnow.tasks import ask_again
from rnow.teacher.vllm_check import ServedTeacherChecks, TeacherCheck, find_served_model
from rnow.teacher.vllm_server import SERVED_NAME, Asking, TeacherServerSettings, teacher_server
from rnow.types import Sample

T = TypeVar("T")

API_KEY_VARIABLE = "RNOW_TEACHER_API_KEY"

DEFAULT = Asking()

RESTART_INTERVAL = 3600.0
"""Seconds after a restart in which a managed teacher may not fail again: a teacher that dies every few steps would make no
progress worth its starts, and one death a day should not end a run of weeks."""

CHECK_SECONDS = 120.0
"""Seconds for each answer of the checks before training: a few dozen tokens, perhaps behind what others asked."""

_POLL = 0.5


class VllmTeacher:
    """Scores the exact token ids the student sampled, by a server's prompt log-probabilities: one request per sample.

    Use ``served`` or ``managed``. A managed teacher starts with its first use (``start``), ends with ``close`` or with
    this process. When it dies or stops answering it is started again; when that happens a second time within
    ``RESTART_INTERVAL``, TemporaryError ends the run. Only a managed one with ``enable_sleep`` can ``sleep`` and ``wake``.

    With ``top_k`` the evidence is ``TopKEvidence``. More than 20 need a server that was started with ``--max-logprobs``; a
    managed one is.

    A served teacher's distribution cannot be tempered and cannot leave padding ids out.
    """

    def __init__(
        self,
        *,
        client: VllmClient | None = None,
        server: VllmServer | None = None,
        model: str | None,
        where: str,
        asking: Asking,
    ) -> None:
        self._asking = asking
        self._server = server
        self._model = model
        self._where = where
        self._vocabulary: int | None = None
        self._restarts = 0
        self._restarted_at: float | None = None
        self._starting: asyncio.Task[None] | None = None
        self._asleep: bool | None = False  # None: told to change, and it did not answer
        self._client: VllmClient | None = None
        self._answering: VllmClient | None = None
        if client is not None:
            self._use(client)

    @classmethod
    def served(
        cls,
        url: str,
        model: str | None = None,
        *,
        temperature: float = 1.0,
        api_key: str | None = None,
        asking: Asking = DEFAULT,
    ) -> VllmTeacher:
        """A teacher on a server that runs already.

        Args:
            model: the name it is served under; None: the only base model there.
            api_key: None: the value of the environment variable RNOW_TEACHER_API_KEY, if it is set.
            asking: ``check`` lowers ``max_concurrency`` to 1 on a server with LoRA adapters.

        Raises:
            ConfigError: a temperature other than 1.
            InputError: the url is not an http(s) address.
        """
        _refuse_temperature(temperature)
        client = VllmClient(url, api_key or os.environ.get(API_KEY_VARIABLE), asking.timeout)
        return cls(client=client, model=model, where="teacher.url", asking=asking)

    @classmethod
    def managed(
        cls,
        settings: TeacherServerSettings,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server that rnow starts: loopback, random key. ``top_k`` and ``poll`` as in ``Asking``.

        Raises:
            ConfigError: a temperature other than 1, or a quantization vLLM does not have.
            ModelError: vLLM is not installed, or cannot load nf4.
        """
        _refuse_temperature(temperature)
        asking = replace(DEFAULT, top_k=top_k, poll=poll)
        if not torch.cuda.is_available():
            asking = replace(asking, max_concurrency=1, sampling_concurrency=8)
        server = teacher_server(settings, asking)
        return cls(server=server, model=SERVED_NAME, where="teacher.path", asking=asking)

    def hurried(self, timeout: float) -> VllmTeacher:
        """The same teacher, each request given up after ``timeout`` seconds at the latest. A managed one as it is."""
        if self._server is not None or self._client is None:
            return self
        twin = copy.copy(self)
        twin._client = self._client.hurried(timeout)
        return twin

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start a managed teacher unless it runs.

        Raises:
            StartFailed: it did not come up.
        """
        if self._server is None:
            return
        if self._client is None and self._starting is None:
            self._begin(self._server, self._server.start())
        if self._starting is not None:
            # Shielded: a cancelled rollout must not cancel the start that others wait for.
            await asyncio.shield(self._starting)

    def close(self) -> None:
        """End a managed teacher's processes."""
        if self._server is not None:
            self._server.stop()
            self._client = None

    async def sleep(self) -> None:
        """Free the card; the weights stay in main memory. Does nothing when asleep.

        After a failure or a cancellation ``sleep`` and ``wake`` may be called again.
        """
        if self._asleep:
            return
        self._asleep = None
        try:
            await (await self._ready()).sleep()
        except ServerDown:
            self.close()  # half dead, it may keep the card
        self._asleep = True

    async def wake(self) -> None:
        """Take the card again. Does nothing when awake. A server that died meanwhile is started again, once.

        Raises:
            TemporaryError: it does not come up again.
        """
        if self._asleep is False:
            return
        self._asleep = None
        try:
            try:
                await (await self._ready()).wake_up()
            except ServerDown:
                self.close()
                await self.start()
        except StartFailed as error:
            raise TemporaryError(
                f"the teacher's server ended in its sleep and could not be started again: {error.message}",
                details=error.details,
                fix=f"{SAME_COMMAND}: it continues from the last checkpoint",
            ) from error
        self._asleep = False

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

    async def connect(self) -> tuple[VllmClient, str]:
        """The server as it runs now, for completions, and the model's name there."""
        client = await self._ready()
        assert self._answering is not None
        return self._answering, await self._name(client)

    async def surviving(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` gives, asked again when a managed teacher had to be started again. Any number may ask at once.

        Raises:
            ServerDown: it failed again too soon; or a server that rnow did not start is gone.
        """
        return await ask_again(
            ask, lost=ServerDown, starts=lambda: self._restarts, restart=self._recover
        )

    async def _recover(self, restarts: int, gone: ServerDown) -> None:
        """Start again unless that has happened since ``restarts`` was read."""
        if self._server is None:
            raise gone
        if self._starting is None and self._restarts == restarts:
            now = time.monotonic()
            if self._restarted_at is not None and now - self._restarted_at < RESTART_INTERVAL:
                gone.why = (
                    f"{gone.why}; it had been started again {now - self._restarted_at:.0f} s before"
                )
                gone.details = (*gone.details, *self._server.log_tail())
                raise gone
            self._client = None
            self._begin(self._server, self._restart(self._server))
        await self.start()

    async def _restart(self, server: VllmServer) -> None:
        await server.restart()
        self._restarts += 1
        self._restarted_at = time.monotonic()

    def _begin(self, server: VllmServer, coming: Coroutine[object, object, None]) -> None:
        """Let the server come up in a task that everybody who needs it waits for."""

        async def bring_up() -> None:
            try:
                await coming
                self._use(server.client(timeout=self._asking.timeout))
            finally:
                self._starting = None

        self._starting = asyncio.create_task(bring_up())

    async def _score_into(
        self, evidence: dict[str, Evidence], samples: Sequence[Sample], top_k: int
    ) -> None:
        """Add what ``evidence`` lacks, each answer as it comes: what was answered before a failure is not asked again."""
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

    async def _judge(self, client: VllmClient, model: str, sample: Sample, top_k: int) -> Evidence:
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

    async def _ready(self) -> VllmClient:
        await self.start()
        assert self._client is not None
        return self._client

    async def _name(self, client: VllmClient) -> str:
        if self._model is None:
            self._model = (await find_served_model(client, self._model, self._where)).id
        return self._model

    def _use(self, client: VllmClient) -> None:
        self._client = client.limited(self._asking.max_concurrency)
        self._answering = client.limited(self._asking.sampling_concurrency)

    # --- checks before training -----------------------------------------------------------------------------------

    async def check(
        self, tokenizer: Tokenizer, vocabulary: int, *, longest: int | None = None
    ) -> TeacherCheck:
        """Whether this server can judge the student's tokens.

        Args:
            tokenizer: the student's HuggingFace tokenizer.
            vocabulary: how many ids it can produce.
            longest: tokens of the longest sequence that will be scored.

        Raises:
            StartFailed, ModelError: no answer; another model; another tokenizer; log-probabilities that cannot be right, or
                that change when asked again; sequences too long for it.
        """
        self._vocabulary = vocabulary
        try:
            client = await self._ready()
            # A question that needs no computing: who does not answer it now will not do so later.
            first = client.hurried(CONNECT_SECONDS)
            served = await find_served_model(first, self._model, self._where)
            self._model = served.id
            if self._server is None and any(model.parent for model in await first.models()):
                # Concurrent prompt log-probabilities have killed engines with LoRA enabled (CPU build).
                self._client = client.limited(1)
            checks = ServedTeacherChecks(
                client=client.hurried(CHECK_SECONDS),
                served=served,
                where=self._where,
                top_k=self._asking.top_k,
            )
            return await checks.run(tokenizer, vocabulary, longest)
        except ServerDown as error:
            raise ModelError(
                error.message,
                title="Teacher unreachable",
                where=self._where,
                why=error.why,
                fix="start the server, or correct the url",
            ) from error
        except (BadAnswer, Refused) as error:
            error.where = error.where or self._where
            error.fix = error.fix or LOOK_AT_SERVER
            raise


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


def _refuse_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise ConfigError(
            f"a teacher on vLLM cannot judge samples drawn at temperature {temperature:g}",
            where="rollout.temperature",
            why="student and teacher must be tempered alike, and a server's prompt log-probabilities are those of "
            "temperature 1",
            fix="set the temperature to 1, or teacher.backend: transformers",
        )
