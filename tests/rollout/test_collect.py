"""All rollouts of a step: their alignment, their ends, and what one fault does to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import FakeEnvironment, FakeSampler, FakeStep, SamplerRequest
from tests.rollouts import flat

from rnow.errors import StopRequested, TemporaryError
from rnow.protocols import Environment
from rnow.rollout.collect import RolloutSettings, collect_rollouts, rollout_seed
from rnow.rollout.environment import SingleTurn
from rnow.types import Prompt, Rollout, RolloutGroup

END = 9
SETTINGS = RolloutSettings(
    group_size=3,
    window=64,
    max_tokens=8,
    stop_token_ids=(END,),
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    run_seed=7,
    purpose="train",
)
PROMPTS = [
    Prompt(id=f"dataset_0/{row}", dataset="dataset_0", row=row, messages=()) for row in range(4)
]


class Store:
    """A rollout store in memory."""

    def __init__(self, *rollouts: Rollout) -> None:
        self.known = {(r.prompt_id, r.index): r for r in rollouts}
        self.added: list[Rollout] = []

    def finished(self, prompt_id: str, index: int) -> Rollout | None:
        return self.known.get((prompt_id, index))

    def add(self, rollout: Rollout) -> None:
        self.added.append(rollout)


def collect(
    sampler: FakeSampler,
    environments: Callable[[Prompt, int], Environment] = lambda prompt, index: FakeEnvironment(
        (1, 2)
    ),
    *,
    prompts: Sequence[Prompt] = PROMPTS,
    settings: RolloutSettings = SETTINGS,
    store: Store | None = None,
) -> list[RolloutGroup]:
    return asyncio.run(
        collect_rollouts(prompts, sampler, environments, settings, step=5, store=store)
    )


def one(sampler: FakeSampler, environment: FakeEnvironment, **changes: Any) -> Rollout:
    settings = replace(SETTINGS, group_size=1, **changes)
    groups = collect(
        sampler, lambda prompt, index: environment, prompts=PROMPTS[:1], settings=settings
    )
    assert environment.closed == 1, "whatever happens, the environment is closed once"
    return groups[0].rollouts[0]


def test_groups_keep_the_order_of_prompts_and_indices() -> None:
    groups = collect(FakeSampler([[4, END]]))
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert [rollout.index for rollout in group.rollouts] == [0, 1, 2]
        assert {rollout.prompt_id for rollout in group.rollouts} == {group.prompt.id}


def test_the_same_prompt_twice_in_a_step_is_two_groups() -> None:
    sampler = FakeSampler([[4, END]])
    groups = collect(sampler, prompts=[PROMPTS[0], PROMPTS[0]])
    assert len(groups) == 2
    assert len(sampler.requests) == 6


def test_a_single_turn() -> None:
    rollout = one(
        FakeSampler([[4, 5, END]], logprob=-0.25),
        FakeEnvironment((1, 2), [FakeStep(messages=({"role": "assistant", "content": "hi"},))]),
    )
    assert flat(rollout).token_ids == (1, 2, 4, 5, END)
    assert flat(rollout).loss_mask == (False, False, True, True, True)
    assert flat(rollout).sampler_logprobs == (0.0, 0.0, -0.25, -0.25, -0.25)
    assert rollout.status == "completed"
    assert rollout.error is None
    assert rollout.messages == ({"role": "assistant", "content": "hi"},)
    assert rollout.answer == "hi"
    assert rollout.completion_tokens == 3


def test_several_turns_stay_aligned() -> None:
    """Observations are in the context of the next turn and out of the loss."""
    sampler = FakeSampler([[4, END], [5, 6, END], [END]], logprob=-0.5)
    environment = FakeEnvironment(
        (1, 2),
        [
            FakeStep(observation_token_ids=(7, 7), done=False),
            FakeStep(observation_token_ids=(8,), done=False),
            FakeStep(observation_token_ids=(3, 3), done=True),
        ],
    )
    rollout = one(sampler, environment)
    assert flat(rollout).token_ids == (1, 2, 4, END, 7, 7, 5, 6, END, 8, END)
    mask = "FFTTFFTTTFT"
    assert flat(rollout).loss_mask == tuple(letter == "T" for letter in mask)
    assert flat(rollout).sampler_logprobs == tuple(
        -0.5 if letter == "T" else 0.0 for letter in mask
    )
    assert [turn.observation_token_ids for turn in rollout.turns] == [(1, 2), (7, 7), (8,)]
    contexts = [request.prompt_token_ids for request in sampler.requests]
    assert contexts == [
        flat(rollout).token_ids[:2], flat(rollout).token_ids[:6], flat(rollout).token_ids[:10],
    ]  # fmt: skip
    assert rollout.status == "completed"


def test_every_request_has_its_own_seed_and_the_runs_settings() -> None:
    sampler = FakeSampler([[4, END]])
    settings = replace(SETTINGS, temperature=0.7, top_p=0.9, top_k=5)
    collect(sampler, settings=settings)
    seeds = {request.seed for request in sampler.requests}
    assert seeds == {
        rollout_seed(7, "train", 5, prompt.id, index, 0) for prompt in PROMPTS for index in range(3)
    }
    (params,) = {request.params for request in sampler.requests}
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.9, 5)
    assert params.stop_token_ids == (END,)


def test_each_turn_has_its_own_seed() -> None:
    sampler = FakeSampler([[4, END], [5, END]])
    one(
        sampler,
        FakeEnvironment((1,), [FakeStep(observation_token_ids=(7,), done=False), FakeStep()]),
    )
    assert [request.seed for request in sampler.requests] == [
        rollout_seed(7, "train", 5, PROMPTS[0].id, 0, turn) for turn in (0, 1)
    ]


def test_a_cut_answer_is_truncated() -> None:
    rollout = one(FakeSampler([[4] * 20]), FakeEnvironment((1, 2)))
    assert rollout.status == "truncated"
    assert rollout.completion_tokens == SETTINGS.max_tokens


def test_a_limit_on_live_rollouts_changes_none_of_them() -> None:
    """As with containers, of which each rollout holds one to its end and there are only so many."""

    def environments(prompt: Prompt, index: int) -> FakeEnvironment:
        return FakeEnvironment(
            (1, 2 + prompt.row), [FakeStep(observation_token_ids=(7,), done=False), FakeStep()]
        )

    def say(request: SamplerRequest) -> list[int]:
        return [request.seed % 5, END]

    free = FakeSampler(say)
    expected = collect(free, environments)
    assert free.most_live == 12
    few = FakeSampler(say)
    assert collect(few, environments, settings=replace(SETTINGS, max_live=5)) == expected
    assert few.most_live == 5


def test_the_window_bounds_the_answer() -> None:
    sampler = FakeSampler([[4] * 20])
    rollout = one(sampler, FakeEnvironment((1,) * 6), window=9)
    assert sampler.requests[0].params.max_tokens == 3
    assert len(flat(rollout).token_ids) == 9
    assert rollout.status == "truncated"


def test_an_observation_that_fills_the_window_ends_the_rollout() -> None:
    sampler = FakeSampler([[4, END]])
    environment = FakeEnvironment((1, 2), [FakeStep(observation_token_ids=(7,) * 5, done=False)])
    rollout = one(sampler, environment, window=9)
    assert rollout.status == "truncated"
    assert len(sampler.requests) == 1
    assert (
        len(flat(rollout).token_ids)
        == len(flat(rollout).loss_mask)
        == len(flat(rollout).sampler_logprobs)
        == 9
    )


@pytest.mark.parametrize(
    ("reply", "steps", "changes", "status", "reason"),
    [
        ([4, END], [FakeStep()], {}, "completed", "answer"),
        ([4, END], [FakeStep(end_reason="answer")], {}, "completed", "answer"),
        ([4, END], [FakeStep(end_reason="max_turns")], {}, "completed", "max_turns"),
        ([4] * 20, [FakeStep(end_reason="length")], {}, "truncated", "length"),
        ([4] * 20, [FakeStep(end_reason="length")], {"window": 7}, "truncated", "window"),
        # The answer and the window end at the same token: what cut it is the window.
        ([4] * 20, [FakeStep()], {"window": 10}, "truncated", "window"),
        ([4, END], [FakeStep(observation_token_ids=(7,) * 5, done=False)], {"window": 9},
         "truncated", "window"),
        ([4, END], [OSError("gone")], {}, "failed", "failed"),
        ([4, END], [FakeStep()], {"timeout": 0}, "failed", "failed"),
    ],
)  # fmt: skip
def test_a_rollout_says_why_it_ended(
    reply: list[int], steps: list[Any], changes: dict[str, Any], status: str, reason: str
) -> None:
    rollout = one(FakeSampler([reply]), FakeEnvironment((1, 2), steps), **changes)
    assert (rollout.status, rollout.end_reason) == (status, reason)


@pytest.mark.parametrize("where", ["start", "step", "close", "make"])
def test_a_broken_environment_fails_its_rollout_only(where: str) -> None:
    class Broken(FakeEnvironment):
        async def start(self) -> tuple[int, ...]:
            if where == "start":
                raise OSError("no browser")
            return await super().start()

        async def close(self) -> None:
            await super().close()
            if where == "close":
                raise OSError("no browser")

    def environments(prompt: Prompt, index: int) -> Environment:
        if prompt.row != 1:
            return FakeEnvironment((1, 2))
        if where == "make":
            raise OSError("no browser")
        steps = [OSError("no browser")] if where == "step" else [FakeStep()]
        return Broken((1, 2), steps)

    groups = collect(FakeSampler([[4, END]]), environments)
    for group in groups:
        expected = "failed" if group.prompt.row == 1 else "completed"
        assert {rollout.status for rollout in group.rollouts} == {expected}
    failed = groups[1].rollouts[0]
    assert failed.error == "OSError: no browser"
    assert (
        len(flat(failed).token_ids)
        == len(flat(failed).loss_mask)
        == len(flat(failed).sampler_logprobs)
    )


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), TemporaryError("vLLM is gone")])
def test_a_broken_sampler_ends_the_step(error: Exception) -> None:
    closed: list[FakeEnvironment] = []

    def environments(prompt: Prompt, index: int) -> Environment:
        closed.append(FakeEnvironment((1, 2)))
        return closed[-1]

    def reply(request: SamplerRequest) -> Any:
        return error if len(sampler.requests) > 5 else [4, END]

    sampler = FakeSampler(reply)
    with pytest.raises(type(error), match=str(error)):
        collect(sampler, environments)
    assert {environment.closed for environment in closed} == {1}
    assert sampler.live == 0


def test_a_stop_request_gets_through_as_itself() -> None:
    with pytest.raises(StopRequested) as caught:
        collect(FakeSampler([StopRequested(exit_code=143)]))
    assert caught.value.exit_code == 143


def test_every_rollout_is_announced_to_the_sampler_before_any_is_answered() -> None:
    sampler = FakeSampler([[4, END]])
    collect(sampler)
    assert sampler.most_live >= 1
    assert sampler.live == 0


def test_finished_rollouts_are_not_repeated() -> None:
    fresh = collect(FakeSampler([[4, END]]))
    kept = fresh[2].rollouts[1]
    sampler, store = FakeSampler([[5, END]]), Store(kept)
    groups = collect(sampler, store=store)
    assert groups[2].rollouts[1] is kept
    assert len(sampler.requests) == 11
    assert len(store.added) == 11
    assert kept not in store.added


def test_single_turn_environment() -> None:
    environment = SingleTurn((1, 2, 3), lambda ids: "/".join(map(str, ids)))
    groups = collect(
        FakeSampler([[4, END]]),
        lambda prompt, index: environment,
        prompts=PROMPTS[:1],
        settings=replace(SETTINGS, group_size=1),
    )
    rollout = groups[0].rollouts[0]
    assert flat(rollout).token_ids == (1, 2, 3, 4, END)
    assert rollout.messages == ({"role": "assistant", "content": f"4/{END}"},)
    assert rollout.status == "completed"
