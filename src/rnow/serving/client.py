"""Talking to an OpenAI-compatible vLLM server: token ids in, token ids and log-probabilities out.

Text never stands in for token ids in either direction. Every answer is checked before it is believed.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

from rnow import progress
from rnow.errors import InputError, ModelError, TemporaryError
from rnow.serving.reach import is_loopback
from rnow.types import FinishReason, SamplingParams

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Json = dict[str, object]

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may pass: too many requests, and a server (or the proxy before it) in trouble."""

MAX_LOGPROBS = 20
"""How many log-probabilities per position a vLLM server gives unless it was started with more (--max-logprobs)."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
_LORA_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"
_SLEEP_SWITCH = "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
_UNREADABLE_TRIES = 4
_HEALTH_TIMEOUT = 5.0
LOOK_AT_SERVER = "look at that server's log, or correct the url"
_LOWEST = -1e4
"""Below what vLLM writes for a probability of 0. One such number would be most of a step's KL."""
_ROUNDING = 1e-5  # a log-softmax in float32 may end this far above 0
_EXCERPT = 200
_BRIEF = reprlib.Repr()  # what a server sends may nest deeply and hold numbers without end
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = _EXCERPT


class ServerDown(TemporaryError):
    """A model server or engine ended, or did not answer within the deadline, retries included."""

    default_title = "Model server unreachable"


class BadAnswer(ModelError):
    """A server answered with something that cannot be right."""

    default_title = "Wrong answer from a model server"


