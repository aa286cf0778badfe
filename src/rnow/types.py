"""Records that travel through the program. Frozen, keyword-only, standard library only.

A worked example, for one prompt with ``group_size`` 2 (ids are invented)::

    Prompt(id="dataset_0/17", messages=({"role": "user", "content": "reverse: cat"},), ...)
      -> 2 x Rollout(turns=(Turn(observation_token_ids=(1, 5, 9, 2), completion=Completion(token_ids=(20, 21, 22, 3), ...)),))
      -> RolloutGroup(prompt, rollouts), and by rollout id: rewards
      -> 2 x Sample(token_ids=(1, 5, 9, 2,   20, 21, 22, 3),
                    loss_mask=(F, F, F, F,   T,  T,  T,  T),     # the sampled tokens, end-of-turn included
                    sampler_logprobs=(0., 0., 0., 0., -.1, -.2, -.7, -.01))
      -> (with teacher evidence, see rnow.algorithm.records) 2 x TrainingSample -> Batch -> UpdateResult

Index i of every per-token sequence describes token i. Nothing here is shifted for next-token prediction; that
happens once, in ``rnow.algorithm.batching``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, object]
"""One chat message: ``role`` and ``content`` at least, as in train.jsonl."""

FinishReason = Literal["stop", "length"]
"""vLLM's words: ``stop`` = the model ended its turn, ``length`` = the token cap cut it."""

RolloutStatus = Literal["completed", "truncated", "failed"]

EndReason = Literal["answer", "max_turns", "length", "window", "horizon", "failed"]
"""Why a rollout ended: an answer without a tool call (``last_tool``), the turn limit, the cap of one response, the window
of the conversation, as far as training looks (``algorithm.kl_horizon``), or a fault."""

Purpose = Literal["train", "eval", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a training file: what the student is asked, and what its rewards may look at.

    ``id`` is stable across epochs and runs (``dataset_0/<row>``); ``line`` is its 1-based line in the file, if it has one;
    ``teacher`` is the role of the model that judges its answers, None in a run without. ``text`` is the document that a row of
    midtrain is, which has no ``messages``.
    """

    id: str
    dataset: str
    row: int
    messages: Sequence[Message]
    rewards: Sequence[str] = ()
    tools: Sequence[str] | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, object] = field(default_factory=dict)
    docker: str | None = None
    docker_env: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    line: int | None = None
    teacher: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. The defaults sample from the model's own distribution.

    ``stop_token_ids`` are all ids that end a turn; ``top_k`` 0 means no limit; ``temperature`` 0 is greedy.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One generation: the sampled ids, their log-probabilities under the distribution they were drawn from, and the
    version of the adapter that drew them. ``token_ids`` ends with the stop id when ``finish_reason`` is ``stop``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the student wrote. ``error`` says what is wrong with one that could not be read; its ``arguments`` are
    then empty and ``name`` may be."""

    id: str
    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a call gave. ``content`` is what the student reads, a short error included; ``detail`` is for the transcript
    alone (a traceback)."""

    content: str
    failed: bool = False
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolContext:
    """The rollout that calls: ``rollout_id`` is ``<prompt id>#<index>``; ``episode`` is what tools know it by, unlike that of
    the same prompt in another step. The rest comes from the prompt's row."""

    rollout_id: str
    episode: str = ""
    metadata: Mapping[str, object] = field(default_factory=dict)
    variables: Mapping[str, object] = field(default_factory=dict)
    docker: str | None = None
    docker_env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentStep:
    """What an environment answers to the student's turn: the ids appended after it, the messages of the exchange (the
    student's first), whether the episode is over, and if so why."""

    observation_token_ids: tuple[int, ...]
    messages: tuple[Message, ...]
    done: bool
    end_reason: EndReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange inside a rollout: the ids appended to the context, and the student's completion."""

    observation_token_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One attempt at a prompt, turn by turn.

    ``unanswered_token_ids`` were appended after the last turn and left no room for another. ``messages`` is what the turns
    said, tool results included.
    """

    prompt_id: str
    index: int
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    status: RolloutStatus
    end_reason: EndReason
    unanswered_token_ids: tuple[int, ...] = ()
    error: str | None = None

    @property
    def id(self) -> str:
        """Unique within a step; everything about one rollout is filed under it."""
        return rollout_id(self.prompt_id, self.index)

    @property
    def completion_tokens(self) -> int:
        """How many tokens the student wrote."""
        return sum(len(turn.completion.token_ids) for turn in self.turns)

    @property
    def total_tokens(self) -> int:
        """How many tokens there are in all."""
        shown = sum(len(turn.observation_token_ids) for turn in self.turns)
        return shown + self.completion_tokens + len(self.unanswered_token_ids)

    @property
    def answer(self) -> str:
        """The text of the last turn; empty when there is none."""
        said = [message for message in self.messages if message.get("role") == "assistant"]
        return str(said[-1].get("content", "")) if said else ""

    @property
    def policy_version(self) -> int:
        """The adapter version of the first completion, or -1 for a rollout without one."""
        return self.turns[0].completion.policy_version if self.turns else -1


def rollout_id(prompt_id: str, index: int) -> str:
    """``<prompt id>#<index>``."""
    return f"{prompt_id}#{index}"


def prompt_id_of(rollout_id: str) -> str:
    """The prompt of a rollout, by its id."""
    return rollout_id.rpartition("#")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All rollouts of one prompt in one step."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardResult:
    """What the reward functions said of one rollout: the combined value, each part, and the failures by name, in a line and, of those
    that raised, with their traceback."""

    total: float
    breakdown: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    tracebacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def worked(self) -> bool:
        """Whether the total says something: no reward failed, or another one gave a number."""
        return not self.errors or not self.breakdown.keys() <= self.errors.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trained sequence. ``id`` is its rollout's, ``teacher`` its prompt's."""

    id: str
    dataset: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sampler_logprobs: tuple[float, ...]
    teacher: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The student's current LoRA weights, as something a sampler can load.

    ``tensors`` maps PEFT's names (``base_model.model.….lora_A.weight``) to tensors on the trainer's device, without a
    copy; ``config`` is PEFT's adapter_config.json as a dict. Treat both as read-only.
    """

    tensors: Mapping[str, Any]
    config: Mapping[str, Any]
