"""The student behind vLLM's OpenAI-compatible server: one that we start, or one that somebody else runs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from rnow.errors import ModelError
from rnow.sampling.adapter_files import AdapterFiles, StoredAdapter
from rnow.sampling.gate import Gate
from rnow.sampling.vllm_backend import Answer, EngineGone, RequestRefused, allowed_lora_rank
from rnow.sampling.vllm_engine import Quantization, environment
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_worker import CPU_BATCHED_TOKENS
from rnow.serving.client import Refused, ServerDown, VllmClient
from rnow.serving.process import ManagedProcess, StartFailed, free_port
from rnow.types import SamplingParams

T = TypeVar("T")

BASE_MODEL = "base"
"""The name under which a server of ours serves the student without an adapter."""

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
        start_timeout: seconds until the server must answer, by default 900 for one of ours and 60 for a given one.
        request_timeout: seconds that one completion may take.
        max_num_seqs: requests in flight at once, also of a given server.

    The rest is as for ``VllmEngineSampler``; of a given server only ``local_dir``, ``vocabulary`` and ``max_lora_rank``
    are used.
    """

    def __init__(
        self,
        local_dir: Path,
        *,
        vocabulary: int,
        work_dir: Path,
        log: Path,
        url: str | None = None,
        api_key: str | None = None,
        served_model: str | None = None,
        dtype: str = "auto",
        quantization: Quantization = "none",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        trust_remote_code: bool = False,
        max_lora_rank: int = 32,
        start_timeout: float | None = None,
        request_timeout: float = 600.0,
    ) -> None:
        rank = allowed_lora_rank(max_lora_rank)
        local_dir = Path(local_dir).resolve()
        padding = padded_ids(local_dir, vocabulary)
        if start_timeout is None:
            start_timeout = 900.0 if url is None else 60.0
        backend: _Server
        if url is None:
            command = server_command(
                local_dir,
                dtype=dtype,
                quantization=quantization,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                max_num_seqs=max_num_seqs,
                tensor_parallel_size=tensor_parallel_size,
                enforce_eager=enforce_eager,
                enable_prefix_caching=enable_prefix_caching,
                trust_remote_code=trust_remote_code,
                max_lora_rank=rank,
                cpu=not torch.cuda.is_available(),
            )
            backend = ManagedServer(
                command,
                log=log,
                padding=padding,
                start_timeout=start_timeout,
                request_timeout=request_timeout,
                max_concurrency=max_num_seqs,
            )
        else:
            backend = GivenServer(
                url,
                api_key=api_key,
                served_model=served_model,
                padding=padding,
                start_timeout=start_timeout,
                request_timeout=request_timeout,
                max_concurrency=max_num_seqs,
            )
        super().__init__(
            backend,
            vocabulary=vocabulary,
            max_lora_rank=rank,
            files=AdapterFiles(work_dir, private=url is None),
        )


