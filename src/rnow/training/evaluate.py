"""Held-out prompts: how often an answer is right, and how far the student is from its teacher there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rnow.protocols import Environment, Rewarder, Sampler, Teacher
from rnow.rewards.score import score_rewards
from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.rollout.samples import build_samples
from rnow.training.metrics import reward_metrics, rollout_metrics, tool_trouble
from rnow.training.residency import Part, Residency
from rnow.types import Prompt, ScoredGroup

PASS_AT = (1, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Evaluates a sampler on fixed prompts with fixed seeds, so that two evaluations differ by the weights only.

    Attributes:
        prompts: held out from training.
        settings: purpose ``eval``; its ``group_size`` is the number of samples per prompt.
        success_reward: a rollout whose reward is at least this much counts as passed.
        judged: whether ``teacher_kl`` can be given: sampler and teacher must see the same temperature.
        pass_at: the k of pass@k to report, where there are enough samples.
        agentic: the student has tools; what it did with them is reported too.
        warn: told when most tool calls failed.
    """

    prompts: Sequence[Prompt]
    environments: Callable[[Prompt, int], Environment]
    settings: RolloutSettings
    rewarder: Rewarder
    success_reward: float
    judged: bool = True
    pass_at: tuple[int, ...] = PASS_AT
    agentic: bool = False
    warn: Callable[[str], None] = lambda text: None

    async def evaluate(
        self,
        sampler: Sampler,
        teacher: Teacher | None,
        gpu: Residency,
        *,
        answering: Part = "sampler",
    ) -> dict[str, float]:
        """Metrics of one evaluation: ``pass@k``, rewards, lengths, and ``teacher_kl`` when a teacher is given.

        ``teacher_kl`` is the mean over sampled tokens of sampler logprob minus teacher logprob.

        Args:
            answering: whose weights ``sampler`` draws with.
        """
        async with gpu.only(answering):
            groups = await collect_rollouts(
                self.prompts, sampler, self.environments, self.settings, step=0
            )
        scored = await score_rewards(groups, self.rewarder, poll=self.settings.poll)
        metrics = self._pass_at(scored) | reward_metrics(scored)
        metrics |= rollout_metrics(scored, agentic=self.agentic)
        if trouble := tool_trouble(scored):
            self.warn(f"in this evaluation {trouble}")
        if teacher is not None and self.judged:
            async with gpu.only("teacher"):
                metrics["teacher_kl"] = await self._teacher_kl(scored, teacher)
        return metrics

    def _pass_at(self, scored: Sequence[ScoredGroup]) -> dict[str, float]:
        counts = [
            (len(results), sum(result.total >= self.success_reward for result in results))
            for group in scored
            if (results := [item.reward for item in group.rollouts if item.reward is not None])
        ]
        return {
            f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)
            for k in self.pass_at
            if counts and all(n >= k for n, _ in counts)
        }

    async def _teacher_kl(self, scored: Sequence[ScoredGroup], teacher: Teacher) -> float:
        samples = build_samples(scored)
        evidence = await teacher.score(samples)
        gaps = []
        for sample in samples:
            judged = evidence[sample.id].teacher_logprobs.tolist()
            gaps += [
                ours - theirs
                for ours, theirs, on in zip(
                    sample.sampler_logprobs, judged, sample.loss_mask, strict=True
                )
                if on
            ]
        return math.fsum(gaps) / len(gaps) if gaps else math.nan


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, from c right ones among n: 1 - C(n-c, k) / C(n, k)
    (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
