"""vLLM's async engine in a process of its own, for the student."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, Literal

from rnow.errors import ModelError
from rnow.sampling.adapter_files import AdapterFiles, StoredAdapter
from rnow.sampling.vllm_backend import Answer, EngineGone, RequestRefused, allowed_lora_rank
from rnow.sampling.vllm_link import WorkerLink
from rnow.sampling.vllm_padding import EXTENSION
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.serving.process import ManagedProcess
from rnow.types import SamplingParams

Quantization = Literal["none", "nf4"]

WORKER = ("-P", "-m", "rnow.sampling.vllm_worker")


class VllmEngineSampler(VllmSampler):
    """A Sampler over a vLLM engine that this process starts and that ends with it.

    Args:
        local_dir: the student's folder.
        vocabulary: the tokenizer's length; the head's rows above it get no probability.
        work_dir: where adapters are written for vLLM; emptied by ``close``.
        log: the engine's output is appended here.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``. vLLM computes the adapter in the base's dtype.
        quantization: ``nf4`` needs vLLM's bitsandbytes support, from 0.32 on a package of its own.
        max_model_len: tokens of prompt and completion together; None takes the model's.
        gpu_memory_utilization: share of the card for weights and KV cache. On a CPU the environment variable
            VLLM_CPU_KVCACHE_SPACE (GiB, 2 by default) counts instead.
        max_lora_rank: the adapter's rank; vLLM is told the next one it knows.
        enable_sleep: reserve what ``sleep`` needs; no use on a CPU.
        start_timeout: seconds until the engine must answer.
        request_timeout: seconds without any token or answer after which the engine counts as dead.
    """

    def __init__(
        self,
        local_dir: Path,
        *,
        vocabulary: int,
        work_dir: Path,
        log: Path,
        dtype: str = "auto",
        quantization: Quantization = "none",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        enable_prefix_caching: bool = True,
        enable_sleep: bool = False,
        trust_remote_code: bool = False,
        max_lora_rank: int = 32,
        start_timeout: float = 900.0,
        request_timeout: float = 600.0,
    ) -> None:
        rank = allowed_lora_rank(max_lora_rank)
        settings = {
            "local_dir": str(Path(local_dir).resolve()),
            "vocabulary": vocabulary,
            "dtype": dtype,
            "quantization": quantization,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            "tensor_parallel_size": tensor_parallel_size,
            "enforce_eager": enforce_eager,
            "enable_prefix_caching": enable_prefix_caching,
            "enable_sleep": enable_sleep,
            "trust_remote_code": trust_remote_code,
            "max_lora_rank": rank,
            "worker_extension": EXTENSION,
        }
        backend = EngineBackend(
            settings, log=log, start_timeout=start_timeout, request_timeout=request_timeout
        )
        super().__init__(
            backend, vocabulary=vocabulary, max_lora_rank=rank, files=AdapterFiles(work_dir)
        )


class EngineBackend:
    """The worker process and the line to it.

    Args:
        settings: sent to the worker as they are.
        command: what to start, given the descriptor of its end of the line as one more argument.
    """

    name = "vLLM's engine"

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        log: Path,
        start_timeout: float,
        request_timeout: float,
        command: Sequence[str] | None = None,
    ) -> None:
        self.supports_sleep = False
        self._settings = dict(settings)
        self._log = log
        self._start_timeout = start_timeout
        self._request_timeout = request_timeout
        self._command = command
        self._process: ManagedProcess | None = None
        self._link: WorkerLink | None = None

    def pids(self) -> set[int]:
        """Ids of the worker and of the engine's own processes."""
        return self._process.pids() if self._process else set()

    def start(self) -> None:
        """Start the worker and wait for its engine.

        Raises:
            ModelError: vLLM is not installed, or cannot serve this model at all.
            EngineGone: it did not come up.
        """
        command = self._command
        if command is None:
            if importlib.util.find_spec("vllm") is None:
                raise ModelError(
                    "sampler.backend is vllm, and vLLM is not installed in this environment",
                    fix="install vllm 0.26 or newer, or set sampler.backend: transformers",
                )
            command = (sys.executable, *WORKER)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = ManagedProcess(
                [*command, str(theirs.fileno())],
                env=environment(),
                log=self._log,
                name=self.name,
                pass_fds=(theirs.fileno(),),
            )
            self._process.start()
        self._link = WorkerLink(ours, silence=self._start_timeout)
        answer = self._link.call("start", settings=self._settings)
        try:
            ready = answer.result(self._start_timeout)
        except (EngineGone, FutureTimeout) as error:
            self.stop()
            why = str(error) or f"no answer after {self._start_timeout:g} s"
            tail = self._process.log_tail()
            raise EngineGone(
                f"the engine did not start: {why}", [*tail, f"the whole log is {self._log}"]
            ) from error
        except RequestRefused as error:
            self.stop()
            raise ModelError(
                "vLLM cannot serve this model", why=str(error), details=[f"log: {self._log}"]
            ) from error
        except BaseException:
            self.stop()
            raise
        self._link.set_silence(self._request_timeout)
        self.supports_sleep = ready["supports_sleep"]

    def stop(self) -> None:
        """See ``Backend.stop``."""
        if self._link:
            self._link.close()
        if self._process:
            self._process.stop(grace=1.0)

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        """See ``Backend.load``."""
        self._call(
            "load",
            name=adapter.name,
            number=adapter.number,
            folder=str(adapter.folder),
            replacing=replacing.name if replacing else None,
        ).result()

    def sleep(self) -> None:
        """See ``Backend.sleep``."""
        self._call("sleep").result()

    def wake(self, adapter: StoredAdapter | None) -> None:
        """See ``Backend.wake``."""
        self._call("wake").result()
        if adapter:
            self.load(adapter, replacing=None)

    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Answer:
        """See ``Backend.draw``."""
        answer = await asyncio.wrap_future(
            self._call(
                "draw",
                prompt=list(prompt_token_ids),
                max_tokens=params.max_tokens,
                stop=list(params.stop_token_ids),
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                seed=seed,
                adapter=adapter.name if adapter else None,
            )
        )
        return Answer(
            token_ids=answer["tokens"],
            logprobs=answer["logprobs"],
            finish_reason=answer["finish"],
            adapter=answer["adapter"],
        )

    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        """See ``Backend.probe``. Padded ids have no mass here either."""
        answer = await asyncio.wrap_future(
            self._call("probe", tokens=list(token_ids), adapter=adapter.name if adapter else None)
        )
        return answer["logprobs"]

    def _call(self, op: str, **fields: Any) -> Any:
        if self._link is None:
            raise EngineGone("it was never started")
        return self._link.call(op, **fields)


def environment() -> dict[str, str]:
    """Variables for a vLLM process of ours: this rnow importable, nothing fetched, nothing reported."""
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # The user's folder holds files named as they like; none of them may shadow a package.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Read by the CPU build alone, in GiB; without it, vLLM wants its share of all the memory to be free.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }
    return variables
