"""A teacher behind a vLLM server: one that is there already, or one of our own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rnow.algorithm.records import SampledEvidence
from rnow.errors import ConfigError, ModelError, TemporaryError
from rnow.serving.client import (
    MAX_LOGPROBS,
    BadAnswer,
    Refused,
    ServedModel,
    ServerDown,
    VllmClient,
)
from rnow.serving.server import START_TIMEOUT, VllmServer, require_vllm
from rnow.types import Sample

API_KEY_VARIABLE = "RNOW_TEACHER_API_KEY"

MAX_NUM_BATCHED_TOKENS = 1024
"""Prompt tokens per forward pass of a managed teacher. vLLM materialises the logits of a whole chunk of the prompt: at
8,192 tokens and 151,936 ids that is 5 GB in float32, several times over; at 1,024 it is 0.6 GB."""

SERVED_NAME = "teacher"
TIMEOUT = 600.0
CONCURRENCY = 4
"""Requests in flight at a teacher on a GPU."""

REPEAT_TOLERANCE = 1e-2
"""Nats by which the same request may differ when asked twice: batching in bfloat16 moves the third digit."""

_PROBE = "The quick brown fox: 3.14 + 27 = 30.14\n\tdef f(x):  return x ** 2  # naïve café, 東京, Привет 🙂"
_PROBE_TOKENS = 64
_SPREAD_IDS = 512
_MAX_PADDING = 1024
_POLL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCheck:
    """What ``VllmTeacher.check`` found.

    Attributes:
        model: the name it is served under; ``root``: the folder or id that the server says it is.
        max_model_len: tokens of the longest sequence it takes, if it says so.
        padding_mass: mean probability of the ids that no tokenizer produces, over a few contexts. A served teacher cannot
            leave them out of its softmax, so its log-probabilities are too low by about this much. 0 without such ids,
            None where the server is too old to be asked.
        padding_rows: how many such ids there are (at most 1,024 are counted), None as above.
        repeat_gap: nats between two answers to the same request.
        warnings: what could not be checked.
    """

    model: str
    root: str | None
    max_model_len: int | None
    padding_mass: float | None
    padding_rows: int | None
    repeat_gap: float
    warnings: tuple[str, ...] = ()


class VllmTeacher:
    """Scores the exact token ids the student sampled, by a server's prompt log-probabilities: one request per sample.

    Use ``served`` or ``managed``. A managed teacher starts with its first use (``start``), ends with ``close`` or with
    this process, and is started again once per ``score`` when it dies or stops answering.

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
        self._poll = poll
        self._vocabulary: int | None = None

    @classmethod
    def served(
        cls,
        url: str,
        model: str | None = None,
        *,
        temperature: float = 1.0,
        api_key_variable: str = API_KEY_VARIABLE,
        timeout: float = TIMEOUT,
        max_concurrency: int = CONCURRENCY,
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server that somebody else runs.

        Args:
            model: the name it is served under; None: the only base model there.
            api_key_variable: the environment variable that holds the key, if the server wants one.
            timeout: seconds per sample, retries included.
            max_concurrency: samples in flight; ``check`` lowers it to 1 on a server with LoRA adapters.

        Raises:
            ConfigError: a temperature other than 1.
            InputError: the url is none.
        """
        _refuse_temperature(temperature)
        key = os.environ.get(api_key_variable) or None
        client = VllmClient(url, key, timeout, max_concurrency)
        return cls(
            client=client,
            model=model,
            where="teacher.url",
            timeout=timeout,
            max_concurrency=max_concurrency,
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
        poll: Callable[[], None] = lambda: None,
    ) -> VllmTeacher:
        """A teacher on a server of our own: loopback, random key, output in ``log``.

        Args:
            quantization: ``none``, ``nf4`` (bitsandbytes), or one of vLLM's own words (``fp8``, ``awq`` ...).
            max_num_batched_tokens: prompt tokens whose logits are in memory at once.
            max_model_len: tokens of the longest sample to be scored; None: the model's limit.
            max_concurrency: samples in flight; None: 4 on a GPU, 1 on the CPU.

        Raises:
            ConfigError: a temperature other than 1, or a quantization vLLM does not have.
            ModelError: vLLM is not installed.
        """
        _refuse_temperature(temperature)
        require_vllm("teacher.backend")
        if max_concurrency is None:
            max_concurrency = CONCURRENCY if torch.cuda.is_available() else 1
        arguments = [
            *("--dtype", dtype),
            *("--tensor-parallel-size", str(tensor_parallel_size)),
            *("--max-num-batched-tokens", str(max_num_batched_tokens)),
            *("--max-num-seqs", str(max_concurrency)),
            "--no-enable-prefix-caching",  # prompt log-probabilities are computed anew, cached or not
        ]
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
            word = "bitsandbytes" if quantization == "nf4" else quantization
            arguments += ["--quantization", word]
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
            poll=poll,
        )

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start a managed teacher unless it runs.

        Raises:
            StartFailed: it did not come up.
        """
        if self._server is not None and self._client is None:
            await self._server.start()
            self._client = self._own_client(self._server)

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

    async def score(self, samples: Sequence[Sample]) -> Mapping[str, SampledEvidence]:
        """Log-probabilities of the loss tokens of each sample, keyed by sample id.

        Raises:
            TemporaryError: no answer, or a wrong one, after retries and one restart of a managed teacher.
        """
        evidence = {
            sample.id: SampledEvidence(teacher_logprobs=torch.zeros(len(sample.token_ids)))
            for sample in samples
            if not any(sample.loss_mask)
        }
        owed = [sample for sample in samples if sample.id not in evidence]
        try:
            try:
                await self._score_into(evidence, owed)
            except ServerDown:
                if self._server is None:
                    raise
                await self._server.restart()
                self._client = self._own_client(self._server)
                owed = [sample for sample in owed if sample.id not in evidence]
                await self._score_into(evidence, owed)
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

    async def _score_into(
        self, evidence: dict[str, SampledEvidence], samples: Sequence[Sample]
    ) -> None:
        """Adds each answer as it comes, so that what was answered before a failure is not asked again."""
        client = await self._ready()
        model = await self._name(client)

        async def one(sample: Sample) -> None:
            logprobs = await client.prompt_logprobs(_scored_part(sample), model=model)
            evidence[sample.id] = _aligned(sample, logprobs)

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

    async def _ready(self) -> VllmClient:
        await self.start()
        assert self._client is not None
        return self._client

    async def _name(self, client: VllmClient) -> str:
        if self._model is None:
            self._model = (await self._served_model(client)).id
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
            return await self._check(tokenizer, vocabulary, texts, longest)
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

    async def _check(
        self, tokenizer: Any, vocabulary: int, texts: Sequence[str], longest: int | None
    ) -> TeacherCheck:
        client = await self._ready()
        served = await self._served_model(client)
        self._model = served.id
        if self._server is None and await self._has_adapters(client):
            # Concurrent prompt log-probabilities have killed engines with LoRA enabled (CPU build).
            self._max_concurrency = 1
            client.limit(1)
        self._check_window(served, longest)
        spread = range(0, vocabulary, max(1, vocabulary // _SPREAD_IDS))
        controls = sorted(tokenizer.get_added_vocab())
        probes = [_PROBE, "".join(controls), tokenizer.decode(list(spread))]
        warnings = await self._compare_tokenizers(client, tokenizer, [*probes, *texts], served.id)
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)[:_PROBE_TOKENS]
        if served.max_model_len is not None:
            ids = ids[: served.max_model_len - 1]
        gap = await self._repeat(client, served.id, ids)
        rows, mass = await self._padding(client, served.id, ids, vocabulary)
        if rows is None:
            warnings.append(
                "the teacher's server cannot say how much probability it gives to padding ids"
            )
        return TeacherCheck(
            model=served.id,
            root=served.root,
            max_model_len=served.max_model_len,
            padding_mass=mass,
            padding_rows=rows,
            repeat_gap=gap,
            warnings=tuple(warnings),
        )

    async def _served_model(self, client: VllmClient) -> ServedModel:
        models = await client.models()
        if self._model is not None:
            for model in models:
                if model.id == self._model:
                    return model
        bases = [model for model in models if model.parent is None]
        if self._model is None and len(bases) == 1:
            return bases[0]
        raise ModelError(
            f"the server at {client.url} serves "
            + (f"no model '{self._model}'" if self._model else f"{len(bases)} models"),
            title="Another teacher is served",
            where=self._where,
            details=[f"served: {model.id}" for model in models[:10]],
            fix="set teacher.path to one of the served names",
        )

    async def _has_adapters(self, client: VllmClient) -> bool:
        return any(model.parent is not None for model in await client.models())

    def _check_window(self, served: ServedModel, longest: int | None) -> None:
        window = served.max_model_len
        if longest is not None and window is not None and longest >= window:
            raise ModelError(
                f"the teacher's server takes sequences of up to {window - 1} tokens, the run has up to {longest}",
                where=self._where,
                fix=f"start it with --max-model-len {longest + 1}, or lower rollout.max_context_window to {window - 1}",
            )

    async def _compare_tokenizers(
        self, client: VllmClient, tokenizer: Any, texts: Sequence[str], model: str
    ) -> list[str]:
        for text in texts:
            if not text:
                continue
            ours = tokenizer.encode(text, add_special_tokens=False)
            try:
                theirs = await client.tokenize(text, model=model)
            except Refused as error:
                if error.status not in (404, 405, 501):
                    raise
                return [
                    "the teacher's server has no /tokenize, so its tokenizer could not be compared with the student's"
                ]
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise ModelError(
                    f"the teacher's server reads text differently from token {at} on",
                    title="Student and teacher tokenizers differ",
                    where=self._where,
                    details=[
                        f"student: {ours[at : at + 5]}",
                        f"teacher: {theirs[at : at + 5]}",
                        f"in:      {text[:80]!r}",
                    ],
                    why="the teacher scores the student's token ids, so every id must mean the same to both",
                    fix="serve a teacher of the student's family",
                )
        return []

    async def _repeat(self, client: VllmClient, model: str, ids: Sequence[int]) -> float:
        first = await client.prompt_logprobs(ids, model=model)
        second = await client.prompt_logprobs(ids, model=model)
        gap = max(
            (
                abs(a - b)
                for a, b in zip(first, second, strict=True)
                if a is not None and b is not None
            ),
            default=0.0,
        )
        if gap > REPEAT_TOLERANCE:
            raise BadAnswer(
                f"the server at {client.url} gives the same tokens log-probabilities that differ by {gap:.3g} nats",
                why="several models may stand behind one address",
                fix="name a server that serves one model",
            )
        return gap

    async def _padding(
        self, client: VllmClient, model: str, ids: Sequence[int], vocabulary: int
    ) -> tuple[int | None, float | None]:
        """How many ids at or above ``vocabulary`` the model has, and their mean probability after a few prefixes."""
        prefixes = [ids[:length] for length in {1, len(ids) // 2 or 1, len(ids)}]
        mass, rows, size = 0.0, 0, MAX_LOGPROBS
        while rows < _MAX_PADDING:
            wanted = range(vocabulary + rows, vocabulary + rows + size)
            try:
                for prefix in prefixes:
                    found = await client.next_logprobs(prefix, wanted, model=model)
                    if found is None:
                        return None, None
                    values = torch.tensor(list(found.values()), dtype=torch.float64)
                    mass += values.exp().sum().item() / len(prefixes)
            except Refused as error:
                # Past the last row the server says no: look closer until the end is found.
                if error.status not in (400, 422) or size == 1:
                    break
                size //= 2
                continue
            rows += size
        return rows, mass


def _scored_part(sample: Sample) -> Sequence[int]:
    """The ids up to the last loss token: what follows it changes nothing."""
    last = max(position for position, on in enumerate(sample.loss_mask) if on)
    return sample.token_ids[: last + 1]


def _aligned(sample: Sample, logprobs: Sequence[float | None]) -> SampledEvidence:
    values = torch.zeros(len(sample.token_ids))
    for position, logprob in enumerate(logprobs):
        if sample.loss_mask[position] and logprob is not None:
            values[position] = logprob
    return SampledEvidence(teacher_logprobs=values)


def _refuse_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise ConfigError(
            f"a teacher on vLLM cannot judge samples drawn at temperature {temperature:g}",
            where="rollout.temperature",
            why="student and teacher must be tempered alike, and a server's prompt log-probabilities are those of "
            "temperature 1",
            fix="set the temperature to 1, or teacher.backend: transformers",
        )
