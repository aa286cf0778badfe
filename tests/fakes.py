"""One scripted fake per protocol of ``rnow.protocols``: each answers from a script and remembers what it was asked.

They hold to the contracts (lengths agree, ids end with a stop id when ``finish_reason`` is ``stop``, evidence is keyed by
sample id), so a test that passes with a fake does not pass by luck.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rnow.types import (
    Adapter,
    Completion,
    EndReason,
    EnvironmentStep,
    FinishReason,
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
    from rnow.algorithm.records import Batch, Evidence, PolicyState, TeacherNeeds, UpdateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRequest:
    """One call of ``FakeSampler.complete``."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int


Reply = Sequence[int] | BaseException


class FakeSampler:
    """Answers each request with token ids.

    Args:
        replies: a list, used in turn and then from its start again, or a function of the request. An exception is
            raised instead of returned. A reply longer than ``params.max_tokens`` is cut; ``finish_reason`` is ``stop``
            exactly when what is left ends with a stop id.
        logprob: of every token.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Callable[[SamplerRequest], Reply],
        *,
        logprob: float = -0.5,
    ) -> None:
        self._replies = replies
        self._logprob = logprob
        self.requests: list[SamplerRequest] = []
        self.loaded: list[tuple[Adapter, int]] = []
        self.version = 0
        self.live = 0
        self.most_live = 0

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        request = SamplerRequest(prompt_token_ids=tuple(prompt_token_ids), params=params, seed=seed)
        self.requests.append(request)
        number = len(self.requests) - 1
        await asyncio.sleep(0)  # as a real one would: other rollouts get their turn
        if callable(self._replies):
            reply = self._replies(request)
        else:
            reply = self._replies[number % len(self._replies)]
        if isinstance(reply, BaseException):
            raise reply
        ids = tuple(reply)[: params.max_tokens]
        reason: FinishReason = "stop" if ids and ids[-1] in params.stop_token_ids else "length"
        return Completion(
            token_ids=ids,
            logprobs=(self._logprob,) * len(ids),
            finish_reason=reason,
            policy_version=self.version,
        )

    @contextmanager
    def live_rollout(self) -> Iterator[None]:
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        try:
            yield
        finally:
            self.live -= 1

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        self.loaded.append((adapter, version))
        self.version = version


class FakeTeacher:
    """Gives every loss token a log-probability.

    Args:
        logprobs: one number for all, or a function of a sample and a position in it.
        error: raised by every ``score``.
    """

    def __init__(
        self,
        logprobs: float | Callable[[Sample, int], float] = -0.5,
        *,
        error: BaseException | None = None,
    ) -> None:
        self._logprobs = logprobs
        self._error = error
        self.calls: list[tuple[Sample, ...]] = []

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds | None = None
    ) -> Mapping[str, Evidence]:
        import torch

        from rnow.algorithm.records import SampledEvidence

        self.calls.append(tuple(samples))
        if self._error is not None:
            raise self._error
        return {
            sample.id: SampledEvidence(
                teacher_logprobs=torch.tensor(
                    [
                        self._at(sample, position)
                        for position, on in enumerate(sample.loss_mask)
                        if on
                    ],
                    dtype=torch.float32,
                )
            )
            for sample in samples
        }

    def _at(self, sample: Sample, position: int) -> float:
        return self._logprobs(sample, position) if callable(self._logprobs) else self._logprobs


class FakeRewarder:
    """Rewards a rollout with a number, a whole ``RewardResult``, or None; or a function of both that returns one."""

    def __init__(
        self,
        reward: float
        | RewardResult
        | Callable[[Prompt, Rollout], float | RewardResult | None]
        | None = 1.0,
    ) -> None:
        self._reward = reward
        self.calls: list[tuple[Prompt, Rollout]] = []

    async def score(self, prompt: Prompt, rollout: Rollout) -> RewardResult | None:
        self.calls.append((prompt, rollout))
        reward = self._reward(prompt, rollout) if callable(self._reward) else self._reward
        if reward is None or isinstance(reward, RewardResult):
            return reward
        return RewardResult(total=reward, breakdown={"fake": reward})


class FakePolicy:
    """Learns nothing: its adapter is one number, raised by 1 with every update that is not skipped.

    Args:
        metrics: reported by every update, or a function of the update's number (from 0).
        skip: numbers of updates that report ``skipped``.
    """

    def __init__(
        self,
        metrics: Mapping[str, float] | Callable[[int], Mapping[str, float]] | None = None,
        *,
        skip: Sequence[int] = (),
    ) -> None:
        self._metrics = metrics if metrics is not None else {"loss": 0.0, "teacher_kl": 0.1}
        self._skip = frozenset(skip)
        self.batches: list[Batch] = []
        self.value = 0.0
        self.updates = 0

    def update(self, batch: Batch) -> UpdateResult:
        import torch

        from rnow.algorithm.records import UpdateResult

        number = len(self.batches)
        self.batches.append(batch)
        skipped = number in self._skip
        if not skipped:
            self.value += 1.0
            self.updates += 1
        metrics = self._metrics(number) if callable(self._metrics) else self._metrics
        return UpdateResult(
            metrics=dict(metrics),
            streams={
                "logprobs": {
                    item.sample.id: torch.full((sum(item.sample.loss_mask),), -0.5)
                    for item in batch.samples
                }
            },
            skipped="non-finite" if skipped else None,
        )

    def adapter(self) -> Adapter:
        import torch

        return Adapter(
            tensors={"base_model.model.layer.lora_A.weight": torch.tensor([[self.value]])},
            config={"peft_type": "LORA", "r": 1},
        )

    def load_adapter(self, tensors: Mapping[str, Any]) -> None:
        """Take over the number of a saved adapter."""
        (tensor,) = tensors.values()
        self.value = float(tensor)

    def state_dict(self) -> PolicyState:
        import torch

        moment = {"base_model.model.layer.lora_A.weight.exp_avg": torch.tensor([[self.value]])}
        return {"updates": self.updates, "moments": moment if self.updates else {}}

    def load_state_dict(self, state: PolicyState) -> None:
        self.updates = state["updates"]


class FakeSink:
    """Keeps everything it is given; ``by_step`` is the rows by step number."""

    def __init__(self, *, error: BaseException | None = None) -> None:
        self._error = error
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.evaluations: list[tuple[str, int, dict[str, float]]] = []
        self.forgotten: list[int] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._error is not None:
            raise self._error
        self.rows.append((step, dict(metrics)))

    def evaluated(self, name: str, step: int, metrics: Mapping[str, float]) -> None:
        self.evaluations.append((name, step, dict(metrics)))

    def forget_from(self, step: int) -> None:
        self.forgotten.append(step)

    def close(self, patience: float) -> None:
        self.closed = True

    @property
    def by_step(self) -> dict[int, dict[str, float]]:
        """The last row of each step."""
        return dict(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeStep(EnvironmentStep):
    """What ``FakeEnvironment`` answers; the assistant message comes first, as from the real ones."""

    observation_token_ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = field(
        default_factory=lambda: ({"role": "assistant", "content": ""},)
    )
    done: bool = True
    end_reason: EndReason | None = None


class FakeEnvironment:
    """One scripted episode; being asked for more than the script holds, or after ``close``, is an error.

    Args:
        prompt_token_ids: what ``start`` answers.
        steps: what ``step`` answers in turn; an exception is raised.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int] = (1, 2),
        steps: Sequence[FakeStep | BaseException] = (FakeStep(),),
    ) -> None:
        self._prompt_token_ids = tuple(prompt_token_ids)
        self._steps = list(steps)
        self.completions: list[Completion] = []
        self.started = False
        self.closed = 0

    async def start(self) -> tuple[int, ...]:
        if self.started:
            raise AssertionError("an environment is used once, and was started twice")
        self.started = True
        return self._prompt_token_ids

    async def step(self, completion: Completion) -> FakeStep:
        if self.closed or not self.started:
            raise AssertionError("step() outside start() ... close()")
        self.completions.append(completion)
        step = self._steps[len(self.completions) - 1]
        if isinstance(step, BaseException):
            raise step
        return step

    async def close(self) -> None:
        self.closed += 1


