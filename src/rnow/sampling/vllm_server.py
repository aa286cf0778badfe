"""The student behind vLLM's OpenAI-compatible server: one that we start, or one that somebody else runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rnow.errors import ModelError
from rnow.processes.process import StartFailed
from rnow.sampling.adapter_files import AdapterFiles, StoredAdapter
from rnow.sampling.gate import Gate
from rnow.sampling.vllm_backend import Answer, EngineGone, RequestRefused
from rnow.sampling.vllm_engine import environment
from rnow.sampling.vllm_probe import tolerance_of
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_settings import VllmSettings
from rnow.sampling.vllm_worker import CPU_BATCHED_TOKENS
from rnow.serving.client import Refused, ServerDown, VllmClient
from rnow.serving.server import START_TIMEOUT, VllmServer, require_vllm
from rnow.tasks import run_anywhere
from rnow.types import SamplingParams

T = TypeVar("T")

BASE_MODEL = "student"
"""The name under which a server of ours serves the student without an adapter."""

GIVEN_TIMEOUT = 60.0
"""Seconds until a server given by url must answer."""

_CLOSE_TIMEOUT = 5.0
_BIAS = -100.0
_SAME = 1e-4
_V2_BIAS_LIMIT = 1024


class VllmServerSampler(VllmSampler):
    """A Sampler over a vLLM server.

    With ``url`` None the server is started here: on loopback, with a random API key, and it ends with this process. With a
    ``url`` it must serve the student's base with LoRA (``--enable-lora --max-lora-rank R --logprobs-mode
    processed_logprobs``, environment VLLM_ALLOW_RUNTIME_LORA_UPDATING=True) and see ``work_dir`` under the same path.

    Padded ids are biased by -100, which leaves them e^-100 of their weight; ``probe`` cannot leave them out.

    Args:
        url: the server, or None.
        api_key: for a server given by ``url``.
        served_model: its name there; None takes the only base model it serves.
    """

    def __init__(
        self,
        settings: VllmSettings,
        *,
        url: str | None = None,
        api_key: str | None = None,
        served_model: str | None = None,
    ) -> None:
        common = {
            "padding": padded_ids(settings.local_dir, settings.vocabulary),
            "request_timeout": settings.request_timeout,
            "max_concurrency": settings.max_num_seqs,
        }
        backend: _Server
        if url is None:
            backend = ManagedServer(settings, cpu=not torch.cuda.is_available(), **common)
        else:
            backend = GivenServer(
                url,
                api_key=api_key,
                served_model=served_model,
                start_timeout=settings.start_timeout or GIVEN_TIMEOUT,
                **common,
            )
        super().__init__(
            backend,
            vocabulary=settings.vocabulary,
            max_lora_rank=settings.allowed_rank,
            files=AdapterFiles(settings.work_dir, private=url is None),
            probe=settings.probe,
            tolerance=tolerance_of(settings.dtype, settings.quantization),
        )


class _Server:
    """What both kinds of server share: requests over HTTP. Each thread's event loop has its own client."""

    name = "the vLLM server"
    supports_sleep = False
    masks_probes = False

    def __init__(
        self, *, padding: Sequence[int], request_timeout: float, max_concurrency: int
    ) -> None:
        self._bias = dict.fromkeys(padding, _BIAS)
        self._request_timeout = request_timeout
        self._max_concurrency = max_concurrency
        self._base = BASE_MODEL
        self._requests: VllmClient | None = None
        self._gates: tuple[asyncio.AbstractEventLoop, Gate] | None = None

    def start(self) -> None:
        """See ``Backend.start``."""
        raise NotImplementedError

    def stop(self) -> None:
        """See ``Backend.stop``."""
        raise NotImplementedError

    def _client(self, timeout: float) -> VllmClient:
        raise NotImplementedError

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        """See ``Backend.load``."""

        async def swap() -> None:
            client = self._client(self._request_timeout)
            await client.load_lora_adapter(adapter.name, str(adapter.folder))
            if replacing:
                await client.unload_lora_adapter(replacing.name)

        with _translated():
            run_anywhere(swap())

    def sleep(self) -> None:
        """Never called: ``supports_sleep`` is False."""
        raise NotImplementedError

    def wake(self) -> None:
        """Never called: ``supports_sleep`` is False."""
        raise NotImplementedError

    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Answer:
        """See ``Backend.draw``."""
        async with self._gate().shared():
            return await self._draw(prompt_token_ids, params, seed, adapter)

    async def _draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Answer:
        with _translated(lost_adapter=adapter):
            # The client makes sure that the model that answered is the one that was asked.
            generated = await self._asking().complete(
                prompt_token_ids,
                model=adapter.name if adapter else self._base,
                max_tokens=params.max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=seed,
                stop_token_ids=params.stop_token_ids,
                logit_bias=self._bias,
            )
        return Answer(
            token_ids=generated.token_ids,
            logprobs=generated.logprobs,
            finish_reason=generated.finish_reason,
            adapter=adapter.name if adapter else None,
        )

    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        """See ``Backend.probe``; the padded ids' mass is part of the distribution here."""
        async with self._gate().alone():
            with _translated(lost_adapter=adapter):
                values = await self._asking().prompt_logprobs(
                    token_ids, model=adapter.name if adapter else self._base
                )
        return [value for value in values[1:] if value is not None]

    def _gate(self) -> Gate:
        """The gate of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._gates is None or self._gates[0] is not loop:
            self._gates = (loop, Gate())
        return self._gates[1]

    def _asking(self) -> VllmClient:
        if self._requests is None:
            raise EngineGone("it was stopped")
        return self._requests


class ManagedServer(_Server):
    """A server that we start and end.

    Args:
        cpu: there is no card, and so no sleep.
        command: what to run instead of this environment's vLLM.
    """

    def __init__(
        self,
        settings: VllmSettings,
        *,
        cpu: bool,
        command: Sequence[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.supports_sleep = settings.enable_sleep and not cpu
        self._own_command = command is not None
        variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        if len(self._bias) > _V2_BIAS_LIMIT:
            variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        if self.supports_sleep:
            variables["VLLM_SERVER_DEV_MODE"] = "1"
        self._server = VllmServer(
            Path(settings.local_dir).resolve(),
            name=BASE_MODEL,
            log=settings.log,
            arguments=server_arguments(settings, cpu=cpu),
            env=environment() | variables,
            start_timeout=settings.start_timeout or START_TIMEOUT,
            command=command,
        )

    def pids(self) -> set[int]:
        """Ids of the server and of its engine's processes."""
        return self._server.pids()

    def start(self) -> None:
        """See ``Backend.start``.

        Raises:
            ModelError: vLLM is not installed.
        """
        if not self._own_command:
            require_vllm("sampler.mode")
        try:
            run_anywhere(self._server.start())
        except StartFailed as error:
            raise EngineGone(
                f"its server did not start: {error.message}", [*error.details, error.fix or ""]
            ) from error
        self._requests = self._client(self._request_timeout)

    def stop(self) -> None:
        """See ``Backend.stop``."""
        self._requests = None
        self._server.stop(grace=1.0)

    def sleep(self) -> None:
        """See ``Backend.sleep``."""
        with _translated():
            run_anywhere(self._client(self._request_timeout).sleep(level=1))

    def wake(self) -> None:
        """See ``Backend.wake``."""
        with _translated():
            run_anywhere(self._client(self._request_timeout).wake_up())

    def _client(self, timeout: float) -> VllmClient:
        return self._server.client(timeout=timeout, max_concurrency=self._max_concurrency)


