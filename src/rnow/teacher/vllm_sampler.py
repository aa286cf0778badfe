"""Answering with a served teacher: what ``evaluation.teacher`` compares the student with."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from rnow.errors import ModelError
from rnow.serving.client import Generated
from rnow.serving.http import BadAnswer
from rnow.teacher.served import ServedTeacher
from rnow.types import Adapter, Completion, SamplingParams

MAX_BIASED = 1024
"""How many ids vLLM lets a request bias."""

_BIAS = -100.0  # the least that vLLM takes: e^-100 of the weight is left


class VllmTeacherSampler:
    """A Sampler over a teacher's vLLM server. It draws from the teacher itself; there is no adapter to load.

    Padding ids are biased out of the distribution. The log-probabilities are those of the server's ``logprobs_mode``; of a
    server that rnow did not start they may be those from before temperature and bias.

    Args:
        vocabulary: how many ids the student's tokenizer can produce.
        padding: the ids above them that the teacher's head has; they are never drawn.

    Raises:
        ModelError: more padding ids than a request can bias, or a server of another kind.
    """

    def __init__(self, teacher: ServedTeacher, *, vocabulary: int, padding: Sequence[int]) -> None:
        if not teacher.answers:
            raise ModelError(
                "only a vLLM server is asked for answers, with token ids in and out",
                where="teacher.url",
                fix="serve the teacher with vLLM, or load it here: remove teacher.url",
            )
        if len(padding) > MAX_BIASED:
            raise ModelError(
                f"the teacher has {len(padding)} ids that no tokenizer produces, and vLLM can leave out {MAX_BIASED}",
                where="teacher.backend",
                fix="set teacher.backend: transformers",
            )
        self._teacher = teacher
        self._vocabulary = vocabulary
        self._bias = dict.fromkeys(padding, _BIAS)

    def live_rollout(self) -> AbstractContextManager[None]:
        """See ``Sampler.live_rollout``. vLLM batches by itself, so there is nothing to hold."""
        return nullcontext()

    def load_policy(self, adapter: Adapter, *, version: int) -> None:
        """Not for a teacher.

        Raises:
            TypeError: always.
        """
        raise TypeError("a teacher is sampled as it is; it takes no adapter")

    async def complete(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, seed: int
    ) -> Completion:
        """See ``Sampler.complete``. The version is 0.

        Raises:
            ServerDown: no answer, after retries and the restart that a managed teacher has.
            Refused: the server does not take the request (a prompt as long as its window, a temperature above 2).
            BadAnswer: it answered with something that cannot be right.
        """

        async def draw() -> Generated:
            client, model = await self._teacher.connect()
            return await client.complete(
                prompt_token_ids, params, seed, model=model, logit_bias=self._bias
            )

        drawn = await self._teacher.surviving(draw)
        if max(drawn.token_ids) >= self._vocabulary:
            raise BadAnswer(
                f"the teacher drew id {max(drawn.token_ids)}, which no tokenizer produces"
            )
        # A stop id at the very last token is a stop, whatever vLLM calls it.
        stopped = drawn.token_ids[-1] in params.stop_token_ids
        return Completion(
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            finish_reason="stop" if stopped else drawn.finish_reason,
            policy_version=0,
        )