class Refused(ModelError):
    """A model server or engine is well and does not take a request. ``status`` is a server's HTTP status (4xx)."""

    default_title = "A model server refused a request"

    def __init__(self, message: str, *, status: int | None = None, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


class Generated(NamedTuple):
    """One generation: the sampled ids (the stop id included), a log-probability for each, and why it ended."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One entry of ``/v1/models``. ``root`` is the folder or id it was loaded from; ``parent`` is set for an adapter."""

    id: str
    root: str | None
    parent: str | None
    max_model_len: int | None


class _Answer(NamedTuple):
    status: int
    text: str
    retry_after: str | None


@dataclass(frozen=True, slots=True)
class _Loop:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    http: httpx.AsyncClient
    turns: asyncio.Semaphore


class VllmClient:
    """A client for one server.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        api_key: sent as a bearer token; never part of an error.
        timeout: seconds until a request is given up, all its retries and the wait for a slow answer included.
        max_concurrency: requests in flight at once; further ones wait (outside the deadline).
        alive: asked between retries; False ends them at once (a server that rnow started has ended).

    Raises:
        InputError: the url is not an http(s) address, or the key cannot be a header.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_concurrency: int = 16,
        *,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        if parts.scheme not in ("http", "https") or not host:
            raise InputError(
                "the model server's url is not an http(s) address",
                fix="write it like http://127.0.0.1:8000",
            )
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InputError(
                "the model server's API key holds characters that no header can carry",
                fix="check the environment variable for line ends and quotes",
            )
        name = f"[{host}]" if ":" in host else host
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{name}{f':{port}' if port else ''}{path}"
        """The server's address without user, password and query: safe to show."""
        user = parts.netloc.rpartition("@")[0]
        # httpx would send a user and password from the address instead of the key.
        with_user = user and not api_key
        self._base = self.url.replace("://", f"://{user}@", 1) if with_user else self.url
        self._secrets = tuple(text for text in (api_key, parts.password, parts.query) if text)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._loopback = is_loopback(host)
        self._timeout = timeout
        self._max_concurrency = max_concurrency
        self._alive = alive
        self._state: _Loop | None = None

    def limited(self, max_concurrency: int) -> VllmClient:
        """A client of the same server with another bound, which does not count this one's requests."""
        twin = copy.copy(self)
        twin._max_concurrency, twin._state = max_concurrency, None
        return twin

    def hurried(self, timeout: float) -> VllmClient:
        """A client of the same server that gives a request up after ``timeout`` seconds at the latest."""
        twin = copy.copy(self)
        twin._timeout, twin._state = min(timeout, self._timeout), None
        return twin

    # --- about the server -----------------------------------------------------------------------------------------

    async def health(self) -> bool:
        """Whether the server and its engine say they are well. One try, five seconds."""
        import httpx

        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT):
                http = self._loop_state().http
                answer = await self._fetch(http, "GET", "/health", None, _answer_bytes(0))
        except (httpx.HTTPError, TimeoutError, OSError, BadAnswer):
            return False
        return answer.status == 200

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
            )
            for entry in entries
        ]

    async def tokenize(self, text: str, *, model: str) -> list[int]:
        """The server's own token ids of ``text``, without added special tokens: to compare, never to train on."""
        body = {"prompt": text, "add_special_tokens": False, "model": model}
        answer = await self._json("POST", "/tokenize", body, most=_answer_bytes(len(text.encode())))
        return self._ids(answer, "tokens")

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

    async def prompt_logprobs(self, token_ids: Sequence[int], *, model: str) -> list[float | None]:
        """Log-probability of exactly these ids, each in the context of those before it; the first is None.

        The model's own distribution, whatever temperature a sampler uses.

        Raises:
            ServerDown, Refused, BadAnswer: as ``complete``.
        """
        entries = await self.prompt_top_logprobs(token_ids, model=model, top_k=0)
        return [
            None if entry is None else entry[token]
            for token, entry in zip(token_ids, entries, strict=True)
        ]

    async def prompt_top_logprobs(
        self, token_ids: Sequence[int], *, model: str, top_k: int
    ) -> list[dict[int, float] | None]:
        """For each position the ``top_k`` likeliest ids and the given one, with their log-probabilities; the first is
        None. ``top_k`` is at most ``MAX_LOGPROBS``, unless the server was started with more."""
        body = self._sampling(token_ids, model, 1) | {
            "temperature": 1.0,
            "prompt_logprobs": top_k,
        }
        choice = await self._choice(body, token_ids, drawn=1, listed=top_k + 1)
        given = choice.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(token_ids):
            count = len(given) if isinstance(given, list) else 0
            raise self._bad(f"it gave {count} log-probabilities for {len(token_ids)} tokens")
        entries: list[dict[int, float] | None] = []
        for position, (token, entry) in enumerate(zip(token_ids, given, strict=True)):
            if entry is None and position == 0:
                entries.append(None)
                continue
            try:
                pairs = entry.items() if isinstance(entry, dict) else ()
                found = {int(name): value["logprob"] for name, value in pairs}
                found[token]
            except (AttributeError, KeyError, TypeError, ValueError):
                raise self._bad(f"it gave no log-probability for the token at {position}") from None
            entries.append({i: self._logprob(value, position) for i, value in found.items()})
        if any(entry is not None and len(entry) < top_k for entry in entries):
            raise self._bad(f"it gave fewer than the {top_k} likeliest tokens of a position")
        return entries

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
        most = _answer_bytes(len(token_ids), listed=listed, drawn=drawn)
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

    async def _json(
        self, method: str, path: str, body: Json | None = None, *, most: int = 0
    ) -> Json:
        """The JSON object of a 2xx answer, of at most ``most`` bytes."""
        return await self._request(method, path, body, _as_object, most=most or _answer_bytes(0))

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[str], T | None],
        retried: frozenset[int] = RETRIED,
        *,
        most: int = 1 << 20,
    ) -> T:
        """What ``read`` makes of the body of a 2xx answer. Where it makes nothing (None), a proxy may have answered with
        a page of its own: a few more tries."""
        import httpx

        state = self._loop_state()
        async with state.turns:
            progress.moved(ahead=self._timeout)
            deadline = time.monotonic() + self._timeout
            pause, last, unreadable = _FIRST_PAUSE, "no answer", 0
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._down(f"gave no answer in {self._timeout:g} s", last)
                wait = pause
                try:
                    async with asyncio.timeout(left):
                        answer = await self._fetch(state.http, method, path, body, most)
                    progress.moved()
                    if 200 <= answer.status < 300:
                        found = read(answer.text)
                        if found is not None:
                            return found
                        unreadable += 1
                        if unreadable == _UNREADABLE_TRIES:
                            raise self._bad("not with a JSON object", answer.text)
                    elif answer.status not in retried:
                        raise self._refused(answer.status, answer.text)
                    last = f"HTTP {answer.status}: {self._said(answer.text)}"
                    wait = max(pause, _retry_after(answer.retry_after))
                except TimeoutError:
                    last = "it is too slow"
                except (httpx.HTTPError, OSError) as error:
                    last = self._clean(f"{type(error).__name__}: {error}".rstrip(": "))
                if not self._alive():
                    raise self._down("has ended", last)
                left = deadline - time.monotonic()
                if wait >= left:  # a wait longer than the deadline allows means no
                    raise self._down(f"gave no answer in {self._timeout:g} s", last)
                await asyncio.sleep(wait)
                pause = min(pause * 2, _LONGEST_PAUSE)

    async def _fetch(
        self,
        http: httpx.AsyncClient,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        most: int,
    ) -> _Answer:
        """One answer, read as it comes.

        Raises:
            BadAnswer: it is longer than ``most`` bytes, or packed.
        """
        async with http.stream(method, self._base + path, json=body, timeout=None) as answer:
            data = bytearray()
            async for chunk in answer.aiter_raw():
                data += chunk
                if len(data) > most:
                    raise self._bad(
                        f"more than {most:,} bytes, which is more than was asked for",
                        data[:_EXCERPT].decode("utf-8", "replace"),
                    )
        # Plain bodies are asked for. One that is packed all the same may unpack to anything.
        if (packed := answer.headers.get("content-encoding", "identity")) != "identity":
            raise self._bad(f"packed with {self._clean(packed)}, and plainly is asked for")
        return _Answer(
            answer.status_code, data.decode("utf-8", "replace"), answer.headers.get("retry-after")
        )

    def _loop_state(self) -> _Loop:
        import httpx

        loop = asyncio.get_running_loop()
        if self._state is None or self._state.loop is not loop:
            # No connection outlives its request, so none is left behind in the loop of an earlier asyncio.run.
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            http = httpx.AsyncClient(
                headers={"Accept-Encoding": "identity", **self._headers},
                limits=limits,
                trust_env=not self._loopback,
            )
            self._state = _Loop(loop, http, asyncio.Semaphore(self._max_concurrency))
        return self._state

    # --- judging answers ------------------------------------------------------------------------------------------

    def _ids(self, answer: Mapping[str, object], key: str) -> list[int]:
        ids = answer.get(key)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise self._bad(f"its '{key}' are not token ids", answer)
        return ids

    def _logprob(self, value: object, position: int) -> float:
        try:
            number = float(value) if isinstance(value, int | float) else math.nan
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise self._bad(f"the log-probability at {position} is {self._shown(value)}")
        if number < _LOWEST:
            raise self._bad(
                f"the log-probability at {position} is {number:g}, and vLLM gives -9999 for 0"
            )
        if number > _ROUNDING:
            raise self._bad(f"the log-probability at {position} is {number:g}, which is above 0")
        return min(number, 0.0)

    def _bad(self, what: str, answer: object = None) -> BadAnswer:
        details = (self._shown(answer),) if answer is not None else ()
        return BadAnswer(f"the server at {self.url} answers wrongly: {what}", details=details)

    def _down(self, what: str, last: str) -> ServerDown:
        return ServerDown(f"the server at {self.url} {what}", why=f"the last try: {last}")

    def _refused(self, status: int, text: str) -> Refused:
        fix = None
        if status in (401, 403):
            fix = "give the right API key in the environment"
        return Refused(
            f"the server at {self.url} answers HTTP {status}: {self._said(text)}",
            status=status,
            fix=fix,
        )

    def _said(self, text: str) -> str:
        """The message of an error answer, or its beginning."""
        try:
            error = json.loads(text)["error"]
            text = error if isinstance(error, str) else str(error["message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return self._clean(text)

    def _shown(self, value: object) -> str:
        return self._clean(value if isinstance(value, str) else _BRIEF.repr(value))

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text[:_EXCERPT] + ("..." if len(text) > _EXCERPT else "")


def _as_object(text: str) -> Json | None:
    try:
        value = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ):  # not JSON, thousands of digits, or nested a thousand times
        return None
    return value if isinstance(value, dict) else None


def _is_model(entry: object) -> bool:
    """Whether this is an entry of a list of models: ``root`` and ``parent`` may be missing, and so may the window."""
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return False
    names = isinstance(entry.get("root"), str | None) and isinstance(
        entry.get("parent"), str | None
    )
    return names and isinstance(entry.get("max_model_len"), int | None)


def _answer_bytes(tokens: int, *, listed: int = 0, drawn: int = 0) -> int:
    """The longest answer to believe: several times what a server may need for what it was asked.

    Args:
        tokens: it may repeat.
        listed: log-probabilities at each of them, with rank and text.
        drawn: tokens it may generate, with their log-probabilities and text.
    """
    return (1 << 20) + tokens * (64 + listed * 512) + drawn * 4096


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for; a date or nonsense counts as none."""
    try:
        return max(float(header or 0.0), 0.0)
    except ValueError:
        return 0.0
