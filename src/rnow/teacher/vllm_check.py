"""What a served teacher is asked before it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rnow.errors import ModelError
from rnow.protocols import Tokenizer
from rnow.serving.client import MAX_LOGPROBS, BadAnswer, Refused, ServedModel, VllmClient

REPEAT_TOLERANCE = 0.5
"""Nats by which any token of the same request may differ when asked twice. On a server that others use too, rounding in bfloat16
goes with what else is in the batch, and an unlikely token can move by a tenth; another model is further off somewhere."""

_PROBE = "The quick brown fox: 3.14 + 27 = 30.14\n\tdef f(x):  return x ** 2  # naïve café, 東京, Привет 🙂"
_PROBE_TOKENS = 64
_SPREAD_IDS = 512
_MAX_PADDING = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCheck:
    """What ``VllmTeacher.check`` found.

    Attributes:
        padding_mass: mean probability of the ids that no tokenizer produces (at most 1,024 are counted), over a few contexts.
            A served teacher cannot leave them out of its softmax, so its log-probabilities are too low by about this much.
            0 without such ids, None where the server is too old to be asked.
        warnings: what could not be checked.
    """

    padding_mass: float | None
    warnings: tuple[str, ...]


async def find_served_model(client: VllmClient, wanted: str | None, where: str) -> ServedModel:
    """The model ``wanted`` on the server, or its only base model where that is None.

    Raises:
        ModelError: no model fits, or more than one does.
    """
    models = await client.models()
    if wanted is not None:
        for model in models:
            if model.id == wanted:
                return model
    bases = [model for model in models if model.parent is None]
    if wanted is None and len(bases) == 1:
        return bases[0]
    raise ModelError(
        f"the server at {client.url} serves "
        + (f"no model '{wanted}'" if wanted else f"{len(bases)} models"),
        title="Another teacher is served",
        where=where,
        details=[f"served: {model.id}" for model in models[:10]],
        fix="set teacher.path to one of the served names",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacherChecks:
    """The questions, to one model on one server.

    Attributes:
        where: the setting that names the server.
        top_k: how many of the likeliest tokens will be asked for.
    """

    client: VllmClient
    served: ServedModel
    where: str
    top_k: int

    async def run(self, tokenizer: Tokenizer, vocabulary: int, longest: int | None) -> TeacherCheck:
        """All of them; arguments as of ``VllmTeacher.check``.

        Raises:
            ServerDown, ModelError: no answer; another tokenizer; log-probabilities that cannot be right, or that change when
                asked again; sequences too long for it.
        """
        self._check_window(longest)
        spread = range(0, vocabulary, max(1, vocabulary // _SPREAD_IDS))
        controls = sorted(tokenizer.get_added_vocab())
        probes = [_PROBE, "".join(controls), tokenizer.decode(list(spread))]
        warnings = await self._compare_tokenizers(tokenizer, probes)
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)[:_PROBE_TOKENS]
        if self.served.max_model_len is not None:
            ids = ids[: self.served.max_model_len - 1]
        await self._check_repeat(ids)
        if self.top_k:
            await self._check_top_k(ids)
        mass = await self._padding_mass(ids, vocabulary)
        if mass is None:
            warnings.append(
                "the teacher's server cannot say how much probability it gives to padding ids"
            )
        return TeacherCheck(padding_mass=mass, warnings=tuple(warnings))

    def _check_window(self, longest: int | None) -> None:
        window = self.served.max_model_len
        if longest is not None and window is not None and longest >= window:
            raise ModelError(
                f"the teacher's server takes sequences of up to {window - 1} tokens, the run has up to {longest}",
                where=self.where,
                fix=f"start it with --max-model-len {longest + 1}, or lower rollout.max_context_window to {window - 1}",
            )

    async def _compare_tokenizers(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
        for text in texts:
            if not text:
                continue
            ours = tokenizer.encode(text, add_special_tokens=False)
            try:
                theirs = await self.client.tokenize(text, model=self.served.id)
            except Refused as error:
                if error.status not in (404, 405, 501):
                    raise
                return [
                    "the teacher's server has no /tokenize, so its tokenizer could not be compared with the student's"
                ]
            if ours != theirs:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise ModelError(
                    f"the teacher's server reads text differently from token {at} on",
                    title="Student and teacher tokenizers differ",
                    where=self.where,
                    details=[
                        f"student: {ours[at : at + 5]}",
                        f"teacher: {theirs[at : at + 5]}",
                        f"in:      {text[:80]!r}",
                    ],
                    why="the teacher scores the student's token ids, so every id must mean the same to both",
                    fix="serve a teacher of the student's family",
                )
        return []

    async def _check_repeat(self, ids: Sequence[int]) -> None:
        first = await self.client.prompt_logprobs(ids, model=self.served.id)
        second = await self.client.prompt_logprobs(ids, model=self.served.id)
        gap = max(
            (
                abs(a - b)
                for a, b in zip(first, second, strict=True)
                if a is not None and b is not None
            ),
            default=0.0,
        )
        if gap > REPEAT_TOLERANCE:
            raise BadAnswer(
                f"the server at {self.client.url} gives the same tokens log-probabilities that differ by {gap:.3g} nats",
                why="several models may stand behind one address",
                fix="name a server that serves one model",
            )

    async def _check_top_k(self, ids: Sequence[int]) -> None:
        try:
            await self.client.prompt_top_logprobs(ids, model=self.served.id, top_k=self.top_k)
        except Refused as error:
            error.fix = f"start the server with --max-logprobs {self.top_k}"
            raise

    async def _padding_mass(self, ids: Sequence[int], vocabulary: int) -> float | None:
        """Mean probability of the model's ids at or above ``vocabulary``, after a few prefixes."""
        prefixes = [ids[:length] for length in {1, len(ids) // 2 or 1, len(ids)}]
        mass, rows, size = 0.0, 0, MAX_LOGPROBS
        while rows < _MAX_PADDING:
            wanted = range(vocabulary + rows, vocabulary + rows + size)
            try:
                for prefix in prefixes:
                    found = await self.client.next_logprobs(prefix, wanted, model=self.served.id)
                    if found is None:
                        return None
                    values = torch.tensor(list(found.values()), dtype=torch.float64)
                    mass += values.exp().sum().item() / len(prefixes)
            except Refused as error:
                # Past the last row the server says no: look closer until the end is found.
                if error.status not in (400, 422) or size == 1:
                    break
                size //= 2
                continue
            rows += size
        return mass