class GivenServer(_Server):
    """A server that somebody else runs. It is waited for, never started or ended; our adapter is taken away at the end."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        served_model: str | None,
        start_timeout: float,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self._start_timeout = start_timeout
        self._url = url
        self._key = api_key
        self._served_model = served_model
        self._loaded: str | None = None
        self.name = f"the vLLM server at {VllmClient(url, api_key).url}"

    def start(self) -> None:
        """See ``Backend.start``.

        Raises:
            ModelError: it serves no such model, or gives other log-probabilities than those it draws from.
        """
        with _translated():
            models = run_anywhere(self._client(self._start_timeout).models())
        bases = [model.id for model in models if model.parent is None]
        wanted = self._served_model or (bases[0] if bases else None)
        if wanted is None or wanted not in bases:
            raise ModelError(
                f"{self.name} does not serve {wanted or 'any model'}",
                where="sampler.served_model",
                details=[f"it serves {', '.join(bases) or 'nothing'}"],
            )
        self._base = wanted
        with _translated():
            if not run_anywhere(self._processes_logprobs()):
                raise ModelError(
                    f"{self.name} gives log-probabilities from before temperature and masks",
                    why="training needs those of the distribution that the tokens were drawn from",
                    fix="start it with --logprobs-mode processed_logprobs",
                )
        self._requests = self._client(self._request_timeout)

    async def _processes_logprobs(self) -> bool:
        """Whether a token drawn at temperature 2 comes with another log-probability than at temperature 1."""
        client = self._client(self._request_timeout)
        prompt = list(range(1, 5))
        for seed in range(3):
            drawn = await client.complete(
                prompt, model=self._base, max_tokens=1, temperature=2.0, seed=seed
            )
            raw = await client.prompt_logprobs([*prompt, *drawn.token_ids], model=self._base)
            if abs(drawn.logprobs[0] - (raw[-1] or 0.0)) > _SAME:
                return True
        return False

    def stop(self) -> None:
        """See ``Backend.stop``."""
        self._requests = None
        name, self._loaded = self._loaded, None
        if name:
            with contextlib.suppress(ModelError, ServerDown):
                run_anywhere(self._client(_CLOSE_TIMEOUT).unload_lora_adapter(name))

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        """See ``Backend.load``."""
        try:
            super().load(adapter, replacing=replacing)
        except RequestRefused as error:
            raise RequestRefused(
                f"{error}. The server must see the folder {adapter.folder} under this very path, and must have been "
                "started with --enable-lora, a --max-lora-rank no smaller than the adapter's, and the environment "
                "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            ) from error
        self._loaded = adapter.name

    def _client(self, timeout: float) -> VllmClient:
        return VllmClient(self._url, self._key, timeout, self._max_concurrency)


def server_arguments(settings: VllmSettings, *, cpu: bool) -> list[str]:
    """What a server for a student is told beside its model, name and address."""
    options = {
        "--dtype": settings.dtype,
        "--gpu-memory-utilization": str(settings.gpu_memory_utilization),
        "--max-num-seqs": str(settings.max_num_seqs),
        "--tensor-parallel-size": str(settings.tensor_parallel_size),
        "--max-loras": "1",
        "--max-lora-rank": str(settings.allowed_rank),
        "--logprobs-mode": "processed_logprobs",
        "--uvicorn-log-level": "warning",
    }
    window = settings.max_model_len
    if window is not None:
        options["--max-model-len"] = str(window)
    if settings.quantization == "nf4":
        options["--quantization"] = "bitsandbytes"
    if cpu:
        # As for the engine: on a CPU a prompt must be prefilled in one part.
        window = window or config_of(settings.local_dir).get("max_position_embeddings") or 0
        options["--max-num-batched-tokens"] = str(max(CPU_BATCHED_TOKENS, window))
    arguments = [text for option in options.items() for text in option]
    if cpu:
        arguments.append("--no-enable-chunked-prefill")
    arguments.append("--enable-lora")
    caching = "" if settings.enable_prefix_caching else "no-"
    arguments.append(f"--{caching}enable-prefix-caching")
    if settings.enforce_eager:
        arguments.append("--enforce-eager")
    if settings.enable_sleep and not cpu:
        arguments.append("--enable-sleep-mode")
    if settings.trust_remote_code:
        arguments.append("--trust-remote-code")
    return arguments


def padded_ids(local_dir: Path, vocabulary: int) -> range:
    """The ids that the model's head has and the tokenizer does not.

    Raises:
        ModelError: config.json does not say how many rows the head has.
    """
    try:
        return range(vocabulary, int(config_of(local_dir)["vocab_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{local_dir / 'config.json'} names no vocab_size", why=str(error)
        ) from error


def config_of(local_dir: Path) -> dict[str, Any]:
    """A model's config.json: of its language model, where it holds several."""
    config = json.loads((local_dir / "config.json").read_text(encoding="utf-8"))
    return config | (config.get("text_config") or {})


@contextlib.contextmanager
def _translated(lost_adapter: StoredAdapter | None = None) -> Any:
    """The client's errors as a backend's. A server that does not know the adapter any more was restarted by its owner."""
    try:
        yield
    except ServerDown as error:
        raise EngineGone(error.message, [error.why] if error.why else []) from error
    except Refused as error:
        if lost_adapter and error.status == 404:
            raise EngineGone(f"it lost the adapter ({error.message})") from error
        raise RequestRefused(error.message) from error
