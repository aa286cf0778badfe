"""Talking to an SGLang server: log-probabilities of a prompt's token ids, at its ``/generate``.

A request takes ``input_ids`` and ``return_logprob``; the answer's ``meta_info`` lists ``[log-probability, id, text]`` for each
token from ``logprob_start_len`` on (none for the very first), and in the same form ``top_logprobs_num`` likeliest ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rnow.serving.http import Json, ServerDown, Unsupported, answer_bytes
from rnow.serving.scoring import GAVE, READ, FewerListed, ScoringClient


class SglangClient(ScoringClient):
    """A client for one SGLang server; see ``ServerClient``. Such a server has one base model, which no request names."""

    asks = "return_logprob at /generate, as SGLang has it"

    async def prompt_top_logprobs(
        self, token_ids: Sequence[int], *, model: str, top_k: int = 0, temperature: float = 1.0
    ) -> list[dict[int, float] | None]:
        """See ``ScoringClient``."""
        asked = {"top_logprobs_num": top_k, "logprob_start_len": 0}
        meta = await self._generate(
            token_ids, asked, listed=top_k + 1, drawn=0, temperature=temperature
        )
        given = self._triples(meta, "input_token_logprobs")
        self._check_count(len(given), token_ids, GAVE)
        if [token for _, token, _ in given] != list(token_ids):
            raise self._bad("it read other token ids than it was sent")
        entries: list[dict[int, object] | None] = [
            None if value is None else {token: value} for value, token, _ in given
        ]
        if top_k:
            listed = meta.get("input_top_logprobs")
            if not isinstance(listed, list):
                raise FewerListed(f"the server at {self.url} lists no likeliest tokens")
            self._check_count(len(listed), token_ids, GAVE)
            for entry, best in zip(entries, listed, strict=True):
                if entry is not None:
                    found = self._as_triples(best or [], "input_top_logprobs")
                    if len(found) < top_k:
                        raise FewerListed(
                            f"the server at {self.url} lists {len(found)} of the {top_k} likeliest tokens"
                        )
                    entry.update({token: value for value, token, _ in found if token not in entry})
        return self._entries(token_ids, entries, top_k)

    async def next_logprobs(
        self, token_ids: Sequence[int], wanted: Sequence[int], *, model: str
    ) -> dict[int, float] | None:
        """See ``ScoringClient``."""
        asked = {"token_ids_logprob": list(wanted), "logprob_start_len": -1}
        meta = await self._generate(token_ids, asked, listed=1, drawn=max(1, len(wanted)))
        listed = meta.get("output_token_ids_logprobs")
        if not isinstance(listed, list) or len(listed) != 1:
            return None
        found = {
            token: value
            for value, token, _ in self._as_triples(listed[0], "output_token_ids_logprobs")
        }
        if not all(token in found for token in wanted):
            return None
        return {token: self._logprob(found[token], len(token_ids)) for token in wanted}

    async def texts(self, token_ids: Sequence[int], *, model: str) -> list[str] | None:
        """See ``ScoringClient``."""
        asked = {"return_text_in_logprobs": True, "logprob_start_len": 0}
        meta = await self._generate(token_ids, asked, listed=4, drawn=0)
        found = self._triples(meta, "input_token_logprobs")
        texts = [text for _, _, text in found if isinstance(text, str)]
        return texts if len(texts) == len(token_ids) else None

    async def _generate(
        self,
        token_ids: Sequence[int],
        asked: Mapping[str, object],
        *,
        listed: int,
        drawn: int,
        temperature: float = 1.0,
    ) -> Json:
        """The ``meta_info`` of one answer.

        Args:
            listed: log-probabilities that were asked for at each position of the prompt.
            drawn: those that were asked for at the token that follows; 0 draws none.
        """
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"temperature": temperature, "max_new_tokens": min(drawn, 1)},
            "return_logprob": True,
            **asked,
        }
        most = answer_bytes(len(token_ids), listed=listed, drawn=drawn)
        answer = await self._json("POST", "/generate", body, most=most)
        meta = answer.get("meta_info")
        if not isinstance(meta, dict) or "input_token_logprobs" not in meta:
            raise Unsupported(f"the server at {self.url} gives no log-probabilities of a prompt")
        ended = meta.get("finish_reason")
        if isinstance(ended, dict) and ended.get("type") == "abort":
            raise ServerDown(f"the server at {self.url} aborted a request")
        if "prompt_tokens" in meta:
            self._check_count(meta["prompt_tokens"], token_ids, READ)
        return meta

    def _triples(self, meta: Json, key: str) -> list[tuple[object, int, object]]:
        return self._as_triples(meta.get(key), key)

    def _as_triples(self, listed: object, key: str) -> list[tuple[object, int, object]]:
        """The entries of a list of log-probabilities. An older server leaves the text out."""
        if isinstance(listed, list) and all(
            isinstance(item, list) and len(item) in (2, 3) and type(item[1]) is int
            for item in listed
        ):
            return [(item[0], item[1], item[2] if len(item) == 3 else None) for item in listed]
        raise self._bad(f"its '{key}' are not log-probabilities with token ids", listed)
