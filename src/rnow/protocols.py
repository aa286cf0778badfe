"""The seams of the program: what the loop needs of each part, in one to three methods.

Every protocol has one scripted fake in ``tests/fakes.py`` and one conformance test that each implementation passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rnow.types import (
    Adapter,
    Completion,
    EnvironmentStep,
    Prompt,
    RewardResult,
    Rollout,
    Sample,
    SamplingParams,
    ToolContext,
    ToolResult,
)

if TYPE_CHECKING:
    from torch import Tensor

    from rnow.algorithm.records import Batch, Evidence, PolicyState, TeacherNeeds, UpdateResult


class Tokenizer(Protocol):
    """What is used of a HuggingFace tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    def __len__(self) -> int: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, **options: object
    ) -> Mapping[str, list[list[int]]]:
        """``input_ids`` of several texts at once."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> list[int]: ...

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    def get_chat_template(
        self,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str: ...

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, object]], **options: object
    ) -> object:
        """The rendered text with ``tokenize=False``, else token ids."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Draws completions from the student."""

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        """Sample one completion. The same ids, params, seed and adapter give the same tokens on one machine, whatever
        else is in flight and in whatever order requests arrive, as long as the whole set of requests is the same."""
        ...

    def live_rollout(self) -> AbstractContextManager[None]:
        """Hold this open for the life of one rollout. A batching sampler runs when every live rollout waits on it."""
        ...

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """Sample from these weights from now on and stamp completions with ``version``."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Judges the tokens the student wrote."""

    async def score(self, samples: Sequence[Sample], needs: TeacherNeeds) -> Mapping[str, Evidence]:
        """Evidence for each sample, keyed by sample id, of the kind that ``needs`` asks for."""
        ...


class Tool(Protocol):
    """Something the student can call."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, object]:
        """JSON schema of the arguments, an object."""
        ...

    @property
    def timeout(self) -> float | None:
        """Seconds that one call may take; None: the limit of the toolbox."""
        ...

    @property
    def starting(self) -> float:
        """Seconds that may pass besides, before a call begins: what runs it may have to come up."""
        ...

    async def call(self, arguments: Mapping[str, object], context: ToolContext) -> ToolResult:
        """Run it. Faults of the tool, its time limit included, are results with ``failed``; only a cancellation, or a
        fault of rnow itself, raises."""
        ...


class Environment(Protocol):
    """One episode around one prompt; single use."""

    async def start(self) -> tuple[int, ...]:
        """The token ids of the first prompt."""
        ...

    async def step(self, completion: Completion) -> EnvironmentStep:
        """Take the student's turn; say what is appended to the context and whether the episode is over."""
        ...

    async def close(self) -> None:
        """Release whatever the episode holds."""
        ...


@runtime_checkable
class Rewarder(Protocol):
    """Runs the user's reward functions."""

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        """The reward of one rollout, or None when its prompt names no reward."""
        ...


@runtime_checkable
class Policy(Protocol):
    """The student as something that learns. It may live in other processes: nothing else reaches for its model."""

    def update(self, batch: Batch) -> UpdateResult:
        """Take the optimizer steps of one batch."""
        ...

    @property
    def updates(self) -> int:
        """How many optimizer steps were taken since the run began."""
        ...

    def adapter(self) -> Adapter:
        """The current LoRA weights."""
        ...

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the LoRA weights, named as in ``Adapter.tensors``.

        Raises:
            ValueError: names or shapes do not match this adapter.
        """
        ...

    def state_dict(self) -> PolicyState:
        """Everything that is needed to continue beside the adapter: optimizer moments and the number of updates."""
        ...

    def load_state_dict(self, state: PolicyState) -> None:
        """Continue from ``state_dict()``."""
        ...
