"""A HuggingFace teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from rnow.algorithm.batching import collate, plan_micro_batches
from rnow.algorithm.head import selected_logprobs
from rnow.algorithm.records import SampledEvidence, TrainingSample
from rnow.models.loading import CausalLM, out_of_memory
from rnow.models.scoring import default_micro_batch_tokens, hidden_rows
from rnow.types import Sample


class TransformersTeacher:
    """Scores the exact token ids the student sampled.

    Only rows that predict a sampled token go through the head, a chunk at a time: no [tokens, vocabulary] tensor exists.

    Args:
        lm: the teacher, frozen.
        temperature: the student's sampling temperature; both models' distributions are tempered alike, so that a
            teacher equal to the student gives a KL of 0.
        micro_batch_tokens: padded tokens per forward pass; chosen from the device when None.
        poll: called before each forward pass; may raise to stop.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        temperature: float = 1.0,
        micro_batch_tokens: int | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm = lm
        self._temperature = temperature
        self._micro_batch_tokens = micro_batch_tokens or default_micro_batch_tokens(lm)
        self._poll = poll

    async def score(self, samples: Sequence[Sample]) -> Mapping[str, SampledEvidence]:
        """Log-probabilities of the loss tokens of each sample, keyed by sample id."""
        return self.score_now(samples)

    @torch.inference_mode()
    def score_now(self, samples: Sequence[Sample]) -> dict[str, SampledEvidence]:
        """``score`` for callers without an event loop."""
        evidence: dict[str, SampledEvidence] = {}
        for indices in plan_micro_batches(
            [len(sample.token_ids) for sample in samples], self._micro_batch_tokens
        ):
            self._poll()
            evidence.update(self._score_or_halve([samples[index] for index in indices]))
        return evidence

    def _score_or_halve(self, samples: Sequence[Sample]) -> dict[str, SampledEvidence]:
        try:
            return self._score_micro_batch(samples)
        except torch.OutOfMemoryError as error:
            if len(samples) == 1:
                raise out_of_memory("teacher scoring", len(samples[0].token_ids), error) from error
        torch.cuda.empty_cache()
        half = len(samples) // 2
        return self._score_or_halve(samples[:half]) | self._score_or_halve(samples[half:])

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

    def _score_micro_batch(self, samples: Sequence[Sample]) -> dict[str, SampledEvidence]:
        micro = collate(
            [TrainingSample(sample=s, reward_advantage=0.0, evidence=None) for s in samples],
            self.lm.device,
        )
        scored = selected_logprobs(
            hidden_rows(self.lm, micro),
            self.lm.head,
            micro.targets.to(self.lm.head.weight.device),
            temperature=self._temperature,
        )
        values = scored.logprobs.float().cpu()
        evidence = {}
        for sample, part in zip(samples, values.split(list(micro.counts)), strict=True):
            aligned = torch.zeros(len(sample.token_ids))
            aligned[torch.tensor(sample.loss_mask)] = part
            evidence[sample.id] = SampledEvidence(teacher_logprobs=aligned)
        return evidence
