"""What a server must answer to be a teacher: log-probabilities of a prompt's own token ids.

Each protocol is a client of its own; ``ScoringClient`` is what they have in common.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rnow.serving.http import BadAnswer, ServerClient, answer_bytes

GAVE = "gave {} log-probabilities for {} tokens"
READ = "read {} tokens where {} were sent"
_REREAD = "it may have turned the ids into text and read that again, which gives other tokens"
_SUM_TOLERANCE = 1e-2  # of probabilities that were rounded to bfloat16 or to four digits
_MAX_ID = 2**31  # above that of any tokenizer
_BEFORE = "servers are known to put a beginning-of-text token (BOS) before every prompt"


class FewerListed(BadAnswer):
    """A server lists fewer of the likeliest tokens than it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One entry of ``/v1/models``. ``root`` is the folder or id it was loaded from; ``parent`` is set for an
    adapter; ``owned_by`` is how most servers name themselves."""

    id: str
    root: str | None
    parent: str | None
    max_model_len: int | None
    owned_by: str | None = None


class ScoringClient(ServerClient, ABC):
    """A client of one server in one protocol.

    Attributes:
        asks: what it asks for, and where, for an error that says what a server lacks.
        names_ids: the answers name tokens by id, so that the likeliest ones can be told apart.
    """

    asks: ClassVar[str]
    names_ids: bool = True

    async def models(self) -> list[ServedModel]:
        """What the server serves: its base model under each of its names, then the loaded adapters."""
        answer = await self._json("GET", "/v1/models")
        entries = answer.get("data")
        if not isinstance(entries, list) or not all(map(_is_model, entries)):
            raise self._bad("its list of models is not one", answer)
        return [
            ServedModel(
                id=entry["id"],
                root=entry.get("root"),
                parent=entry.get("parent"),
                max_model_len=entry.get("max_model_len"),
                owned_by=entry.get("owned_by"),
            )
            for entry in entries
        ]

    async def tokenize(self, text: str, *, model: str) -> list[int]:
        """The server's own token ids of ``text``, without added special tokens: to compare, never to train on."""
        body = {"prompt": text, "add_special_tokens": False, "model": model}
        most = answer_bytes(len(text.encode()))
        answer = await self._json("POST", "/tokenize", body, most=most)
        return self._ids(answer, "tokens")

    async def texts(self, token_ids: Sequence[int], *, model: str) -> list[str] | None:
        """What each id stands for by the server's own tokenizer; None where the protocol cannot say."""
        return None

    async def next_logprobs(
        self, token_ids: Sequence[int], wanted: Sequence[int], *, model: str
    ) -> dict[int, float] | None:
        """Log-probability of each wanted id right after ``token_ids``; None where the server cannot say. No id may lie
        outside the model's head."""
        return None

    async def prompt_logprobs(self, token_ids: Sequence[int], *, model: str) -> list[float | None]:
        """Log-probability of exactly these ids, each in the context of those before it; the first is None.

        Raises:
            ServerDown, Refused, BadAnswer: as ``prompt_top_logprobs``.
        """
        entries = await self.prompt_top_logprobs(token_ids, model=model)
        return [
            None if entry is None else entry[token]
            for token, entry in zip(token_ids, entries, strict=True)
        ]

    @abstractmethod
    async def prompt_top_logprobs(
        self, token_ids: Sequence[int], *, model: str, top_k: int = 0, temperature: float = 1.0
    ) -> list[dict[int, float] | None]:
        """For each position the ``top_k`` likeliest ids and the given one, with their log-probabilities; the first is
        None.

        Args:
            temperature: what the request says. Servers are known to ignore it for a prompt.

        Raises:
            ServerDown: no answer before the deadline.
            Refused: the server does not take the request.
            FewerListed: it lists fewer than ``top_k`` tokens at a position.
            Unsupported: it does not know the question.
            BadAnswer: another model answered, it read other tokens, counts differ, a log-probability is not one.
        """

    def _entries(
        self,
        token_ids: Sequence[int],
        given: Sequence[Mapping[int, object] | None],
        top_k: int,
    ) -> list[dict[int, float] | None]:
        """The entries of an answer, judged: as many as tokens, none for the first, the given id in each other one,
        and nothing that is no id or no part of a distribution."""
        self._check_count(len(given), token_ids, GAVE)
        if given and given[0] is not None:
            raise self._bad(
                "it gives the very first token a log-probability, so it read something before it",
                why=_BEFORE,
            )
        entries: list[dict[int, float] | None] = []
        for position, (token, entry) in enumerate(zip(token_ids, given, strict=True)):
            if position == 0:
                entries.append(None)
                continue
            if entry is None or token not in entry:
                raise self._bad(f"it gave no log-probability for the token at {position}")
            if len(entry) < top_k:
                raise FewerListed(
                    f"the server at {self.url} lists {len(entry)} tokens of a position where the {top_k} likeliest "
                    "were asked for"
                )
            entries.append(self._entry(entry, position))
        return entries

    def _entry(self, given: Mapping[int, object], position: int) -> dict[int, float]:
        """The log-probabilities of one position, by id."""
        if strange := [i for i in given if not 0 <= i < _MAX_ID]:
            raise self._bad(
                f"it lists {self._shown(strange[0])} at {position}, which is no token id"
            )
        entry = {i: self._logprob(value, position) for i, value in given.items()}
        if (total := sum(map(math.exp, entry.values()))) > 1 + _SUM_TOLERANCE:
            raise self._bad(
                f"the tokens that it lists at {position} have a probability of {total:.3g} together",
                why="its log-probabilities are not those of one distribution",
            )
        return entry

    def _check_count(self, count: object, token_ids: Sequence[int], what: str) -> None:
        """``what``: how to say that ``count`` is not the number of tokens that were sent."""
        if count != len(token_ids):
            raise self._bad(
                f"it {what.format(self._shown(count), len(token_ids))}",
                why=_BEFORE if count == len(token_ids) + 1 else _REREAD,
            )


def _is_model(entry: object) -> bool:
    """Whether this is an entry of a list of models: all but its name may be missing."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return False
    names = [entry.get(name) for name in ("root", "parent", "owned_by")]
    return all(isinstance(name, str | None) for name in names) and isinstance(
        entry.get("max_model_len"), int | None
    )
