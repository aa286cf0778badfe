"""Evaluation of held-out prompts: pass@k, and the distance to the teacher."""

from __future__ import annotations

import asyncio
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.fakes import FakeEnvironment, FakeRewarder, FakeSampler, FakeTeacher

from rnow.rewards.watch import RewardWatch
from rnow.rollout.collect import RolloutSettings
from rnow.training.evaluations import Answering, Evaluator, count_passed
from rnow.training.intervals import pass_at_k
from rnow.training.residency import Residency
from rnow.types import Prompt, RewardResult, Rollout

END = 9
PROMPTS = [
    Prompt(id=f"dataset_0/{row}", dataset="dataset_0", row=row, messages=()) for row in range(3)
]
SETTINGS = RolloutSettings(
    group_size=4,
    window=64,
    max_tokens=8,
    stop_token_ids=(END,),
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    run_seed=0,
    purpose="eval",
)


def evaluate(
    rewarder: FakeRewarder, sampler: FakeSampler | None = None, teacher: Any = None, **changes: Any
) -> dict[str, float]:
    fields: dict[str, Any] = {
        "prompts": PROMPTS,
        "environments": lambda prompt, index: FakeEnvironment((1, 2)),
        "settings": SETTINGS,
        "rewarder": rewarder,
        "reward_watch": RewardWatch(pytest.fail, teaching=False),
        "success_reward": 1.0,
    }
    kept = {"keep": changes.pop("keep")} if "keep" in changes else {}
    evaluator = Evaluator(**fields | changes)
    drawn = sampler or FakeSampler([[4, END]])
    answering = [Answering(sampler=drawn)]
    return asyncio.run(evaluator.evaluate(answering, teacher, Residency(), **kept))


