"""What the two ways of reaching vLLM have in common: an engine that rnow starts, and a server given by url."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rnow.errors import ModelError
from rnow.sampling.adapter_files import StoredAdapter
from rnow.types import SamplingParams

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``max_lora_rank`` that vLLM accepts (1 too, from some version on)."""

MAX_TEMPERATURE = 2.0
"""vLLM refuses more."""


def allowed_lora_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM that holds an adapter of ``rank``; the adapter keeps its own.

    Raises:
        ModelError: vLLM has no room for this rank.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ModelError(
        f"vLLM loads LoRA adapters up to rank {LORA_RANKS[-1]}, and this one has {rank}",
        where="model.qlora_rank",
        fix=f"use a rank of at most {LORA_RANKS[-1]}, or sampler.backend: transformers",
    )


class EngineGone(Exception):
    """The engine died or stopped answering; another start may mend it. ``details``: lines of its log."""

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class RequestRefused(Exception):
    """The engine lives and says that this request cannot be served; trying again would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What vLLM drew: the ids with the stop id last, their processed log-probabilities, its own finish reason, and the
    name of the adapter it used (None: the base model)."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: str
    adapter: str | None


class Backend(Protocol):
    """One vLLM. Blocking methods are called on one thread, ``draw`` and ``probe`` on any event loop.

    Every method may raise EngineGone or RequestRefused.
    """

    name: str
    supports_sleep: bool
    masks_probes: bool
    """Whether ``probe`` leaves padded ids out of the softmax."""

    def start(self) -> None:
        """Start or reach it, and wait until it answers. Raises EngineGone when it does not come up."""
        ...

    def stop(self) -> None:
        """End it if rnow started it. May be called at any time, more than once."""
        ...

    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        """Load an adapter, then forget the one it replaces."""
        ...

    def sleep(self) -> None:
        """Give the card back, weights kept in host memory (vLLM's level 1)."""
        ...

    def wake(self) -> None:
        """Take the card again. Adapters are to be loaded anew, under another name."""
        ...

    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Answer:
        """One completion."""
        ...

    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        """Log-probabilities of ``token_ids[1:]`` at temperature 1; nothing else runs beside it."""
        ...
