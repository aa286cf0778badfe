"""The seams of the program: what the loop needs of each part, in one to three methods.

Every protocol has one scripted fake in ``tests/fakes.py`` and one conformance test that each implementation passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rnow.types import (
    Adapter,
    Completion,
    EndReason,
    Message,
    Prompt,
    RewardResult,
    Rollout,
    Sample,
    SamplingParams,
    ToolContext,
    ToolResult,
)

if TYPE_CHECKING:
    from rnow.algorithm.records import Batch, Evidence, UpdateResult


class Tokenizer(Protocol):
    """What is used of a HuggingFace tokenizer."""

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None: ...

    def __len__(self) -> int: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, **options: object
    ) -> Mapping[str, list[list[int]]]:
        """``input_ids`` of several texts at once."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

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

    def save_pretrained(self, save_directory: str) -> object: ...


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

    async def score(self, samples: Sequence[Sample]) -> Mapping[str, Evidence]:
        """Evidence for each sample, keyed by sample id."""
        ...


class Tool(Protocol):
    """Something the student can call."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of the arguments, an object."""
        ...

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
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


class EnvironmentStep(Protocol):
    """What an environment answers: the ids appended after the student's turn, and whether it is over."""

    @property
    def observation_token_ids(self) -> tuple[int, ...]: ...

    @property
    def messages(self) -> tuple[Message, ...]: ...

    @property
    def done(self) -> bool: ...

    @property
    def end_reason(self) -> EndReason | None:
        """Why it is over; None while it is not."""
        ...


@runtime_checkable
class Rewarder(Protocol):
    """Runs the user's reward functions."""

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        """The reward of one rollout, or None when its prompt names no reward."""
        ...


@runtime_checkable
class Policy(Protocol):
    """The student as something that learns."""

    def update(self, batch: Batch) -> UpdateResult:
        """Take the optimizer steps of one batch."""
        ...

    def adapter(self) -> Adapter:
        """The current LoRA weights."""
        ...

    def state_dict(self) -> Mapping[str, object]:
        """Everything that is needed to continue: optimizer moments and step count (the adapter is saved beside it)."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state_dict()``."""
        ...


@runtime_checkable
class MetricSink(Protocol):
    """Receives the numbers of each step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step."""
        ...
