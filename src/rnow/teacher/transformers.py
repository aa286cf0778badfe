"""A HuggingFace teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from rnow import progress
from rnow.algorithm.batching import pad, plan_micro_batches
from rnow.algorithm.head import selected_logprobs
from rnow.algorithm.records import (
    SAMPLED,
    Evidence,
    HiddenEvidence,
    PaddedTokens,
    SampledEvidence,
    TeacherNeeds,
    TopKEvidence,
    sampled_logprobs,
)
from rnow.algorithm.topk import top_logprobs
from rnow.models.loading import CausalLM, out_of_memory, ran_out_of_memory
from rnow.models.offload import Offload
from rnow.models.scoring import default_micro_batch_tokens, hidden_rows
from rnow.types import Sample

T = TypeVar("T")


class TransformersTeacher:
    """Scores the exact token ids the student sampled.

    Only rows that predict a sampled token go through the head, a chunk at a time: no [tokens, vocabulary] tensor exists.

    Args:
        lm: the teacher, frozen.
        temperature: the student's sampling temperature; both models' distributions are tempered alike, so that a
            teacher equal to the student gives a KL of 0.
        micro_batch_tokens: padded tokens per forward pass; chosen from the device when None. An int8 model scores one
            sample at a time.
        role: whose model it is; named in evidence that its head reads.
        head_stays: keep the head where it is while the rest sleeps: the update reads it.
        poll: called before each forward pass; may raise to stop.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        temperature: float = 1.0,
        micro_batch_tokens: int | None = None,
        role: str = "teacher",
        head_stays: bool = False,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm = lm
        self._role = role
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens or default_micro_batch_tokens(lm)
        if getattr(lm.model, "is_loaded_in_8bit", False):
            # LLM.int8 picks its outlier columns over all rows of a batch: a score would depend on who else is in it.
            self._micro_batch_tokens = 1
        self._poll = poll
        self._offload = Offload(
            frozen=lm.tensors,
            stays=lambda: lm.head.tensors if head_stays else (),
            what="the teacher",
        )

    async def score(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> Mapping[str, Evidence]:
        """What is asked about the loss tokens of each sample, keyed by sample id."""
        return self.score_now(samples, needs)

    @torch.inference_mode()
    def score_now(
        self, samples: Sequence[Sample], needs: TeacherNeeds = SAMPLED
    ) -> dict[str, Evidence]:
        """``score`` for callers without an event loop."""
        batches = [
            [samples[index] for index in indices]
            for indices in plan_micro_batches(
                [len(sample.token_ids) for sample in samples], self._micro_batch_tokens
            )
        ]
        if self.lm.layers is not None:  # which pass by once for all of them
            return self._score_or_halve(batches, needs)
        evidence: dict[str, Evidence] = {}
        for batch in batches:
            progress.moved()
            self._poll()
            evidence.update(self._score_or_halve([batch], needs))
        return evidence

    def _score_or_halve(
        self, batches: Sequence[Sequence[Sample]], needs: TeacherNeeds
    ) -> dict[str, Evidence]:
        """Score batches together, or where memory is too small for that, one half of them after the other."""
        if not batches:
            return {}
        try:
            return self._score_micro_batches(batches, needs)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if len(batches) == len(batches[0]) == 1:
                tokens = len(batches[0][0].token_ids)
                raise out_of_memory("teacher scoring", tokens, error) from error
        torch.cuda.empty_cache()
        first, second = (
            _halves(batches) if len(batches) > 1 else ([half] for half in _halves(batches[0]))
        )
        return self._score_or_halve(first, needs) | self._score_or_halve(second, needs)

    async def sleep(self) -> None:
        """Move the weights to main memory, quantised ones as they are."""
        self._offload.sleep()

    async def wake(self) -> None:
        """Move them back, bit for bit. Does nothing when awake.

        Raises:
            RnowError: the card has no room.
        """
        self._offload.wake()

    async def compute_logprobs_async(self, token_ids: Sequence[int]) -> list[float | None]:
        """Log-probability of every given token in its context; the first has none, so its entry is None."""
        return self.compute_logprobs(token_ids)

    def compute_logprobs(self, token_ids: Sequence[int]) -> list[float | None]:
        """``compute_logprobs_async`` for callers without an event loop.

        Raises:
            ValueError: no tokens, or an id the tokenizer cannot produce.
        """
        if not token_ids:
            raise ValueError("token_ids is empty")
        highest = self.lm.head.vocabulary
        if bad := [token for token in token_ids if not 0 <= token < highest]:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary of {highest} ids")
        count = len(token_ids)
        sample = Sample(
            id="given",
            dataset="given",
            token_ids=tuple(token_ids),
            loss_mask=(False, *[True] * (count - 1)),
            sampler_logprobs=(0.0,) * count,
        )
        return [None, *sampled_logprobs(self.score_now([sample])["given"]).tolist()]

    def _score_micro_batches(
        self, batches: Sequence[Sequence[Sample]], needs: TeacherNeeds
    ) -> dict[str, Evidence]:
        """All bodies first: where the layers are streamed they pass by once."""
        padded = [pad(batch, self.lm.device) for batch in batches]
        hidden = self.lm.run(
            [partial(hidden_rows, self.lm, tokens) for tokens in padded], self._poll
        )
        evidence: dict[str, Evidence] = {}
        for rows, tokens in zip(hidden, padded, strict=True):
            progress.moved()
            found = self._evidence(rows, tokens, needs)
            evidence.update(zip(tokens.sample_ids, found, strict=True))
        return evidence

    def _evidence(
        self, hidden: Tensor, tokens: PaddedTokens, needs: TeacherNeeds
    ) -> Iterator[Evidence]:
        """One per sample of ``tokens``. ``hidden``: ``[R, H]``, the states that predict their loss tokens."""

        def split(rows: Tensor) -> Sequence[Tensor]:
            return rows.cpu().split(list(tokens.counts))

        if needs.hidden:
            for rows in split(hidden):
                yield HiddenEvidence(teacher_hidden=rows, teacher=self._role)
            return
        head, targets = self.lm.head, tokens.targets.to(self.lm.head.weight.device)
        if not needs.top_k:
            scored = selected_logprobs(hidden, head, targets, temperature=self._temperature)
            for values in split(scored.logprobs.float()):
                yield SampledEvidence(teacher_logprobs=values)
            return
        best = top_logprobs(hidden, head, targets, needs.top_k, temperature=self._temperature)
        parts = (split(best.selected.float()), split(best.ids), split(best.logprobs.float()))
        for selected, ids, logprobs in zip(*parts, strict=True):
            yield TopKEvidence(teacher_logprobs=selected, ids=ids, logprobs=logprobs)


def _halves(items: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    middle = len(items) // 2
    return items[:middle], items[middle:]