@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n: int, k: int) -> None:
    for right in range(n + 1):
        if k > n:
            continue
        marks = [True] * right + [False] * (n - right)
        subsets = list(itertools.combinations(marks, k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, right, k) == pytest.approx(share)


def test_pass_at_k_is_averaged_over_prompts() -> None:
    right = {0: 4, 1: 1, 2: 0}

    def reward(prompt: Prompt, rollout: Rollout) -> float:
        return float(rollout.index < right[prompt.row])

    metrics = evaluate(FakeRewarder(reward))
    assert metrics["pass@1"] == pytest.approx((1 + 0.25 + 0) / 3)
    assert metrics["pass@4"] == pytest.approx((1 + 1 + 0) / 3)
    assert "pass@8" not in metrics, "four samples cannot tell"
    assert metrics["reward/mean"] == pytest.approx(5 / 12)


def test_success_is_a_reward_of_at_least_the_bar() -> None:
    assert evaluate(FakeRewarder(0.5), success_reward=0.5)["pass@1"] == 1.0
    assert evaluate(FakeRewarder(0.49), success_reward=0.5)["pass@1"] == 0.0


def test_what_passed_is_counted_by_prompt() -> None:
    kept: dict[str, tuple[int, int]] = {}
    right = {0: 4, 1: 1}

    def reward(prompt: Prompt, rollout: Rollout) -> float | None:
        return None if prompt.row == 2 else float(rollout.index < right[prompt.row])

    def keep(groups: Any, rewards: Any) -> None:
        kept.update(count_passed(groups, rewards, 1.0))

    evaluate(FakeRewarder(reward), keep=keep)
    assert kept == {"dataset_0/0": (4, 4), "dataset_0/1": (4, 1)}, "the third names no reward"


def test_a_zero_for_want_of_a_reward_passes_nowhere() -> None:
    """Where rewards are penalties an answer may pass with 0."""
    results = [
        RewardResult(total=0.0, breakdown={"right": 0.0}),
        RewardResult(total=0.0, errors={"rollout": "it failed"}),
        RewardResult(total=0.0, breakdown={"right": 0.0}, errors={"right": "KeyError"}),
        RewardResult(total=-1.0, breakdown={"right": -1.0}),
    ]
    kept: dict[str, tuple[int, int]] = {}

    def keep(groups: Any, rewards: Any) -> None:
        found = {r.id: results[r.index] for group in groups for r in group.rollouts}
        kept.update(count_passed(groups, found, 0.0))

    evaluate(FakeRewarder(1.0), keep=keep)
    assert {*kept.values()} == {(4, 1)}


def test_each_rollout_is_told_as_it_is_done() -> None:
    done: list[str] = []
    evaluate(FakeRewarder(None), finished=lambda prompt, rollout: done.append(rollout.id))
    assert sorted(done) == [f"dataset_0/{row}#{index}" for row in range(3) for index in range(4)]


def test_prompts_without_rewards_have_no_pass_rate() -> None:
    metrics = evaluate(FakeRewarder(None))
    assert not any(name.startswith(("pass@", "reward/")) for name in metrics)
    assert metrics["completions/mean_length"] == 2.0


def test_teacher_kl_is_the_mean_gap_over_sampled_tokens() -> None:
    replies = [[4, END], [4, 4, 4, END]]
    teacher = FakeTeacher(lambda sample, position: -1.0 - position)
    metrics = evaluate(FakeRewarder(None), FakeSampler(replies, logprob=-0.5), teacher)
    short, long = [0.5 + p for p in (2, 3)], [0.5 + p for p in (2, 3, 4, 5)]
    assert metrics["teacher_kl"] == pytest.approx(sum(6 * short + 6 * long) / 36)


def test_without_a_teacher_there_is_no_teacher_kl() -> None:
    assert "teacher_kl" not in evaluate(FakeRewarder(None))


def test_nothing_usable_is_nan_and_no_crash() -> None:
    metrics = evaluate(
        FakeRewarder(None),
        teacher=FakeTeacher(),
        environments=lambda prompt, index: FakeEnvironment((1,), [OSError("x")]),
    )
    assert math.isnan(metrics["teacher_kl"])
    assert metrics["rollouts/failed_fraction"] == 1.0


def test_two_evaluations_draw_with_the_same_seeds() -> None:
    first, second = FakeSampler([[4, END]]), FakeSampler([[4, END]])
    evaluate(FakeRewarder(None), first)
    evaluate(FakeRewarder(None), second)
    seeds = [request.seed for request in first.requests]
    assert seeds == [request.seed for request in second.requests]
    assert len(set(seeds)) == 12


def test_each_prompt_is_answered_and_judged_by_its_own_teacher() -> None:
    prompts = [replace(p, teacher=f"teacher/{'ab'[p.row % 2]}") for p in PROMPTS]
    samplers = {name: FakeSampler([[token, END]]) for name, token in (("a", 4), ("b", 5))}
    answering = [
        Answering(sampler=sampler, part=f"teacher/{name}", role=f"teacher/{name}")
        for name, sampler in reversed(samplers.items())
    ]
    kept: list[Any] = []
    evaluator = Evaluator(
        prompts=prompts,
        environments=lambda prompt, index: FakeEnvironment((1, 2)),
        settings=SETTINGS,
        rewarder=FakeRewarder(None),
        reward_watch=RewardWatch(pytest.fail, teaching=False),
        success_reward=1.0,
        by_teacher=True,
    )
    teacher = FakeTeacher(
        lambda sample, position: {"teacher/a": -1.5, "teacher/b": -2.5}[str(sample.teacher)]
    )
    metrics = asyncio.run(
        evaluator.evaluate(
            answering, teacher, Residency(), keep=lambda groups, rewards: kept.extend(groups)
        )
    )
    assert [group.prompt.id for group in kept] == [prompt.id for prompt in prompts]
    for group in kept:
        token = 4 if group.prompt.teacher == "teacher/a" else 5
        assert {r.turns[0].completion.token_ids for r in group.rollouts} == {(token, END)}
    assert metrics["teacher_kl/teacher/a"] == pytest.approx(1.0)
    assert metrics["teacher_kl/teacher/b"] == pytest.approx(2.0)
    assert metrics["teacher_kl"] == pytest.approx((2 * 1.0 + 2.0) / 3)
