"""Talking to an OpenAI-compatible completions server: log-probabilities of the prompt that it echoes.

A request takes token ids; ``echo`` has the answer begin with the prompt, and ``logprobs`` lists each of its tokens. They are
named by their text, or, where a server knows ``return_tokens_as_token_ids`` (vLLM's word), by their ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rnow.serving.http import Json, Unsupported, answer_bytes
from rnow.serving.scoring import GAVE, READ, FewerListed, ScoringClient

_NAMED = re.compile(r"token_id:(\d{1,9})")


class _Echo(NamedTuple):
    """What an answer lists about each token of a prompt: its name, its log-probability, and its likeliest rivals."""

    tokens: list[object]
    values: list[object]
    top: list[object]


class EchoClient(ScoringClient):
    """A client for one OpenAI-compatible server; see ``ServerClient``.

    Its answers are taken to name tokens by id. A client that is ``by_text`` takes them by text: it knows which log-probability
    belongs to which position of the prompt, and nothing of other tokens, since several ids can have the same text.
    """

    asks = "echo with logprobs at /v1/completions, as OpenAI had it"

    def by_text(self) -> EchoClient:
        """A client of the same server that asks for no ids."""
        twin = self.limited(self._max_concurrency)
        twin.names_ids = False
        return twin

    async def prompt_top_logprobs(
        self, token_ids: Sequence[int], *, model: str, top_k: int = 0, temperature: float = 1.0
    ) -> list[dict[int, float] | None]:
        """See ``ScoringClient``."""
        if top_k and not self.names_ids:
            raise FewerListed(
                f"the server at {self.url} names tokens by their text, which several ids can share"
            )
        echo = await self._echo(token_ids, model, top_k, temperature, ids=self.names_ids)
        if self.names_ids and [self._id(name) for name in echo.tokens] != list(token_ids):
            raise self._bad("it read other token ids than it was sent")
        entries: list[dict[int, object] | None] = [
            None if value is None else {token: value}
            for token, value in zip(token_ids, echo.values, strict=True)
        ]
        if entries and entries[0] == {token_ids[0]: 0}:  # some say 0 for "none"
            entries[0] = None
        if top_k:
            if len(echo.top) != len(entries):
                raise FewerListed(f"the server at {self.url} lists no likeliest tokens")
            for entry, best in zip(entries, echo.top, strict=True):
                if entry is not None:
                    listed = best.items() if isinstance(best, dict) else ()
                    named = {self._id(name): value for name, value in listed}
                    entry.update({i: value for i, value in named.items() if i not in entry})
                    if len(named) < top_k:
                        raise FewerListed(
                            f"the server at {self.url} lists {len(named)} of the {top_k} likeliest tokens"
                        )
        return self._entries(token_ids, entries, top_k)

    async def texts(self, token_ids: Sequence[int], *, model: str) -> list[str] | None:
        """See ``ScoringClient``."""
        echo = await self._echo(token_ids, model, 0, 1.0, ids=False)
        found = [name for name in echo.tokens if isinstance(name, str)]
        # A server may be set up to name ids whether it is asked to or not.
        if len(found) < len(token_ids) or all(_NAMED.fullmatch(name) for name in found):
            return None
        return found

    async def _echo(
        self, token_ids: Sequence[int], model: str, top_k: int, temperature: float, *, ids: bool
    ) -> _Echo:
        # Few words, since a strict server refuses those that it does not know. OpenAI's own took no max_tokens of 0 where
        # others did, and logprobs: 0 is "none" to some.
        body: Json = {
            "model": model,
            "prompt": list(token_ids),
            "max_tokens": 1,
            "temperature": temperature,
            "echo": True,
            "logprobs": max(top_k, 1),
        }
        if ids:
            body["return_tokens_as_token_ids"] = True
        most = answer_bytes(len(token_ids), listed=max(top_k, 1) + 1, drawn=top_k + 1)
        answer = await self._json("POST", "/v1/completions", body, most=most)
        return self._prompt_part(answer, token_ids, model)

    def _prompt_part(self, answer: Json, token_ids: Sequence[int], model: str) -> _Echo:
        """What an answer says of the prompt, without the token that was drawn after it."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._bad("it did not give one completion", answer)
        if answer.get("model") != model:
            raise self._bad(f"{self._shown(answer.get('model'))} answered where {model} was asked")
        listed = choices[0].get("logprobs")
        tokens, values, top = (
            listed.get(key) if isinstance(listed, dict) else None
            for key in ("tokens", "token_logprobs", "top_logprobs")
        )
        if not isinstance(tokens, list) or not isinstance(values, list):
            raise Unsupported(f"the server at {self.url} lists no log-probabilities by token")
        sent = len(token_ids)
        if len(tokens) != len(values):
            raise self._bad(f"it lists {len(values)} log-probabilities of {len(tokens)} tokens")
        if len(tokens) <= 1 < sent:
            raise Unsupported(
                f"the server at {self.url} lists the tokens it draws, and none of the prompt"
            )
        usage = answer.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if read is not None:
            self._check_count(read, token_ids, READ)
        # One token is drawn, which a server may leave out where it ends the text.
        drawn = 0 if choices[0].get("finish_reason") == "stop" and len(tokens) == sent else 1
        self._check_count(len(tokens) - drawn, token_ids, GAVE)
        return _Echo(tokens[:sent], values[:sent], top[:sent] if isinstance(top, list) else [])

    def _id(self, name: object) -> int:
        """The id that a name stands for."""
        found = _NAMED.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise Unsupported(
                f"the server at {self.url} names tokens by their text: {self._shown(name)}"
            )
        return int(found[1])
