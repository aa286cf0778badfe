"""vLLM's async engine in a process of its own, for the student."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import fields
from pathlib import Path

from rnow.errors import ModelError
from rnow.processes.process import ManagedProcess
from rnow.sampling.adapter_files import StoredAdapter
from rnow.sampling.vllm_backend import Answer, EngineGone, RequestRefused
from rnow.sampling.vllm_link import Message, WorkerLink
from rnow.sampling.vllm_padding import EXTENSION
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.server import START_TIMEOUT, require_vllm
from rnow.types import SamplingParams

WORKER = ("-P", "-m", "rnow.sampling.vllm_worker")


class VllmEngineSampler(VllmSampler):
    """A Sampler over a vLLM engine that this process starts and that ends with it."""

    def __init__(self, settings: VllmSettings) -> None:
        super().__init__(EngineBackend(settings), settings)


class EngineBackend:
    """The worker process and the line to it.

    Args:
        command: what to start instead of the worker, given the descriptor of its end of the line as one more argument.
    """

    name = "vLLM's engine"
    masks_probes = True

    def __init__(self, settings: VllmSettings, *, command: Sequence[str] | None = None) -> None:
        self.supports_sleep = False
        self._settings = settings
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
            require_vllm("sampler.backend")
            command = (sys.executable, *WORKER)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = ManagedProcess(
                [*command, str(theirs.fileno())],
                env=environment(),
                log=self._settings.log,
                name=self.name,
                pass_fds=(theirs.fileno(),),
            )
            self._process.start()
        self._link = WorkerLink(ours, silence=START_TIMEOUT)
        answer = self._link.call("start", settings=worker_settings(self._settings))
        try:
            ready = answer.result(START_TIMEOUT)
        except (EngineGone, FutureTimeout) as error:
            self.stop()
            why = str(error) or f"no answer after {START_TIMEOUT:g} s"
            tail = self._process.log_tail()
            raise EngineGone(
                f"the engine did not start: {why}",
                [*tail, f"the whole log is {self._settings.log}"],
            ) from error
        except RequestRefused as error:
            self.stop()
            raise ModelError(
                "vLLM cannot serve this model",
                why=str(error),
                details=[f"log: {self._settings.log}"],
            ) from error
        except BaseException:
            self.stop()
            raise
        self._link.silence = self._settings.request_timeout
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

    def wake(self) -> None:
        """See ``Backend.wake``."""
        self._call("wake").result()

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

    def _call(self, op: str, **fields: object) -> Future[Message]:
        if self._link is None:
            raise EngineGone("it was never started")
        return self._link.call(op, **fields)


def worker_settings(settings: VllmSettings) -> dict[str, object]:
    """What the worker is told, JSON-ready."""
    told = {field.name: getattr(settings, field.name) for field in fields(settings)}
    for ours in ("work_dir", "log", "probe", "request_timeout"):
        del told[ours]
    return told | {
        "local_dir": str(Path(settings.local_dir).resolve()),
        "max_lora_rank": settings.allowed_rank,
        "worker_extension": EXTENSION,
    }


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
