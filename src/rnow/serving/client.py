"""Talking to a vLLM server: token ids in, token ids and log-probabilities out.

Text never stands in for token ids in either direction. Every answer is checked before it is believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rnow.serving.http import Json, Refused, ServerDown, Unsupported, answer_bytes
from rnow.serving.scoring import ScoringClient
from rnow.types import FinishReason, SamplingParams

MAX_LOGPROBS = 20
"""How many log-probabilities per position a vLLM server gives unless it was started with more (--max-logprobs)."""

_LORA_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
_SLEEP_SWITCH = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"


class Generated(NamedTuple):
    """One generation: the sampled ids (the stop id included), a log-probability for each, and why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


class VllmClient(ScoringClient):
    """A client for one vLLM server; see ``ServerClient``."""

    asks = "prompt_logprobs at /v1/completions, as vLLM has it"

    # --- generating -----------------------------------------------------------------------------------------------

    async def complete(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        *,
        model: str,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Generated:
        """Sample one completion.

        The log-probabilities are those of the server's ``logprobs_mode``: only a server started with
        ``--logprobs-mode processed_logprobs`` gives those of the distribution it draws from (temperature and bias
        applied). Only ``params.stop_token_ids`` end a generation; the model's own end-of-text id does not unless
        it is one of them. ``logit_bias`` is cut to [-100, 100] by vLLM.

        Raises:
            ServerDown: no answer before the deadline, or the server aborted the request.
            Refused: the server does not take the request, e.g. an adapter name it does not know.
            BadAnswer: another model answered, counts differ, a log-probability is not one.
        """
        body = self._sampling(prompt_token_ids, model, params.max_tokens) | {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "stop_token_ids": list(params.stop_token_ids),
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "seed": seed,
        }
        if logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in logit_bias.items()}
        choice = await self._choice(body, prompt_token_ids, drawn=params.max_tokens)
        return self._generated(choice, params)

    def _generated(self, choice: Mapping[str, object], params: SamplingParams) -> Generated:
        """The completion that an answer holds, if it can be one."""
        ids = self._ids(choice, "token_ids")
        given = choice.get("logprobs")
        values = given.get("token_logprobs") if isinstance(given, dict) else None
        if not isinstance(values, list):
            raise self._bad("its completion has no log-probabilities", choice)
        reason = choice.get("finish_reason")
        if reason in ("abort", "error"):
            raise ServerDown(f"the server at {self.url} aborted a request")
        if reason not in ("stop", "length"):
            raise self._bad(f"it ended a completion with {self._shown(reason)}")
        most, stops = params.max_tokens, params.stop_token_ids
        if not 0 < len(ids) <= most or len(values) != len(ids):
            raise self._bad(
                f"it gave {len(ids)} tokens and {len(values)} log-probabilities where at most {most} were asked for"
            )
        if reason == "length" and len(ids) != most:
            # vLLM also says so at the end of its window, where the caller should never have sent it.
            raise self._bad(f"it cut a completion after {len(ids)} of {most} tokens")
        if reason == "stop" and stops and ids[-1] not in stops:
            raise self._bad(f"it stopped at id {ids[-1]}, which is not one of the stop ids")
        logprobs = tuple(self._logprob(value, i) for i, value in enumerate(values))
        return Generated(tuple(ids), logprobs, "stop" if reason == "stop" else "length")

    async def next_logprobs(
        self, token_ids: Sequence[int], wanted: Sequence[int], *, model: str
    ) -> dict[int, float] | None:
        """Log-probability of each wanted id right after ``token_ids``; None where the server is too old to say.

        At most ``MAX_LOGPROBS`` ids, unless the server was started with more.
        """
        body = self._sampling(token_ids, model, 1) | {
            "temperature": 1.0,
            "logprobs": 1,
            "logprob_token_ids": list(wanted),
            "return_tokens_as_token_ids": True,
        }
        choice = await self._choice(body, token_ids, drawn=1)
        listed = choice.get("logprobs")
        try:
            entries = listed["top_logprobs"] if isinstance(listed, dict) else []
            given = {
                int(name.removeprefix("token_id:")): value for name, value in entries[0].items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise self._bad("its log-probabilities are not listed by token id", choice) from None
        if not all(token in given for token in wanted):
            return None
        return {token: self._logprob(given[token], len(token_ids)) for token in wanted}

    # --- judging --------------------------------------------------------------------------------------------------

    async def prompt_top_logprobs(
        self, token_ids: Sequence[int], *, model: str, top_k: int = 0, temperature: float = 1.0
    ) -> list[dict[int, float] | None]:
        """See ``ScoringClient``. ``top_k`` is at most ``MAX_LOGPROBS``, unless the server was started with more."""
        body = self._sampling(token_ids, model, 1) | {
            "temperature": temperature,
            "prompt_logprobs": top_k,
        }
        choice = await self._choice(body, token_ids, drawn=1, listed=top_k + 1)
        given = choice.get("prompt_logprobs")
        if given is None:
            raise Unsupported(f"the server at {self.url} gives no log-probabilities of a prompt")
        if not isinstance(given, list):
            raise self._bad("its log-probabilities are no list", given)
        try:
            entries = [
                None if entry is None else {int(i): value["logprob"] for i, value in entry.items()}
                for entry in given
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._bad("its log-probabilities are not listed by token id", given) from None
        return self._entries(token_ids, entries, top_k)

    # --- adapters and memory --------------------------------------------------------------------------------------

    async def load_lora_adapter(self, name: str, path: str) -> None:
        """Serve the adapter in the server's folder ``path`` as the model ``name`` (a new name per version: vLLM keeps
        prefix-cache blocks by name). Does nothing where that is served already; another path under ``name`` is an error.

        Raises:
            Refused: the server does not load it; its reason is in the message.
        """
        try:
            await self._lora("load", {"lora_name": name, "lora_path": path})
        except Refused as error:
            # 400, "already loaded", is no failure where an earlier try did it and its answer got lost.
            if error.status != 400 or not any(
                model.id == name and model.root == path for model in await self.models()
            ):
                raise

    async def unload_lora_adapter(self, name: str) -> None:
        """Stop serving the adapter ``name``. Does nothing where it is not loaded."""
        try:
            await self._lora("unload", {"lora_name": name})
        except Refused as error:
            if error.status != 404 or error.fix:
                raise

    async def _lora(self, what: str, body: Json) -> None:
        # A failed load is a 500 that stays one.
        retried = frozenset({429, 502, 503, 504})
        try:
            await self._request("POST", f"/v1/{what}_lora_adapter", body, str, retried)
        except Refused as error:
            if error.status == 404 and "lora" not in error.message.lower():
                raise self._not_offered("load adapters", _LORA_SWITCH) from error
            raise

    async def sleep(self) -> None:
        """Free the server's GPU memory; the weights stay in main memory (level 1). Requests in flight are aborted."""
        await self._dev("/sleep?level=1")

    async def wake_up(self) -> None:
        """Take the memory again."""
        await self._dev("/wake_up")

    async def _dev(self, path: str) -> None:
        try:
            await self._request("POST", path, None, str)
        except Refused as error:
            if error.status == 404:
                raise self._not_offered("sleep", _SLEEP_SWITCH) from error
            raise

    def _not_offered(self, what: str, how: str) -> Refused:
        return Refused(
            f"the server at {self.url} cannot {what}", status=404, fix=f"start it with {how}"
        )

    # --- requests -------------------------------------------------------------------------------------------------

    @staticmethod
    def _sampling(token_ids: Sequence[int], model: str, max_tokens: int) -> Json:
        # What is left out is filled from the model's generation_config.json, so everything is said.
        return {
            "model": model,
            "prompt": list(token_ids),
            "max_tokens": max_tokens,
            "n": 1,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    async def _choice(
        self, body: Json, token_ids: Sequence[int], *, drawn: int, listed: int = 0
    ) -> Json:
        """The one completion of an answer.

        Args:
            drawn: the most tokens it may have.
            listed: log-probabilities that were asked for at each position of the prompt.
        """
        most = answer_bytes(len(token_ids), listed=listed, drawn=drawn)
        answer = await self._json("POST", "/v1/completions", body, most=most)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._bad("it did not give one completion", answer)
        if answer.get("model") != body["model"]:
            raise self._bad(
                f"{self._shown(answer.get('model'))} answered where {body['model']} was asked"
            )
        echoed = choices[0].get("prompt_token_ids")
        if echoed is not None and echoed != list(token_ids):
            raise self._bad("it read other token ids than it was sent")
        return choices[0]
