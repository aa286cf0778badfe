"""vLLM's async engine in a process of its own, for the student."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict
from pathlib import Path

from rnow import progress
from rnow.errors import ModelError, RnowError
from rnow.processes.process import ManagedProcess
from rnow.sampling.adapter_files import StoredAdapter
from rnow.sampling.vllm_backend import Backend
from rnow.sampling.vllm_link import Message, WorkerLink
from rnow.sampling.vllm_padding import EXTENSION
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.client import Generated
from rnow.serving.http import Refused, ServerDown
from rnow.serving.server import START_TIMEOUT, card_environment, require_vllm
from rnow.types import SamplingParams

WORKER = ("-P", "-m", "rnow.sampling.vllm_worker")


class EngineBackend(Backend):
    """A vLLM engine that this process starts and that ends with it: the worker process and the line to it.

    Args:
        command: what to start instead of the worker, given the descriptor of its end of the line as one more argument.
    """

    name = "vLLM's engine"
    masks_probes = True
    private_adapters = True

    def __init__(self, settings: VllmSettings, *, command: Sequence[str] | None = None) -> None:
        self.settings = settings
        self._command = command
        self._process: ManagedProcess | None = None
        self._link: WorkerLink | None = None

    def start(self) -> None:
        command, log = self._command, self.settings.log
        if command is None:
            require_vllm("sampler.backend")
            command = (sys.executable, *WORKER)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = ManagedProcess(
                [*command, str(theirs.fileno())],
                env=environment() | card_environment(self.settings.cards),
                log=log,
                name=self.name,
                pass_fds=(theirs.fileno(),),
            )
            self._process.start()
        progress.moved(ahead=START_TIMEOUT)
        self._link = WorkerLink(ours, silence=START_TIMEOUT)
        try:
            ready = self._link.call(
                "start",
                arguments=engine_arguments(self.settings),
                vocabulary=self.settings.vocabulary,
            ).result(START_TIMEOUT)
        except (ServerDown, FutureTimeout) as error:
            self.stop()
            raise ServerDown(
                f"the engine did not start: {str(error) or f'no answer after {START_TIMEOUT:g} s'}",
                details=[*self._process.log_tail(), f"the whole log is {log}"],
            ) from error
        except Refused as error:
            self.stop()
            raise ModelError(
                "vLLM cannot serve this model", why=error.message, details=[f"log: {log}"]
            ) from error
        except BaseException:
            self.stop()
            raise
        self._link.silence = self.settings.request_timeout
        self.supports_sleep = ready["supports_sleep"]

    def stop(self) -> None:
        if self._link:
            self._link.close()
        if self._process:
            self._process.stop(grace=1.0)

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        self._call(
            "load",
            name=adapter.name,
            number=adapter.number,
            folder=str(adapter.folder),
            replacing=replacing.name if replacing else None,
        ).result()

    def sleep(self) -> None:
        self._call("sleep").result()

    def wake(self) -> None:
        self._call("wake").result()

    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Generated:
        wanted = adapter.name if adapter else None
        asked = {"token_ids": list(prompt_token_ids), "params": asdict(params), "seed": seed}
        answer = await asyncio.wrap_future(self._call("draw", **asked, adapter=wanted))
        if answer["adapter"] != wanted:
            raise RnowError(
                f"{self.name} answered with the weights of {answer['adapter'] or 'the base'},"
                f" not {wanted or 'the base'}",
                title="Wrong policy version",
                why="training on tokens of another policy than the one recorded would be silently wrong",
            )
        return Generated(
            tuple(answer["token_ids"]), tuple(answer["logprobs"]), answer["finish_reason"]
        )

    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        wanted = adapter.name if adapter else None
        asked = self._call("probe", token_ids=list(token_ids), adapter=wanted)
        return (await asyncio.wrap_future(asked))["logprobs"]

    def _call(self, op: str, **fields: object) -> Future[Message]:
        if self._link is None:
            raise ServerDown("it was never started")
        return self._link.call(op, **fields)


def engine_arguments(settings: VllmSettings) -> dict[str, object]:
    """vLLM's engine arguments (``AsyncEngineArgs``), JSON-ready; the worker fits them to its vLLM and device."""
    arguments: dict[str, object] = {
        "model": str(settings.local_dir.resolve()),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        **settings.engine,
        "enable_sleep_mode": settings.enable_sleep,
        "trust_remote_code": settings.trust_remote_code,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": settings.allowed_rank,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "worker_extension_cls": EXTENSION,
    }
    if settings.quantization == "nf4":
        arguments["quantization"] = "bitsandbytes"
    return arguments


def environment() -> dict[str, str]:
    """Variables for a vLLM process that rnow starts: this rnow importable, nothing fetched, nothing reported."""
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # The user's folder holds files named as they like; none of them may shadow a package.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Read by the CPU build alone, in GiB; without it, vLLM wants its share of all the memory to be free.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2"),
    }
