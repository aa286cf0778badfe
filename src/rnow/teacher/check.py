"""What a served teacher is asked before it is believed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from rnow.errors import ModelError
from rnow.protocols import Tokenizer
from rnow.serving.client import MAX_LOGPROBS, VllmClient
from rnow.serving.http import BadAnswer, Refused
from rnow.serving.scoring import FewerListed, ScoringClient, ServedModel

REPEAT_TOLERANCE = 0.5
"""Nats by which any token of the same request may differ when asked again. On a server that others use too, rounding in bfloat16
goes with what else is in the batch, and an unlikely token can move by a tenth; another model is further off somewhere."""

NOISE_WARNING = 0.02
"""Nats per token by which repeats may differ on average without a warning: what is left of a KL near the end of a training."""

REPEATS = 4
"""How many more equal requests, and as many others, are sent at once: replicas behind one address show."""

_PROBE = "The quick brown fox: 3.14 + 27 = 30.14\n\tdef f(x):  return x ** 2  # naïve café, 東京, Привет 🙂"
_PROBE_TOKENS = 64
_SPREAD_IDS = 512
_MAX_PADDING = 1024
_NO_SUCH = frozenset({400, 404, 405, 415, 422, 500, 501})


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCheck:
    """What ``ServedTeacher.check`` found.

    Attributes:
        padding_mass: mean probability of the ids that no tokenizer produces (at most 1,024 are counted), over a few contexts.
            A served teacher cannot leave them out of its softmax, so its log-probabilities are too low by about this much.
            0 without such ids, None where the server cannot be asked.
        noise: mean over the tokens of a probe of the nats by which repeated answers differ.
        summary: what the server can do, in a line.
        warnings: what could not be checked, and what makes its answers worse than they could be.
    """

    padding_mass: float | None
    noise: float
    summary: str
    warnings: tuple[str, ...]


async def list_models(client: ScoringClient) -> list[ServedModel]:
    """What the server says it serves; nothing where it has no such list."""
    try:
        return await client.models()
    except Refused as error:
        if error.status not in (404, 405, 501):
            raise
        return []


def pick_model(
    models: Sequence[ServedModel], wanted: str | None, *, url: str, where: str
) -> ServedModel:
    """The model ``wanted``, or the only base model where that is None.

    Raises:
        ModelError: no model fits, or more than one does.
    """
    if wanted is not None:
        if not models:  # nothing is known of it then, its window least of all
            return ServedModel(id=wanted, root=None, parent=None, max_model_len=None)
        for model in models:
            if model.id == wanted:
                return model
    bases = [model for model in models if model.parent is None]
    if wanted is None and len(bases) == 1:
        return bases[0]
    raise ModelError(
        f"the server at {url} serves "
        + (f"no model '{wanted}'" if wanted else f"{len(bases)} models"),
        title="Another teacher is served",
        where=where,
        details=[f"served: {model.id}" for model in models[:10]],
        fix="set teacher.served_model to one of the served names"
        if models
        else "set teacher.served_model: the server does not list what it serves",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacherChecks:
    """The questions, to one model on one server.

    Attributes:
        where: the setting that names the server.
        top_k: how many of the likeliest tokens will be asked for.
        rows: how many ids the teacher's head has, where that is known.
    """

    client: ScoringClient
    served: ServedModel
    where: str
    top_k: int
    rows: int | None = None

    async def run(self, tokenizer: Tokenizer, vocabulary: int, longest: int | None) -> TeacherCheck:
        """All of them; arguments as of ``ServedTeacher.check``.

        Raises:
            ServerDown, ModelError: no answer; another tokenizer; log-probabilities that cannot be right, or that change when
                asked again; fewer of the likeliest tokens than are needed; sequences too long for it.
        """
        self._check_window(longest)
        spread = range(0, vocabulary, max(1, vocabulary // _SPREAD_IDS))
        warnings = await self._compare_tokenizers(tokenizer, spread)
        ids = self._cut(tokenizer.encode(_PROBE, add_special_tokens=False)[:_PROBE_TOKENS])
        noise = await self._check_repeats(ids)
        if noise > NOISE_WARNING:
            warnings.append(
                f"the teacher's server answers the same question differently, by {noise:.3f} nats per token on average; "
                "a KL below that cannot be learned from it"
            )
        await self._check_beginning(tokenizer, ids, noise)
        await self._check_top_k(ids)
        if longest is not None and self.served.max_model_len is None:
            await self._check_length(ids, longest)
        mass = await self._padding_mass(ids, vocabulary)
        if mass is None:
            warnings.append(
                "the teacher's server cannot say how much probability it gives to padding ids"
            )
        return TeacherCheck(
            padding_mass=mass,
            noise=noise,
            summary=await self._summary(ids, noise),
            warnings=tuple(warnings),
        )

    def _cut(self, ids: Sequence[int]) -> list[int]:
        """As many of them as fit into the window, with room for one more token."""
        window = self.served.max_model_len
        return list(ids if window is None else ids[: window - 1])

    async def _summary(self, ids: Sequence[int], noise: float) -> str:
        """Also asks whether the temperature of a request reaches the prompt: rnow says 1, so either will do."""
        plain = await self.client.prompt_logprobs(ids, model=self.served.id)
        tempered = await self.client.prompt_top_logprobs(ids, model=self.served.id, temperature=2.0)
        moved = [
            abs(value - entry[token])
            for token, value, entry in zip(ids, plain, tempered, strict=True)
            if value is not None and entry is not None
        ]
        follows = bool(moved) and fmean(moved) > max(4 * noise, 1e-3)
        parts = [
            f"asked by {self.client.asks}",
            f"model {self.served.id}",
            f"window {self.served.max_model_len or 'not told'}",
            "tokens named by id" if self.client.names_ids else "tokens named by text: no top-k",
            *([f"{self.top_k} likeliest tokens listed"] if self.top_k else []),
            f"repeats within {noise:.2g} nats",
            f"the request's temperature {'tempers' if follows else 'does not reach'} a prompt",
        ]
        return "; ".join(parts)

    # --- how long ---------------------------------------------------------------------------------------------------

    def _check_window(self, longest: int | None) -> None:
        window = self.served.max_model_len
        if longest is None or window is None or longest < window:
            return
        start = f"start it with {self._option(longest + 1)}, or " if self._option(1) else ""
        raise ModelError(
            f"the teacher's server takes sequences of up to {window - 1} tokens, the run has up to {longest}",
            where=self.where,
            fix=f"{start}lower rollout.max_context_window to {window - 1}",
        )

    def _option(self, window: int) -> str:
        """What a server is started with for a window of so many tokens; nothing where that is not known."""
        if isinstance(self.client, VllmClient) or self.served.owned_by == "vllm":
            return f"--max-model-len {window}"
        return f"--context-length {window}" if self.served.owned_by == "sglang" else ""

    async def _check_length(self, ids: Sequence[int], longest: int) -> None:
        """One sequence of ``longest`` tokens, of a server that does not tell its window."""
        many = (list(ids) * (longest // len(ids) + 1))[:longest]

        asking = self.client.asking_once()

        async def fits(length: int) -> bool:
            try:
                await asking.prompt_logprobs(many[:length], model=self.served.id)
            except Refused as error:
                if error.status not in _NO_SUCH | {413}:
                    raise
                return False
            return True

        most = await _largest(fits, longest)
        if most < longest:
            raise ModelError(
                f"the teacher's server takes sequences of up to {most} tokens, the run has up to {longest}",
                where=self.where,
                fix=f"lower rollout.max_context_window to {most}, or start the server with a longer one",
            )

    # --- the same tokens --------------------------------------------------------------------------------------------

    async def _compare_tokenizers(self, tokenizer: Tokenizer, spread: Sequence[int]) -> list[str]:
        controls = sorted(tokenizer.get_added_vocab())
        for text in (_PROBE, "".join(controls), tokenizer.decode(list(spread))):
            if not text:
                continue
            ours = tokenizer.encode(text, add_special_tokens=False)
            try:
                theirs = await self.client.tokenize(text, model=self.served.id)
            except Refused as error:
                if error.status not in _NO_SUCH:
                    raise
                return await self._compare_texts(tokenizer, spread)
            except BadAnswer:
                if isinstance(self.client, VllmClient):
                    raise
                return await self._compare_texts(tokenizer, spread)  # a /tokenize of its own kind
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

    async def _compare_texts(self, tokenizer: Tokenizer, spread: Sequence[int]) -> list[str]:
        """Without /tokenize: what ids all over the vocabulary stand for, as far as a text of their own shows it."""
        ids = self._cut(spread)
        texts = await self.client.texts(ids, model=self.served.id)
        if texts is None:
            return [
                "the teacher's server has no /tokenize, so its tokenizer could not be compared with the student's"
            ]
        special = set(tokenizer.all_special_ids)
        for token, theirs in zip(ids, texts, strict=True):
            ours = tokenizer.decode([token])
            # Half a character has no text, special tokens may be left out, and spaces are shown in many ways.
            if token in special or "\ufffd" in ours + theirs or theirs.startswith("bytes:"):
                continue
            if _bare(ours) != _bare(theirs):
                raise ModelError(
                    f"the teacher's server takes token {token} for something else",
                    title="Student and teacher tokenizers differ",
                    where=self.where,
                    details=[f"student: {ours[:40]!r}", f"teacher: {theirs[:40]!r}"],
                    why="the teacher scores the student's token ids, so every id must mean the same to both",
                    fix="serve a teacher of the student's family",
                )
        return []

    async def _check_beginning(
        self, tokenizer: Tokenizer, ids: Sequence[int], noise: float
    ) -> None:
        """Whether the server puts a beginning-of-text token before a prompt that has none."""
        name = tokenizer.special_tokens_map.get("bos_token")
        if not isinstance(name, str) or len(ids) < 2:
            return
        first = tokenizer.convert_tokens_to_ids(name)
        with_it = self._cut([first, *ids])
        plain = await self.client.prompt_logprobs(ids, model=self.served.id)
        begun = await self.client.prompt_logprobs(with_it, model=self.served.id)
        pairs = zip(plain[1:], begun[2:], strict=False)
        moved = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        if moved and fmean(moved) <= max(2 * noise, 1e-6):
            raise BadAnswer(
                f"the server at {self.client.url} judges a prompt the same with {name} before it and without",
                why="it seems to put that token before every prompt that lacks it, and the student's have none",
                fix="serve it without adding special tokens to prompts of token ids",
            )

    # --- the same numbers -------------------------------------------------------------------------------------------

    async def _check_repeats(self, ids: Sequence[int]) -> float:
        """Equal requests, and some that differ from a token on, all at once. Returns the mean gap between equal ones, in nats.

        What changes moves its own log-probability and later ones, and none before it: so the numbers belong to their places.
        """
        places = [len(ids) - 1 - i * len(ids) // (2 * REPEATS) for i in range(REPEATS)]
        places = [place for place in places if place > 1]
        others = [[*ids[:place], *ids[: len(ids) - place]] for place in places]
        first, *answers = await _all_of(
            [
                self.client.prompt_logprobs(wanted, model=self.served.id)
                for wanted in [ids, *[ids] * REPEATS, *others]
            ]
        )
        repeats = [[a for a in answer if a is not None] for answer in (first, *answers[:REPEATS])]
        gaps = [max(values) - min(values) for values in zip(*repeats, strict=True)]
        if max(gaps, default=0.0) > REPEAT_TOLERANCE:
            raise BadAnswer(
                f"the server at {self.client.url} gives the same tokens log-probabilities that differ by "
                f"{max(gaps):.3g} nats",
                why="several models, or replicas of one that do not agree, may stand behind one address",
                fix="name a server that serves one model",
            )
        noise = fmean(gaps) if gaps else 0.0
        self._check_places(ids, first, places, others, answers[REPEATS:], max(gaps, default=0.0))
        return noise

    def _check_places(
        self,
        ids: Sequence[int],
        plain: Sequence[float | None],
        places: Sequence[int],
        others: Sequence[Sequence[int]],
        answers: Sequence[Sequence[float | None]],
        noise: float,
    ) -> None:
        """``others``: ``ids`` with other tokens from ``places`` on, and what the server says of each."""
        early, late, asked = 0, 0, 0
        for place, other, answer in zip(places, others, answers, strict=True):
            before, at = (abs((answer[i] or 0.0) - (plain[i] or 0.0)) for i in (place - 1, place))
            if other[place] != ids[place]:
                asked += 1
                early += before > max(3 * noise, 1e-2)
                late += at <= noise
        if asked > 1 and asked in (early, late):
            raise BadAnswer(
                f"the server at {self.client.url} gives log-probabilities that are off by one position",
                why="a token that changes "
                + (
                    "moves the number of the one before it"
                    if early == asked
                    else "keeps its number"
                ),
                fix="serve it with vLLM or SGLang",
            )

    # --- the likeliest tokens ---------------------------------------------------------------------------------------

    async def _check_top_k(self, ids: Sequence[int]) -> None:
        if not self.top_k:
            return

        asking = self.client.asking_once()

        async def listed(count: int) -> bool:
            try:
                await asking.prompt_top_logprobs(ids, model=self.served.id, top_k=count)
            except FewerListed:
                return False
            except Refused as error:
                if error.status not in _NO_SUCH:
                    raise
                return False
            return True

        most = await _largest(listed, self.top_k)
        if most == self.top_k:
            return
        fixes = [f"set algorithm.teacher_top_k: {most}"] if most else []
        if isinstance(self.client, VllmClient):
            fixes.append(f"start the server with --max-logprobs {self.top_k}")
        if not most:
            fixes.append("set algorithm.kl_estimator: sampled, which needs no list")
        raise ModelError(
            f"the teacher's server lists {f'the {most} likeliest tokens' if most else 'no likeliest tokens'} of a "
            f"position, and {self.top_k} are asked for",
            title="Teacher lists too few tokens",
            where=self.where,
            why=None
            if self.client.names_ids
            else "it names tokens by their text, which several ids can share, so that only the student's own token is "
            "known without doubt",
            fix=", or ".join(fixes),
        )

    async def _padding_mass(self, ids: Sequence[int], vocabulary: int) -> float | None:
        """Mean probability of the model's ids at or above ``vocabulary``, after a few prefixes."""
        if self.rows is not None and self.rows <= vocabulary:
            return 0.0
        # vLLM refuses an id past the last row. Elsewhere it may be read from beyond the head.
        end = None if isinstance(self.client, VllmClient) else self.rows
        if end is None and not isinstance(self.client, VllmClient):
            return None
        prefixes = [ids[:length] for length in {1, len(ids) // 2 or 1, len(ids)}]
        mass, rows, size = 0.0, 0, MAX_LOGPROBS
        while rows < _MAX_PADDING:
            first = vocabulary + rows
            wanted = range(first, first + size if end is None else min(first + size, end))
            if not wanted:
                break
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


async def _all_of(questions: Sequence[Awaitable[list[float | None]]]) -> list[list[float | None]]:
    """The answers to all at once; the first failure ends the others."""
    tasks = [asyncio.ensure_future(question) for question in questions]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _largest(works: Callable[[int], Awaitable[bool]], wanted: int) -> int:
    """``wanted`` if it works, else the largest number below it that does; what works for one works for all below."""
    if await works(wanted):
        return wanted
    low, high = 0, wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await works(middle) else (low, middle)
    return low


def _bare(text: str) -> str:
    """A token's text without the ways in which spaces are shown."""
    return text.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n").strip()