ToolReply = str | ToolResult | BaseException


class FakeTool:
    """Answers each call from a script, and holds to its time limit as the real ones do.

    Args:
        replies: used in turn and then from its start again, or a function of arguments and context. A text is a result that did not
            fail; an exception is raised out of ``call``, which a real tool does only for a cancellation or a fault of rnow.
        seconds: that every call takes, or a function of its arguments.
        timeout: seconds after which the call fails; None: no limit.
        starting: seconds that the toolbox allows besides.
    """

    def __init__(
        self,
        name: str = "fake",
        replies: Sequence[ToolReply] | Callable[[Mapping[str, Any], ToolContext], ToolReply] = (
            "ok",
        ),
        *,
        parameters: Mapping[str, Any] | None = None,
        description: str = "A tool of the tests.",
        seconds: float | Callable[[Mapping[str, Any]], float] = 0.0,
        timeout: float | None = None,
        starting: float = 0.0,
    ) -> None:
        self.name = name
        self.description = description
        self.parameters: Mapping[str, Any] = parameters or {"type": "object"}
        self.timeout = timeout
        self.starting = starting
        self._replies = replies
        self._seconds = seconds
        self.calls: list[tuple[Mapping[str, Any], ToolContext]] = []
        self.running = 0
        self.most_running = 0

    async def call(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        self.calls.append((arguments, context))
        number = len(self.calls) - 1
        seconds = self._seconds(arguments) if callable(self._seconds) else self._seconds
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with asyncio.timeout(self.timeout):
                await asyncio.sleep(seconds)
        except TimeoutError:
            return ToolResult(
                content=f"Error: {self.name} took longer than {self.timeout:g} s", failed=True
            )
        finally:
            self.running -= 1
        if callable(self._replies):
            reply = self._replies(arguments, context)
        else:
            reply = self._replies[number % len(self._replies)]
        if isinstance(reply, BaseException):
            raise reply
        return ToolResult(content=reply) if isinstance(reply, str) else reply
