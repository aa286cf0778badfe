"""Config -> where the samples of a run come from. Which source a config asks for is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from rnow.algorithm.advantages import rollout_advantages, without_signal
from rnow.config import Config
from rnow.config.estimator import drops_equal_groups
from rnow.errors import DataError
from rnow.project.dataset import Dataset
from rnow.project.project import Project
from rnow.training.loop import OnPolicy, Source, Workers, nothing
from rnow.training.rows import RowSource, TokenRow
from rnow.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What is known of a source before anything is loaded.

    Attributes:
        num_steps: of the run.
        content_hash: of what it trains on; another one refuses a resume.
        summary: what it trains on, for the header of a run.
        open: makes the source, once everything is loaded; rows need no workers.
    """

    num_steps: int
    content_hash: str
    summary: str
    open: Callable[[Workers | None], Source]


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

    def open_source(workers: Workers | None) -> OnPolicy:
        assert workers is not None, "answers have to be sampled"
        return OnPolicy(
            prompts_of=prompts_of, advantages=advantages, left_out=left_out, workers=workers
        )

    return SourcePlan(
        num_steps=steps,
        content_hash=dataset.content_hash,
        summary=f"{len(dataset.prompts)} prompts, {data.batch_size} x {data.group_size} rollouts per step, {steps} steps",
        open=open_source,
    )


def plan_rows(
    config: Config, dataset: Dataset, rows: Mapping[str, Sequence[TokenRow]]
) -> SourcePlan:
    """The source of sft and midtrain: the rows themselves.

    Args:
        rows: prompt id -> its sequences.

    Raises:
        DataError: a batch is larger than the dataset.
    """
    data, trainer = config.data, config.trainer
    own = rows_of(dataset.prompts, rows)
    noun = "windows of documents" if config.dataset_type == "midtrain" else "rows"
    if len(own) < data.batch_size:
        raise DataError(
            f"data.batch_size is {data.batch_size}, but there are only {len(own)} {noun} to train on",
            title="Batch larger than the dataset",
            where="data.batch_size",
            why="a step takes batch_size different ones",
            fix=f"set data.batch_size to {len(own)} or less, or add rows",
        )
    source = RowSource(rows=own, batch_size=data.batch_size, seed=config.seed, shuffle=data.shuffle)
    steps = source.steps_per_epoch * trainer.num_epochs
    steps = min(steps, trainer.max_steps or steps)
    return SourcePlan(
        num_steps=steps,
        content_hash=dataset.content_hash,
        summary=f"{len(own)} {noun}, {data.batch_size} per step, {steps} steps",
        open=lambda workers: source,
    )


def rows_of(
    prompts: Sequence[Prompt], rows: Mapping[str, Sequence[TokenRow]]
) -> tuple[TokenRow, ...]:
    """The sequences of these prompts, in order."""
    return tuple(chain.from_iterable(rows[prompt.id] for prompt in prompts))
