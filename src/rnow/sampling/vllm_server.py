"""The student behind a vLLM server that runs already (``sampler.url``), over its OpenAI-compatible API."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rnow.errors import ModelError
from rnow.models.tokenizer import config_value
from rnow.sampling.adapter_files import StoredAdapter
from rnow.sampling.vllm_backend import Backend
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.client import Generated, VllmClient
from rnow.serving.http import Refused, ServerDown
from rnow.serving.reach import CONNECT_SECONDS
from rnow.tasks import run_anywhere
from rnow.types import SamplingParams

T = TypeVar("T")

PROBE_SECONDS = 120.0
"""Seconds for each answer of the check before training: one token, perhaps behind what others asked."""

_CLOSE_TIMEOUT = 5.0
_BIAS = -100.0
_SAME = 1e-4


class ServerBackend(Backend):
    """A vLLM server that runs already: waited for, never started or ended; the adapter is unloaded at the end.

    It must serve the student's base with LoRA (``--enable-lora --max-lora-rank R --logprobs-mode processed_logprobs``,
    environment VLLM_ALLOW_RUNTIME_LORA_UPDATING=True) and see ``work_dir`` under the same path.

    Padded ids are biased by -100, which leaves them e^-100 of their weight; probes cannot leave them out.

    Args:
        served_model: the base's name there; None takes the only one that is served.

    Raises:
        InputError: the url is not an http(s) address.
    """

    masks_probes = False
    private_adapters = False

    def __init__(
        self,
        settings: VllmSettings,
        *,
        url: str,
        api_key: str | None = None,
        served_model: str | None = None,
    ) -> None:
        self.settings = settings
        self._bias = dict.fromkeys(padded_ids(settings.local_dir, settings.vocabulary), _BIAS)
        self._url = url
        self._key = api_key
        self._base = served_model
        self._loaded: str | None = None
        # Each thread's event loop has its own connections; one client serves them all.
        self._requests: VllmClient | None = None
        self.name = f"the vLLM server at {VllmClient(url, api_key).url}"

    def start(self) -> None:
        models = run_anywhere(self._client(CONNECT_SECONDS).models())
        bases = [model.id for model in models if model.parent is None]
        wanted = self._base or (bases[0] if bases else None)
        if wanted is None or wanted not in bases:
            raise ModelError(
                f"{self.name} does not serve {wanted or 'any model'}",
                where="sampler.served_model",
                details=[f"it serves {', '.join(bases) or 'nothing'}"],
            )
        self._base = wanted
        client = self._client(self.settings.request_timeout)
        if not run_anywhere(_processes_logprobs(client.hurried(PROBE_SECONDS), wanted)):
            raise ModelError(
                f"{self.name} gives log-probabilities from before temperature and masks",
                why="training needs those of the distribution that the tokens were drawn from",
                fix="start it with --logprobs-mode processed_logprobs",
            )
        self._requests = client

    def stop(self) -> None:
        self._requests = None
        name, self._loaded = self._loaded, None
        if name:
            with contextlib.suppress(ModelError, ServerDown):
                run_anywhere(self._client(_CLOSE_TIMEOUT).unload_lora_adapter(name))

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        async def swap() -> None:
            client = self._client(self.settings.request_timeout)
            await client.load_lora_adapter(adapter.name, str(adapter.folder))
            if replacing:
                await client.unload_lora_adapter(replacing.name)

        try:
            run_anywhere(swap())
        except Refused as error:
            raise Refused(
                f"{error.message}. The server must see the folder {adapter.folder} under this very path, and must have been "
                "started with --enable-lora, a --max-lora-rank no smaller than the adapter's, and the environment "
                "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            ) from error
        self._loaded = adapter.name

    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Generated:
        # The client makes sure that the model that answered is the one that was asked.
        return await self._ask(
            adapter,
            lambda client, model: client.complete(
                prompt_token_ids, params, seed, model=model, logit_bias=self._bias
            ),
        )

    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        values = await self._ask(
            adapter, lambda client, model: client.prompt_logprobs(token_ids, model=model)
        )
        return [value for value in values[1:] if value is not None]

    async def _ask(
        self, adapter: StoredAdapter | None, ask: Callable[[VllmClient, str], Awaitable[T]]
    ) -> T:
        """What ``ask`` gives for the client and the name of the model."""
        if self._requests is None or self._base is None:
            raise ServerDown("it was stopped")
        try:
            return await ask(self._requests, adapter.name if adapter else self._base)
        except Refused as error:
            if adapter and error.status == 404:  # its owner started it again
                raise ServerDown(f"it lost the adapter ({error.message})") from error
            raise

    def _client(self, timeout: float) -> VllmClient:
        return VllmClient(self._url, self._key, timeout, self.settings.max_num_seqs)


async def _processes_logprobs(client: VllmClient, model: str) -> bool:
    """Whether a token drawn at temperature 2 comes with another log-probability than at temperature 1."""
    prompt = list(range(1, 5))
    params = SamplingParams(max_tokens=1, stop_token_ids=(), temperature=2.0)
    for seed in range(3):
        drawn = await client.complete(prompt, params, seed, model=model)
        raw = await client.prompt_logprobs([*prompt, *drawn.token_ids], model=model)
        if abs(drawn.logprobs[0] - (raw[-1] or 0.0)) > _SAME:
            return True
    return False


def padded_ids(local_dir: Path, vocabulary: int) -> range:
    """The ids that the model's head has and the tokenizer does not.

    Raises:
        ModelError: config.json does not say how many rows the head has.
    """
    rows = config_value(local_dir, "vocab_size")
    if rows is None:
        raise ModelError(f"{local_dir / 'config.json'} names no vocab_size")
    return range(vocabulary, rows)
