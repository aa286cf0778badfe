"""The whole program on one screen: what a run does, and what one step of it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rnow.algorithm.batching import build_batch, build_training_samples
from rnow.errors import RnowError
from rnow.protocols import Environment, Policy, Rewarder, Sampler, Teacher
from rnow.rewards.score import score_rewards
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.rollout.samples import build_samples
from rnow.teacher.score import score_with_teacher
from rnow.training.evaluations import Evaluations
from rnow.training.recorder import Recorder
from rnow.training.residency import Residency
from rnow.training.saver import Saver
from rnow.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a run is made of. Steps count from 1; the policy after step n has version n."""

    num_steps: int
    prompts_of: Callable[[int], list[Prompt]]
    environments: Callable[[Prompt, int], Environment]
    settings: RolloutSettings
    sampler: Sampler
    rewarder: Rewarder
    advantages: Callable[[Sequence[ScoredGroup]], Mapping[str, float]]
    teacher: Teacher | None
    policy: Policy
    gpu: Residency
    evaluations: Evaluations
    recorder: Recorder
    saver: Saver


async def train(parts: Parts, done: int) -> None:
    """Train from ``done`` finished steps to the last. A stop request, or a fault that ends the run, saves
    first and is raised on."""
    async with parts.gpu.only("trainer"):
        parts.sampler.load_policy(parts.policy.adapter(), version=done)
    try:
        await parts.evaluations.before(done)
        for step in range(done + 1, parts.num_steps + 1):
            await train_step(parts, step)
            done = step
            parts.saver.after_step(step)
            await parts.evaluations.after_step(step)
        parts.saver.save(done)
        await parts.evaluations.after(done)
    except RnowError:
        parts.saver.rescue(done)
        raise


async def train_step(parts: Parts, step: int) -> None:
    """One batch of prompts, from sampling to the new adapter."""
    gpu, clock = parts.gpu, parts.recorder.clock()
    async with gpu.only("sampler", clock):
        with clock.stage("rollout"):
            groups = await collect_rollouts(
                parts.prompts_of(step),
                parts.sampler,
                parts.environments,
                parts.settings,
                step=step,
                store=parts.saver.journal(step),
            )
    with clock.stage("reward"):
        scored = await score_rewards(groups, parts.rewarder, poll=parts.settings.poll)
        samples = build_samples(scored)
    async with gpu.only("teacher", clock):
        with clock.stage("teacher"):
            evidence = await score_with_teacher(samples, parts.teacher)
    async with gpu.only("trainer", clock):
        with clock.stage("update"):
            training = build_training_samples(samples, parts.advantages(scored), evidence)
            update = parts.policy.update(build_batch(training))
        with clock.stage("sync"):
            parts.sampler.load_policy(parts.policy.adapter(), version=step)
    parts.recorder.record(step, scored, evidence, update, clock)
