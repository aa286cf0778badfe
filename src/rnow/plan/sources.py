"""Config -> where the samples of a run come from. Which source a config asks for is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rnow.algorithm.advantages import rollout_advantages, without_signal
from rnow.config import Config
from rnow.config.estimator import drops_equal_groups
from rnow.project.project import Project
from rnow.training.loop import OnPolicy, Source, Workers, nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What is known of a source before anything is loaded.

    Attributes:
        num_steps: of the run.
        content_hash: of what it trains on; another one refuses a resume.
        summary: what it trains on, for the header of a run.
        open: makes the source, once everything is loaded.
    """

    num_steps: int
    content_hash: str
    summary: str
    open: Callable[[Workers], Source]


def plan_source(config: Config, project: Project) -> SourcePlan:
    """The source of the config: the student's own answers to the prompts of the dataset.

    Raises:
        DataError: a batch is larger than the dataset.
    """
    data, trainer, algorithm = config.data, config.trainer, config.algorithm
    dataset = project.dataset
    steps = dataset.num_steps(data.batch_size, trainer.num_epochs)
    steps = min(steps, trainer.max_steps or steps)
    prompts_of = partial(dataset.batch, batch_size=data.batch_size, seed=config.seed)
    advantages = partial(
        rollout_advantages, estimator=algorithm.adv_estimator, scale=algorithm.scale_rewards
    )
    left_out = without_signal if drops_equal_groups(config) else nothing
    return SourcePlan(
        num_steps=steps,
        content_hash=dataset.content_hash,
        summary=f"{len(dataset.prompts)} prompts, {data.batch_size} x {data.group_size} rollouts per step, {steps} steps",
        open=lambda workers: OnPolicy(
            prompts_of=prompts_of, advantages=advantages, left_out=left_out, workers=workers
        ),
    )
