"""Held-out prompts: how often an answer is right, how far the student is from its teacher there, and when to look."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rnow.algorithm.batching import at_loss_tokens, build_samples
from rnow.algorithm.records import SAMPLED, sampled_logprobs
from rnow.protocols import Environment, Rewarder, Sampler, Teacher
from rnow.rewards.score import score_rewards
from rnow.rewards.watch import RewardWatch
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.training.intervals import pass_at_k
from rnow.training.metrics import reward_metrics, rollout_metrics, tool_trouble
from rnow.training.recorder import Recorder
from rnow.training.residency import Part, Residency
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

PASS_AT = (1, 4, 8)
BEFORE, AFTER, TEACHER = "before", "after", "teacher"

Keep = Callable[[Sequence[RolloutGroup], Mapping[str, RewardResult]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """Who answers: a sampler, whose weights it draws with, and the role of the teacher that it is, which answers the rows
    that it judges; None: all rows."""

    sampler: Sampler
    part: Part = "sampler"
    role: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates who answers on fixed prompts with fixed seeds, so that two evaluations differ by the weights only.

    Attributes:
        prompts: held out from training.
        settings: purpose ``eval``; its ``group_size`` is the number of samples per prompt.
        reward_watch: tells of rewards that fail.
        success_reward: a rollout whose reward is at least this much counts as passed.
        judged: whether ``teacher_kl`` can be given: sampler and teacher must see the same temperature.
        pass_at: the k of pass@k to report, where there are enough samples.
        agentic: the student has tools; what it did with them is reported too.
        by_teacher: there are several, and the numbers of each are reported besides.
        warn: told when most tool calls failed.
        finished: told of each rollout as it is done.
    """

    prompts: Sequence[Prompt]
    environments: Callable[[Prompt, int], Environment]
    settings: RolloutSettings
    rewarder: Rewarder
    reward_watch: RewardWatch
    success_reward: float
    judged: bool = True
    pass_at: tuple[int, ...] = PASS_AT
    agentic: bool = False
    by_teacher: bool = False
    warn: Callable[[str], None] = lambda text: None
    finished: Callable[[Prompt, Rollout], None] = lambda prompt, rollout: None

    async def evaluate(
        self,
        answering: Sequence[Answering],
        teacher: Teacher | None,
        gpu: Residency,
        *,
        keep: Keep = lambda groups, rewards: None,
    ) -> dict[str, float]:
        """Metrics of one evaluation: ``pass@k``, rewards, lengths, and ``teacher_kl`` when a teacher is given.

        ``teacher_kl`` is the mean over sampled tokens of sampler logprob minus teacher logprob.

        Args:
            answering: who answers; each prompt by one of them.
            keep: given the rollouts and their rewards.
        """
        groups = await self._answers(answering, gpu)
        rewards = await score_rewards(groups, self.rewarder, poll=self.settings.poll)
        self.reward_watch.look("of an evaluation", rewards)
        keep(groups, rewards)
        metrics = self._pass_at(groups, rewards) | reward_metrics(groups, rewards)
        metrics |= rollout_metrics(groups, agentic=self.agentic)
        if trouble := tool_trouble(groups):
            self.warn(f"in this evaluation {trouble}")
        if teacher is not None and self.judged:
            async with gpu.only("teacher"):
                metrics |= await self._teacher_kl(groups, teacher)
        return metrics

    async def _answers(self, answering: Sequence[Answering], gpu: Residency) -> list[RolloutGroup]:
        """One group for each prompt, in their order, whoever answered it."""
        found: dict[str, RolloutGroup] = {}
        for who in answering:
            asked = [p for p in self.prompts if who.role is None or who.role == p.teacher]
            async with gpu.only(who.part):
                groups = await collect_rollouts(
                    asked,
                    who.sampler,
                    self.environments,
                    self.settings,
                    step=0,
                    finished=self.finished,
                )
            found |= {group.prompt.id: group for group in groups}
        return [found[prompt.id] for prompt in self.prompts]

    def _pass_at(
        self, groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult]
    ) -> dict[str, float]:
        counts = count_passed(groups, rewards, self.success_reward).values()
        return {
            f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
            for k in self.pass_at
            if counts and all(n >= k for n, _ in counts)
        }

    async def _teacher_kl(
        self, groups: Sequence[RolloutGroup], teacher: Teacher
    ) -> dict[str, float]:
        samples = build_samples(groups)
        evidence = await teacher.score(samples, SAMPLED)
        gaps: dict[str, list[float]] = {"teacher_kl": []}
        for sample in samples:
            found = [
                ours - theirs
                for ours, theirs in zip(
                    at_loss_tokens(sample, sample.sampler_logprobs),
                    sampled_logprobs(evidence[sample.id]).tolist(),
                    strict=True,
                )
            ]
            gaps["teacher_kl"] += found
            if self.by_teacher:
                gaps.setdefault(f"teacher_kl/{sample.teacher}", []).extend(found)
        return {name: math.fsum(of) / len(of) if of else math.nan for name, of in gaps.items()}


