"""What the two ways of reaching vLLM have in common: an engine that rnow starts, and a server given by url."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rnow.sampling.adapter_files import StoredAdapter
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.client import Generated
from rnow.types import SamplingParams


class Backend(ABC):
    """One vLLM. Blocking methods are called on one thread, ``draw`` and ``probe`` on any event loop.

    Every method may raise ServerDown (it died or stopped answering; another start may mend it) or Refused (it lives and does
    not take this request; trying again would not help).
    """

    name: str
    settings: VllmSettings
    supports_sleep: bool = False
    masks_probes: bool
    """Whether ``probe`` leaves padded ids out of the softmax."""
    private_adapters: bool
    """Whether it runs on this machine as this user, so that nobody else need read the adapters' files."""

    @abstractmethod
    def start(self) -> None:
        """Start or reach it, and wait until it answers.

        Raises:
            ServerDown: it does not come up.
            ModelError: vLLM is not installed, does not serve this model, or gives other log-probabilities than those it draws
                from.
        """

    @abstractmethod
    def stop(self) -> None:
        """End it if rnow started it. May be called at any time, more than once."""

    @abstractmethod
    def load(self, adapter: StoredAdapter, *, replacing: StoredAdapter | None) -> None:
        """Load an adapter, then forget the one it replaces."""

    def sleep(self) -> None:
        """Give the card back, weights kept in host memory (vLLM's level 1). Only with ``supports_sleep``."""
        raise NotImplementedError

    def wake(self) -> None:
        """Take the card again. Adapters are to be loaded anew, under another name."""
        raise NotImplementedError

    @abstractmethod
    async def draw(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        adapter: StoredAdapter | None,
    ) -> Generated:
        """One completion, of ``adapter`` and of no other weights (None: the base model)."""

    @abstractmethod
    async def probe(self, token_ids: Sequence[int], adapter: StoredAdapter | None) -> list[float]:
        """Log-probabilities of ``token_ids[1:]`` at temperature 1; nothing else runs beside it."""
