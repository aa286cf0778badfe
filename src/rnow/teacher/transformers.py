"""A HuggingFace teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rnow import progress
from rnow.algorithm.batching import pad, plan_micro_batches
from rnow.algorithm.head import selected_logprobs
from rnow.algorithm.records import (
    Evidence,
    PaddedTokens,
    SampledEvidence,
    TopKEvidence,
)
from rnow.algorithm.topk import top_logprobs
from rnow.models.loading import CausalLM, out_of_memory, ran_out_of_memory
from rnow.models.offload import Offload, tensors_of
from rnow.models.scoring import default_micro_batch_tokens, hidden_rows
from rnow.types import Sample


class TransformersTeacher:
    """Scores the exact token ids the student sampled.

    Only rows that predict a sampled token go through the head, a chunk at a time: no [tokens, vocabulary] tensor exists.

    Args:
        lm: the teacher, frozen.
        temperature: the student's sampling temperature; both models' distributions are tempered alike, so that a
            teacher equal to the student gives a KL of 0.
        micro_batch_tokens: padded tokens per forward pass; chosen from the device when None. An int8 model scores one
            sample at a time.
        top_k: also list so many of the likeliest tokens at each position (``TopKEvidence``); 0: the sampled token alone.
        poll: called before each forward pass; may raise to stop.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        temperature: float = 1.0,
        micro_batch_tokens: int | None = None,
        top_k: int = 0,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm = lm
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens or default_micro_batch_tokens(lm)
        if getattr(lm.model, "is_loaded_in_8bit", False):
            # LLM.int8 picks its outlier columns over all rows of a batch: a score would depend on who else is in it.
            self._micro_batch_tokens = 1
        self._top_k = top_k
        self._poll = poll
        self._offload = Offload(frozen=lambda: tensors_of(lm.model), what="the teacher")

    async def score(self, samples: Sequence[Sample]) -> Mapping[str, Evidence]:
        """Log-probabilities of the loss tokens of each sample, keyed by sample id."""
        return self.score_now(samples)

    @torch.inference_mode()
    def score_now(self, samples: Sequence[Sample]) -> dict[str, Evidence]:
        """``score`` for callers without an event loop."""
        evidence: dict[str, Evidence] = {}
        for indices in plan_micro_batches(
            [len(sample.token_ids) for sample in samples], self._micro_batch_tokens
        ):
            progress.moved()
            self._poll()
            evidence.update(self._score_or_halve([samples[index] for index in indices]))
        return evidence

    def _score_or_halve(self, samples: Sequence[Sample]) -> dict[str, Evidence]:
        try:
            return self._score_micro_batch(samples)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if len(samples) == 1:
                raise out_of_memory("teacher scoring", len(samples[0].token_ids), error) from error
        torch.cuda.empty_cache()
        half = len(samples) // 2
        return self._score_or_halve(samples[:half]) | self._score_or_halve(samples[half:])

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
        scored = self.score_now([sample])["given"].teacher_logprobs
        return [None, *scored[1:].tolist()]

    def _score_micro_batch(self, samples: Sequence[Sample]) -> dict[str, Evidence]:
        tokens = pad(samples, self.lm.device)
        targets = tokens.targets.to(self.lm.head.weight.device)
        if self._top_k:
            return self._top_evidence(samples, tokens, targets)
        scored = selected_logprobs(
            hidden_rows(self.lm, tokens), self.lm.head, targets, temperature=self._temperature
        )
        values = scored.logprobs.float().cpu().split(list(tokens.counts))
        return {
            sample.id: SampledEvidence(teacher_logprobs=_aligned(sample, part))
            for sample, part in zip(samples, values, strict=True)
        }

    def _top_evidence(
        self, samples: Sequence[Sample], tokens: PaddedTokens, targets: Tensor
    ) -> dict[str, Evidence]:
        found = top_logprobs(
            hidden_rows(self.lm, tokens),
            self.lm.head,
            targets,
            self._top_k,
            temperature=self._temperature,
        )
        counts = list(tokens.counts)
        parts = zip(
            samples,
            found.selected.float().cpu().split(counts),
            found.ids.cpu().split(counts),
            found.logprobs.float().cpu().split(counts),
            strict=True,
        )
        return {
            sample.id: TopKEvidence(
                teacher_logprobs=_aligned(sample, selected),
                ids=_aligned(sample, ids),
                logprobs=_aligned(sample, logprobs),
            )
            for sample, selected, ids, logprobs in parts
        }


def _aligned(sample: Sample, rows: Tensor) -> Tensor:
    """Values of the loss tokens ``[loss tokens, ...]`` put at their positions ``[T, ...]``, 0 elsewhere."""
    aligned = rows.new_zeros(len(sample.token_ids), *rows.shape[1:])
    aligned[torch.tensor(sample.loss_mask)] = rows
    return aligned
