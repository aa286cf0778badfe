"""A HuggingFace teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rnow import progress
from rnow.algorithm.batching import pad
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
from rnow.errors import ran_out_of_memory, ran_out_of_threads
from rnow.models.loading import CausalLM, out_of_memory
from rnow.models.offload import Offload
from rnow.models.scoring import hidden_rows, plan_samples, scoring_tokens
from rnow.types import Sample

Pass = tuple[Sequence[Sample], Sequence[int] | None]
"""The samples of one forward pass, and how many of them each row has."""


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
        self._micro_batch_tokens = micro_batch_tokens or scoring_tokens(
            on_gpu=lm.device.type != "cpu"
        )
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
        passes: list[Pass] = [
            ([samples[index] for index in part.indices], part.per_row)
            for part in plan_samples(self.lm, samples, self._micro_batch_tokens)
        ]
        if self.lm.layers is not None:  # which come by once for all of them
            return self._score_or_halve(passes, needs)
        evidence: dict[str, Evidence] = {}
        for one in passes:
            progress.moved()
            self._poll()
            evidence.update(self._score_or_halve([one], needs))
        return evidence

    def _score_or_halve(self, passes: Sequence[Pass], needs: TeacherNeeds) -> dict[str, Evidence]:
        """Score passes together, or where memory is too small for that, or threads too few, one half of them after the other."""
        if not passes:
            return {}
        try:
            return self._score_passes(passes, needs)
        except (RuntimeError, MemoryError) as error:
            short_of_memory = ran_out_of_memory(error)
            if not short_of_memory and (len(passes) == 1 or not ran_out_of_threads(error)):
                raise
            samples, _ = passes[0]
            if len(passes) == len(samples) == 1:
                raise out_of_memory("teacher scoring", len(samples[0].token_ids), error) from error
        torch.cuda.empty_cache()
        evidence: dict[str, Evidence] = {}
        for half in _halves(passes):
            evidence |= self._score_or_halve(half, needs)
        return evidence

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

    def _score_passes(self, passes: Sequence[Pass], needs: TeacherNeeds) -> dict[str, Evidence]:
        """The bodies first, then the heads."""
        padded = [pad(samples, self.lm.device, per_row) for samples, per_row in passes]
        bodies = [partial(hidden_rows, self.lm, tokens) for tokens in padded]
        evidence: dict[str, Evidence] = {}
        for hidden, tokens in zip(self.lm.run(bodies, self._poll), padded, strict=True):
            progress.moved()
            found = self._evidence(hidden, tokens, needs)
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
            scored = selected_logprobs(
                hidden, head, targets, temperature=self._temperature, entropy=False
            )
            for values in split(scored.logprobs.float()):
                yield SampledEvidence(teacher_logprobs=values)
            return
        best = top_logprobs(hidden, head, targets, needs.top_k, temperature=self._temperature)
        parts = (split(best.selected.float()), split(best.ids), split(best.logprobs.float()))
        for selected, ids, logprobs in zip(*parts, strict=True):
            yield TopKEvidence(teacher_logprobs=selected, ids=ids, logprobs=logprobs)


def _halves(passes: Sequence[Pass]) -> Iterator[Sequence[Pass]]:
    """Half of the passes each; of a single one half of its rows, or of the samples of a single row."""
    if len(passes) > 1:
        middle = len(passes) // 2
        yield passes[:middle]
        yield passes[middle:]
        return
    ((samples, per_row),) = passes
    if per_row is None or len(per_row) == 1:
        cut = len(samples) // 2
        yield [(samples[:cut], per_row and [cut])]
        yield [(samples[cut:], per_row and [len(samples) - cut])]
        return
    middle = len(per_row) // 2
    cut = sum(per_row[:middle])
    yield [(samples[:cut], per_row[:middle])]
    yield [(samples[cut:], per_row[middle:])]