def count_passed(
    groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult], success_reward: float
) -> dict[str, tuple[int, int]]:
    """Prompt id -> how many of its rollouts were judged, and how many of those passed; prompts with rewards only. One that failed, or
    all of whose rewards did, has 0 for want of a reward, and passes nowhere."""
    return {
        group.prompt.id: (
            len(found),
            sum(reward.worked and reward.total >= success_reward for reward in found),
        )
        for group in groups
        if (found := [rewards[r.id] for r in group.rollouts if r.id in rewards])
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """An evaluation that runs every ``every`` steps. Several evaluators: one per sampling temperature."""

    name: str
    every: int
    evaluators: Sequence[Evaluator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """All evaluations of a run.

    Attributes:
        main: runs before and after training, or None when nothing is held out.
        scheduled: the ``evals`` of the config.
        teachers: those that answer the prompts they judge; empty to leave the teacher out.
    """

    main: Evaluator | None
    scheduled: Sequence[Scheduled]
    sampler: Sampler
    teacher: Teacher | None
    teachers: Sequence[Answering]
    gpu: Residency
    recorder: Recorder

    async def before(self, done: int) -> None:
        """Student and teachers before the first step. A resumed run has them already; what it may lack are those that
        were due after its last step, when the stop came during them."""
        if done > 0:
            await self.after_step(done)
            return
        await self._run(BEFORE, 0, self._student, self.teacher)
        if self.teachers:
            await self._run(TEACHER, 0, self.teachers, None)

    async def after_step(self, step: int) -> None:
        """The scheduled ones that are due."""
        for scheduled in self.scheduled:
            if step % scheduled.every or self._known(scheduled.name, step):
                continue
            self.recorder.stage(f"evaluating {scheduled.name}")
            metrics: dict[str, float] = {}
            for evaluator in scheduled.evaluators:
                metrics |= await evaluator.evaluate(self._student, self.teacher, self.gpu)
            self.recorder.evaluated(scheduled.name, step, metrics)

    async def after(self, step: int) -> None:
        """The student after the last step, unless an earlier attempt got that far."""
        await self._run(AFTER, step, self._student, self.teacher)

    @property
    def _student(self) -> Sequence[Answering]:
        return (Answering(sampler=self.sampler),)

    def _known(self, name: str, step: int) -> bool:
        return any((name, step) == (r["name"], r["step"]) for r in self.recorder.evaluations())

    async def _run(
        self,
        name: str,
        step: int,
        answering: Sequence[Answering],
        teacher: Teacher | None,
    ) -> None:
        if self.main is None or self._known(name, step):
            return
        self.recorder.stage(f"evaluating: {name}")
        keep = partial(self.recorder.answered, name, step)
        metrics = await self.main.evaluate(answering, teacher, self.gpu, keep=keep)
        self.recorder.evaluated(name, step, metrics)
