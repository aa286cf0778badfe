"""The whole program on one screen: what a run does, and what one step of it does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rnow.algorithm.batching import build_batch, build_samples, build_training_samples
from rnow.algorithm.records import StepData, TeacherNeeds
from rnow.protocols import Environment, Policy, Rewarder, Sampler, Teacher
from rnow.rewards.score import score_rewards
from rnow.rewards.watch import RewardWatch
from rnow.rollout.collect import RolloutSettings, RolloutStore, collect_rollouts
from rnow.training.recorder import Recorder
from rnow.training.residency import Residency, StageClock
from rnow.training.saver import Saver
from rnow.training.scoring import Scoring
from rnow.types import Prompt, RewardResult, RolloutGroup


class Source(Protocol):
    """Where the samples of a step come from."""

    async def batch(self, step: int, clock: StageClock) -> StepData:
        """What step ``step`` (from 1) trains on, each stage timed by ``clock``."""
        ...


class Schedule(Protocol):
    """The evaluations of a run, each where it is due."""

    async def before(self, done: int) -> None: ...

    async def after_step(self, step: int) -> None: ...

    async def after(self, step: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a run is made of. Steps count from 1; the policy after step n has version n."""

    num_steps: int
    source: Source
    policy: Policy
    sampler: Sampler
    gpu: Residency
    evaluations: Schedule
    recorder: Recorder
    saver: Saver


async def train(parts: Parts, done: int) -> None:
    """Train from ``done`` finished steps to the last. A stop request, or any fault that ends the run, saves
    first and is raised on."""
    async with parts.gpu.only("trainer"):
        parts.sampler.load_policy(parts.policy.adapter(), version=done)
    try:
        await parts.evaluations.before(done)
        for step in range(done + 1, parts.num_steps + 1):
            await train_step(parts, step)
            done = step
            parts.saver.after_step(step)
            parts.recorder.end_if_idle()
            await parts.evaluations.after_step(step)
        parts.saver.save(done)
        parts.recorder.end_if_untrained(parts.policy.updates)
        await parts.evaluations.after(done)
    except Exception:
        parts.saver.rescue(done)
        raise


async def train_step(parts: Parts, step: int) -> None:
    """One batch, from its source to the new adapter."""
    clock = parts.recorder.clock()
    data = await parts.source.batch(step, clock)
    async with parts.gpu.only("trainer", clock):
        with clock.stage("update"):
            update = parts.policy.update(build_batch(data.training))
        with clock.stage("sync"):
            parts.sampler.load_policy(parts.policy.adapter(), version=step)
    parts.recorder.record(step, data, update, clock, parts.saver.last_good)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What a source may ask for the samples of a step, once everything is loaded. ``needs``: what the objective asks of the
    teacher; ``scores_early``: see ``Scoring``."""

    environments: Callable[[Prompt, int], Environment]
    settings: RolloutSettings
    journal: Callable[[int], RolloutStore]
    sampler: Sampler
    rewarder: Rewarder
    reward_watch: RewardWatch
    teacher: Teacher | None
    needs: TeacherNeeds
    gpu: Residency
    scores_early: bool = False


def nothing(groups: Sequence[RolloutGroup], advantages: Mapping[str, float]) -> Collection[str]:
    """No rollout is left out: from those, too, whose rewards say nothing something else is learned."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicy:
    """A ``Source``: the student answers the step's prompts, rewards judge its answers and the teacher its tokens. ``left_out``:
    ids of the rollouts that are not trained on, by the advantages of their groups."""

    prompts_of: Callable[[int], Sequence[Prompt]]
    advantages: Callable[[Sequence[RolloutGroup], Mapping[str, RewardResult]], Mapping[str, float]]
    workers: Workers
    left_out: Callable[[Sequence[RolloutGroup], Mapping[str, float]], Collection[str]] = nothing

    async def batch(self, step: int, clock: StageClock) -> StepData:
        """See ``Source.batch``."""
        at, gpu, poll = self.workers, self.workers.gpu, self.workers.settings.poll
        async with Scoring(at.teacher, at.needs, early=at.scores_early) as scoring:
            async with gpu.only("sampler", clock):
                with clock.stage("rollout"):
                    prompts, store = self.prompts_of(step), at.journal(step)
                    groups = await collect_rollouts(
                        prompts,
                        at.sampler,
                        at.environments,
                        at.settings,
                        step=step,
                        store=store,
                        finished=scoring.finished,
                    )
            with clock.stage("reward"):
                # An answer that is cut by the horizon is none that a reward could judge.
                judged = groups if at.settings.horizon is None else []
                rewards = await score_rewards(judged, at.rewarder, poll=poll)
                at.reward_watch.step(step, rewards)
                advantages = self.advantages(groups, rewards)
                answered, left_out = build_samples(groups), self.left_out(groups, advantages)
                samples = [sample for sample in answered if sample.id not in left_out]
            async with gpu.only("teacher", clock):
                with clock.stage("teacher"):
                    evidence = await scoring.evidence(samples)
                    training = build_training_samples(samples, advantages, evidence)
        return StepData(
            training=training,
            groups=groups,
            rewards=rewards,
            left_out=len(answered) - len(samples),
        )
