"""A teacher behind a vLLM server: one that is there already, or one of our own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rnow.algorithm.records import Evidence, SampledEvidence, TopKEvidence
from rnow.errors import ConfigError, ModelError, TemporaryError
from rnow.serving.client import (
    MAX_LOGPROBS,
    BadAnswer,
    Refused,
    ServerDown,
    VllmClient,
)
from rnow.serving.nf4 import ARGUMENT as BITSANDBYTES
from rnow.serving.nf4 import require_nf4
from rnow.serving.server import START_TIMEOUT, VllmServer, require_vllm
from rnow.teacher.vllm_check import ServedTeacherChecks, TeacherCheck, find_served_model
from rnow.types import Sample

if TYPE_CHECKING:
    from rnow.teacher.vllm_sampler import VllmTeacherSampler

T = TypeVar("T")

API_KEY_VARIABLE = "RNOW_TEACHER_API_KEY"

MAX_NUM_BATCHED_TOKENS = 1024
"""Prompt tokens per forward pass of a managed teacher. vLLM materialises the logits of a whole chunk of the prompt: at
8,192 tokens and 151,936 ids that is 5 GB in float32, several times over; at 1,024 it is 0.6 GB."""

SERVED_NAME = "teacher"
TIMEOUT = 600.0
CONCURRENCY = 4
"""Samples scored at once by a teacher on a GPU."""

SAMPLING_CONCURRENCY = 64
"""Completions in flight when a teacher on a GPU answers prompts itself."""

RESTART_INTERVAL = 3600.0
"""Seconds after a restart in which a managed teacher may not fail again: a teacher that dies every few steps would make no
progress worth its starts, and one death a day should not end a run of weeks."""

_POLL = 0.5


class VllmTeacher:
    """Scores the exact token ids the student sampled, by a server's prompt log-probabilities: one request per sample.

    Use ``served`` or ``managed``. A managed teacher starts with its first use (``start``), ends with ``close`` or with
    this process. When it dies or stops answering it is started again; when that happens a second time within
    ``RESTART_INTERVAL``, TemporaryError ends the run.

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
        timeout: float = TIMEOUT,
        max_concurrency: int = 1,
        sampling_concurrency: int = 1,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        if (client is None) == (server is None):
            raise ValueError("a teacher has a client or a server of its own")
        self._client = client
        self._server = server
        self._model = model
        self._where = where
        self._timeout = timeout
        self._max_concurrency = max_concurrency
        self._sampling_concurrency = sampling_concurrency
        self._top_k = top_k
        self._poll = poll
        self._vocabulary: int | None = None
        self._restarts = 0
        self._restarted_at: float | None = None
        self._starting: asyncio.Task[None] | None = None

    @classmethod
    def served(
        cls,
        url: str,
        model: str | None = None,
        *,
        temperature: float = 1.0,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        max_concurrency: int = CONCURRENCY,
        sampling_concurrency: int = SAMPLING_CONCURRENCY,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server that somebody else runs.

        Args:
            model: the name it is served under; None: the only base model there.
            api_key: None: the value of the environment variable RNOW_TEACHER_API_KEY, if it is set.
            timeout: seconds per sample, retries included.
            max_concurrency: samples in flight; ``check`` lowers it to 1 on a server with LoRA adapters.
            sampling_concurrency: completions in flight of ``sampler``.
            top_k: how many of the likeliest tokens the evidence lists besides the sampled one.

        Raises:
            ConfigError: a temperature other than 1.
            InputError: the url is none.
        """
        _refuse_temperature(temperature)
        key = api_key or os.environ.get(API_KEY_VARIABLE) or None
        client = VllmClient(url, key, timeout, max_concurrency)
        return cls(
            client=client,
            model=model,
            where="teacher.url",
            timeout=timeout,
            max_concurrency=max_concurrency,
            sampling_concurrency=sampling_concurrency,
            top_k=top_k,
            poll=poll,
        )

    @classmethod
    def managed(
        cls,
        local_dir: Path,
        *,
        log: Path,
        dtype: str = "auto",
        quantization: str = "none",
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        max_model_len: int | None = None,
        temperature: float = 1.0,
        trust_remote_code: bool = False,
        enforce_eager: bool = True,
        enable_sleep_mode: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
        start_timeout: float = START_TIMEOUT,
        max_concurrency: int | None = None,
        samples: bool = False,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server of our own: loopback, random key, output in ``log``.

        Args:
            quantization: ``none``, ``nf4`` (bitsandbytes), or one of vLLM's own words (``fp8``, ``awq`` ...).
            max_num_batched_tokens: prompt tokens whose logits are in memory at once.
            max_model_len: tokens of the longest sample to be scored; None: the model's limit.
            max_concurrency: samples in flight; None: 4 on a GPU, 1 on the CPU.
            samples: ``sampler`` will be used.
            top_k: how many of the likeliest tokens the evidence lists besides the sampled one.

        Raises:
            ConfigError: a temperature other than 1, or a quantization vLLM does not have.
            ModelError: vLLM is not installed, or cannot load nf4.
        """
        _refuse_temperature(temperature)
        require_vllm("teacher.backend")
        on_gpu = torch.cuda.is_available()
        if max_concurrency is None:
            max_concurrency = CONCURRENCY if on_gpu else 1
        sampling_concurrency = SAMPLING_CONCURRENCY if on_gpu else 8
        in_flight = max(max_concurrency, sampling_concurrency if samples else 0)
        if samples and not on_gpu:
            # On a CPU a prompt prefilled in two parts makes vLLM rewind the request's random generator, which a CPU's
            # cannot: the engine dies.
            max_num_batched_tokens = max(max_num_batched_tokens, (max_model_len or 0) + 1)
        arguments = [
            *("--dtype", dtype),
            *("--tensor-parallel-size", str(tensor_parallel_size)),
            *("--max-num-batched-tokens", str(max_num_batched_tokens)),
            *("--max-num-seqs", str(in_flight)),
            *("--max-logprobs", str(max(MAX_LOGPROBS, top_k))),
            *(
                "--logprobs-mode",
                "processed_logprobs",
            ),  # those of completions; prompts keep the model's own
            "--no-enable-prefix-caching",  # prompt log-probabilities are computed anew, cached or not
        ]
        if samples and not on_gpu:
            arguments.append("--no-enable-chunked-prefill")
        environment = dict(env or {})
        if max_model_len is not None:
            # vLLM insists on room for one more token, which is never fed back: it may lie past the model's limit.
            arguments += ["--max-model-len", str(max_model_len + 1)]
            environment.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        if gpu_memory_utilization is not None:
            arguments += ["--gpu-memory-utilization", str(gpu_memory_utilization)]
        if quantization == "int8":
            raise ConfigError(
                "vLLM does not quantise to int8 while it loads",
                where="teacher.quantization",
                fix="use nf4 or fp8, or teacher.backend: transformers",
            )
        if quantization != "none":
            if quantization == "nf4":
                require_nf4("teacher.quantization", dtype=dtype)
                quantization = BITSANDBYTES
            arguments += ["--quantization", quantization]
        if trust_remote_code:
            arguments.append("--trust-remote-code")
        if enforce_eager:
            arguments.append("--enforce-eager")
        if enable_sleep_mode:
            arguments.append("--enable-sleep-mode")
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        server = VllmServer(
            local_dir,
            name=SERVED_NAME,
            log=log,
            arguments=arguments,
            env=environment,
            start_timeout=start_timeout,
            poll=poll,
        )
        return cls(
            server=server,
            model=SERVED_NAME,
            where="teacher.path",
            timeout=timeout,
            max_concurrency=max_concurrency,
            sampling_concurrency=sampling_concurrency,
            top_k=top_k,
            poll=poll,
        )

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
        """Free the GPU memory of a managed teacher (``enable_sleep_mode``); its weights stay in main memory."""
        await (await self._ready()).sleep(level=1)

    async def wake_up(self) -> None:
        """Take the GPU memory again."""
        await (await self._ready()).wake_up()

    def pids(self) -> set[int]:
        """Ids of a managed teacher's processes."""
        return self._server.pids() if self._server else set()

    # --- scoring --------------------------------------------------------------------------------------------------

    async def score(self, samples: Sequence[Sample]) -> Mapping[str, Evidence]:
        """Log-probabilities of the loss tokens of each sample, keyed by sample id.

        Raises:
            TemporaryError: no answer, or a wrong one, after retries and the restart that a managed teacher has.
        """
        evidence = {
            sample.id: _aligned(sample, {}, self._top_k)
            for sample in samples
            if not any(sample.loss_mask)
        }

        async def rest() -> None:
            await self._score_into(evidence, [s for s in samples if s.id not in evidence])

        try:
            await self.surviving(rest)
        except (BadAnswer, Refused) as error:
            raise TemporaryError(
                error.message,
                why=error.why,
                fix=error.fix,
                details=error.details,
                title=error.title,
            ) from error
        return {sample.id: evidence[sample.id] for sample in samples}

    async def compute_logprobs_async(self, token_ids: Sequence[int]) -> list[float | None]:
        """Log-probability of every given token in its context; the first has none, so its entry is None.

        Raises:
            ValueError: no tokens, or (after ``check``) an id the tokenizer cannot produce.
            ServerDown, Refused, BadAnswer: see ``rnow.serving.client``.
        """
        if not token_ids:
            raise ValueError("token_ids is empty")
        highest = self._vocabulary
        if bad := [i for i in token_ids if i < 0 or (highest is not None and i >= highest)]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {highest} ids")
        client = await self._ready()
        return await client.prompt_logprobs(token_ids, model=await self._name(client))

    def sampler(self, *, vocabulary: int, padding: Sequence[int]) -> VllmTeacherSampler:
        """A Sampler that answers with this teacher, on the same server.

        Args:
            vocabulary: how many ids the student's tokenizer can produce.
            padding: the ids above them that the teacher's head has; they are never drawn.
        """
        from rnow.teacher.vllm_sampler import VllmTeacherSampler

        return VllmTeacherSampler(self, vocabulary=vocabulary, padding=padding)

    async def connect(self) -> tuple[VllmClient, str]:
        """The server as it runs now, for completions, and the model's name there."""
        client = await self._ready()
        return client.sharing(self._sampling_concurrency), await self._name(client)

    async def surviving(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What ``ask`` gives, asked again when a managed teacher had to be started again. Any number may ask at once.

        Raises:
            ServerDown: it failed again too soon; or a server that is not ours is gone.
        """
        while True:
            restarts = self._restarts
            try:
                return await ask()
            except ServerDown as error:
                gone = error
            await self._recover(restarts, gone)

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

    def _begin(self, server: VllmServer, coming: Coroutine[Any, Any, None]) -> None:
        """Let the server come up in a task that everybody who needs it waits for."""

        async def bring_up() -> None:
            try:
                await coming
                self._client = self._own_client(server)
            finally:
                self._starting = None

        self._starting = asyncio.create_task(bring_up())

    async def _score_into(self, evidence: dict[str, Evidence], samples: Sequence[Sample]) -> None:
        """Adds each answer as it comes, so that what was answered before a failure is not asked again."""
        client = await self._ready()
        model = await self._name(client)

        async def one(sample: Sample) -> None:
            evidence[sample.id] = await self._judge(client, model, sample)

        waiting: set[asyncio.Task[None]] = {asyncio.create_task(one(sample)) for sample in samples}
        try:
            while waiting:
                self._poll()
                done, waiting = await asyncio.wait(
                    waiting, timeout=_POLL, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _judge(self, client: VllmClient, model: str, sample: Sample) -> Evidence:
        ids = _scored_part(sample)
        if not self._top_k:
            values = await client.prompt_logprobs(ids, model=model)
            pairs = zip(ids, values, strict=True)
            entries = [{} if value is None else {token: value} for token, value in pairs]
        else:
            found = await client.prompt_top_logprobs(ids, model=model, top_k=self._top_k)
            entries = [entry or {} for entry in found]
        judged = {
            position: entry
            for position, entry in enumerate(entries)
            if sample.loss_mask[position] and entry
        }
        evidence = _aligned(sample, judged, self._top_k)
        if isinstance(evidence, TopKEvidence) and self._vocabulary is not None:
            highest = int(evidence.ids.max())
            if highest >= self._vocabulary:
                raise BadAnswer(
                    f"the teacher counts id {highest} among its {self._top_k} likeliest, which no tokenizer produces",
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

    def _own_client(self, server: VllmServer) -> VllmClient:
        return server.client(timeout=self._timeout, max_concurrency=self._max_concurrency)

    # --- checks before training -----------------------------------------------------------------------------------

    async def check(
        self,
        tokenizer: Any,
        vocabulary: int,
        *,
        texts: Sequence[str] = (),
        longest: int | None = None,
    ) -> TeacherCheck:
        """Whether this server can judge the student's tokens.

        Args:
            tokenizer: the student's HuggingFace tokenizer.
            vocabulary: how many ids it can produce.
            texts: rendered prompts of the run, compared besides our own probes.
            longest: tokens of the longest sequence that will be scored.

        Raises:
            StartFailed, ModelError: no answer; another model; another tokenizer; log-probabilities that are none, or that
                change when asked again; sequences too long for it.
        """
        self._vocabulary = vocabulary
        try:
            client = await self._ready()
            served = await find_served_model(client, self._model, self._where)
            self._model = served.id
            if self._server is None and any(model.parent for model in await client.models()):
                # Concurrent prompt log-probabilities have killed engines with LoRA enabled (CPU build).
                self._max_concurrency = 1
                client.limit(1)
            checks = ServedTeacherChecks(client, served, where=self._where, top_k=self._top_k)
            return await checks.run(tokenizer, vocabulary, texts, longest)
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
            raise


def _scored_part(sample: Sample) -> Sequence[int]:
    """The ids up to the last loss token: what follows it changes nothing."""
    last = max(position for position, on in enumerate(sample.loss_mask) if on)
    return sample.token_ids[: last + 1]


def _aligned(sample: Sample, judged: Mapping[int, Mapping[int, float]], top_k: int) -> Evidence:
    """``judged``: for each loss position the log-probabilities of the sampled id and, with ``top_k``, of the likeliest."""
    values = torch.zeros(len(sample.token_ids))
    for position, entry in judged.items():
        values[position] = entry[sample.token_ids[position]]
    if not top_k:
        return SampledEvidence(teacher_logprobs=values)
    ids = torch.zeros(len(sample.token_ids), top_k, dtype=torch.long)
    logprobs = torch.zeros(len(sample.token_ids), top_k)
    for position, entry in judged.items():
        best = sorted(entry.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k]
        ids[position] = torch.tensor([token for token, _ in best])
        logprobs[position] = torch.tensor([value for _, value in best])
    return TopKEvidence(teacher_logprobs=values, ids=ids, logprobs=logprobs)


def _refuse_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise ConfigError(
            f"a teacher on vLLM cannot judge samples drawn at temperature {temperature:g}",
            where="rollout.temperature",
            why="student and teacher must be tempered alike, and a server's prompt log-probabilities are those of "
            "temperature 1",
            fix="set the temperature to 1, or teacher.backend: transformers",
        )
