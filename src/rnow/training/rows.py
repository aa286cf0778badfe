"""Samples that nobody rolled out: the rows of sft and the documents of midtrain, ready as tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from rnow.algorithm.records import StepData, TrainingSample
from rnow.project.dataset import shuffled
from rnow.training.residency import StageClock
from rnow.types import Adapter, Completion, Sample, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A sequence to train on, five bytes a token: a run holds all of its rows.

    Attributes:
        id: of the row's prompt and the sequence in it, as a rollout's.
        loss_mask: one byte a token, 1 where it is a loss token.
    """

    id: str
    dataset: str
    token_ids: array[int]
    loss_mask: bytes

    @classmethod
    def of(
        cls, id: str, dataset: str, token_ids: Sequence[int], loss_mask: Sequence[bool]
    ) -> TokenRow:
        """A row of these tokens."""
        return cls(
            id=id, dataset=dataset, token_ids=array("i", token_ids), loss_mask=bytes(loss_mask)
        )

    @property
    def loss_tokens(self) -> int:
        """How many tokens are trained on."""
        return sum(self.loss_mask)

    def sample(self) -> Sample:
        """As the update takes it. Nobody sampled it: its sampler's log-probabilities are 0, and nothing reads them."""
        return Sample(
            id=self.id,
            dataset=self.dataset,
            token_ids=tuple(self.token_ids),
            loss_mask=tuple(map(bool, self.loss_mask)),
            sampler_logprobs=(0.0,) * len(self.token_ids),
        )


@dataclass(slots=True, kw_only=True)
class RowSource:
    """A ``Source``: each epoch is all rows once, in an order of its own, and its last step takes what is left. Which rows a step
    takes depends on its number alone, so that a resumed run needs no cursor."""

    rows: Sequence[TokenRow]
    batch_size: int
    seed: int
    shuffle: bool
    _order: tuple[int, Sequence[int]] | None = field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return -(-len(self.rows) // self.batch_size)

    async def batch(self, step: int, clock: StageClock) -> StepData:
        """See ``Source.batch``."""
        with clock.stage("batch"):
            training = [
                TrainingSample(sample=row.sample(), reward_advantage=0.0, evidence=None)
                for row in self._rows_of(step)
            ]
        return StepData(training=training)

    def _rows_of(self, step: int) -> list[TokenRow]:
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            everything: Sequence[int] = range(len(self.rows))
            if self.shuffle:
                everything = shuffled([row.id for row in self.rows], epoch=epoch, seed=self.seed)
            self._order = epoch, everything
        start = index * self.batch_size
        return [self.rows[at] for at in self._order[1][start : start + self.batch_size]]


class NoSampler:
    """A ``Sampler`` for runs in which nothing is sampled: new weights are nobody's concern but the trainer's."""

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        """See ``Sampler.complete``."""
        raise RuntimeError("nothing is sampled in a run that learns from rows")

    def live_rollout(self) -> AbstractContextManager[None]:
        """See ``Sampler.live_rollout``."""
        return nullcontext()

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """See ``Sampler.load_policy``."""