class _Server:
    """What both kinds of server share: requests over HTTP. Each thread's event loop has its own client."""

    name = "the vLLM server"
    supports_sleep = False

    def __init__(
        self,
        *,
        padding: Sequence[int],
        start_timeout: float,
        request_timeout: float,
        max_concurrency: int,
    ) -> None:
        self._bias = dict.fromkeys(padding, _BIAS)
        self._start_timeout = start_timeout
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
            run_apart(swap())

    def sleep(self) -> None:
        """Never called: ``supports_sleep`` is False."""
        raise NotImplementedError

    def wake(self, adapter: StoredAdapter | None) -> None:
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
    """A server that we start and end."""

    def __init__(self, command: Sequence[str], *, log: Path, **common: Any) -> None:
        super().__init__(**common)
        self._command = tuple(command)
        self._log = log
        self._key = secrets.token_urlsafe(32)
        self._process: ManagedProcess | None = None
        self._url = ""

    def pids(self) -> set[int]:
        """Ids of the server and of its engine's processes."""
        return self._process.pids() if self._process else set()

    def start(self) -> None:
        """See ``Backend.start``.

        Raises:
            ModelError: vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ModelError(
                "the student is to be sampled by a vLLM server, and vLLM is not installed here",
                fix="install vllm 0.26 or newer, or set sampler.url or sampler.backend: transformers",
            )
        try:
            try:
                run_apart(self._bring_up())
            except StartFailed as error:
                # Between our look for a free port and the server's taking it, somebody else may have it.
                if not any("in use" in line for line in error.details):
                    raise
                run_apart(self._bring_up())
        except StartFailed as error:
            self.stop()
            raise EngineGone(error.message, [*error.details, error.fix or ""]) from error
        self._requests = self._client(self._request_timeout)

    def stop(self) -> None:
        """See ``Backend.stop``."""
        self._requests = None
        if self._process:
            self._process.stop(grace=1.0)

    async def _bring_up(self) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        variables = {
            # In the environment, since a command line can be read by every user.
            "VLLM_API_KEY": self._key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }
        if len(self._bias) > _V2_BIAS_LIMIT:
            variables["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self._process = ManagedProcess(
            [*self._command, "--host", "127.0.0.1", "--port", str(port)],
            env=environment() | variables,
            log=self._log,
            name=self.name,
        )
        self._process.start()
        await self._process.wait_until(
            self._client(_CLOSE_TIMEOUT).health, timeout=self._start_timeout
        )

    def _client(self, timeout: float) -> VllmClient:
        process = self._process
        return VllmClient(
            self._url,
            self._key,
            timeout,
            self._max_concurrency,
            alive=lambda: process is not None and process.alive(),
        )


class GivenServer(_Server):
    """A server that somebody else runs. It is waited for, never started or ended; our adapter is taken away at the end."""

    def __init__(
        self, url: str, *, api_key: str | None, served_model: str | None, **common: Any
    ) -> None:
        super().__init__(**common)
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
            models = run_apart(self._client(self._start_timeout).models())
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
            if not run_apart(self._processes_logprobs()):
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
                run_apart(self._client(_CLOSE_TIMEOUT).unload_lora_adapter(name))

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


def server_command(
    local_dir: Path,
    *,
    dtype: str,
    quantization: Quantization,
    max_model_len: int | None,
    gpu_memory_utilization: float,
    max_num_seqs: int,
    tensor_parallel_size: int,
    enforce_eager: bool,
    enable_prefix_caching: bool,
    trust_remote_code: bool,
    max_lora_rank: int,
    cpu: bool,
) -> list[str]:
    """The command line of a server for a student, host and port left out."""
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": str(local_dir),
        "--served-model-name": BASE_MODEL,
        "--dtype": dtype,
        "--gpu-memory-utilization": str(gpu_memory_utilization),
        "--max-num-seqs": str(max_num_seqs),
        "--tensor-parallel-size": str(tensor_parallel_size),
        "--max-loras": "1",
        "--max-lora-rank": str(max_lora_rank),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--uvicorn-log-level": "warning",
    }
    if max_model_len is not None:
        options["--max-model-len"] = str(max_model_len)
    if quantization == "nf4":
        options["--quantization"] = "bitsandbytes"
    if cpu:
        # As for the engine: on a CPU a prompt must be prefilled in one part.
        window = max_model_len or config_of(local_dir).get("max_position_embeddings") or 0
        options["--max-num-batched-tokens"] = str(max(CPU_BATCHED_TOKENS, window))
    for option, value in options.items():
        command += [option, value]
    if cpu:
        command.append("--no-enable-chunked-prefill")
    command.append("--enable-lora")
    command.append(f"--{'' if enable_prefix_caching else 'no-'}enable-prefix-caching")
    if enforce_eager:
        command.append("--enforce-eager")
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


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


def run_apart(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end in a thread with an event loop of its own: the caller may be inside a running one."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, work).result()


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
