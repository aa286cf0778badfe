"""Requests to a model server: deadlines, retries, and answers that are judged before they are believed."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from rnow import progress
from rnow.errors import InputError, ModelError, TemporaryError
from rnow.serving.reach import is_loopback

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Json = dict[str, object]

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses that may pass: too many requests, and a server (or the proxy before it) in trouble."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
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


class Unsupported(BadAnswer):
    """A server answers, without what was asked for: it does not know the question."""


class Refused(ModelError):
    """A model server or engine is well and does not take a request. ``status`` is a server's HTTP status (4xx)."""

    default_title = "A model server refused a request"

    def __init__(self, message: str, *, status: int | None = None, fix: str | None = None) -> None:
        super().__init__(message, fix=fix)
        self.status = status


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


class ServerClient:
    """Requests to one server, whatever it is asked.

    Args:
        url: ``http://host:port``, with or without ``/v1``.
        api_key: sent as a bearer token; never part of an error.
        timeout: seconds until a request is given up, all its retries and the wait for a slow answer included.
        max_concurrency: requests in flight at once; further ones wait (outside the deadline).
        alive: asked between retries; False ends them at once (a server that rnow started has ended).

    Attributes:
        wanted: what every answer is, for an error about one that is not.

    Raises:
        InputError: the url is not an http(s) address, or the key cannot be a header.
    """

    wanted: ClassVar[str] = "a JSON object"

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
        if api_key is not None and not (
            api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()
        ):
            raise InputError(
                "the model server's API key holds characters that no header can carry",
                fix="check the environment variable for line ends, blanks around it, and quotes",
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
        self._retried = RETRIED
        self._state: _Loop | None = None

    def limited(self, max_concurrency: int) -> Self:
        """A client of the same server with another bound, which does not count this one's requests."""
        twin = copy.copy(self)
        twin._max_concurrency, twin._state = max_concurrency, None
        return twin

    def hurried(self, timeout: float) -> Self:
        """A client of the same server that gives a request up after ``timeout`` seconds at the latest."""
        twin = copy.copy(self)
        twin._timeout, twin._state = min(timeout, self._timeout), None
        return twin

    def asking_once(self) -> Self:
        """A client of the same server that takes a server error (500) for a no: some say so to what they do not know."""
        twin = copy.copy(self)
        twin._retried, twin._state = RETRIED - {500}, None
        return twin

    async def health(self) -> bool:
        """Whether the server and its engine say they are well. One try, five seconds."""
        import httpx

        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT):
                http = self._loop_state().http
                answer = await self._fetch(http, "GET", "/health", None, answer_bytes(0))
        except (httpx.HTTPError, TimeoutError, OSError, BadAnswer):
            return False
        return answer.status == 200

    # --- requests ---

    async def _json(
        self, method: str, path: str, body: Json | None = None, *, most: int = 0
    ) -> Json:
        """The JSON object of a 2xx answer, of at most ``most`` bytes."""
        return await self._request(method, path, body, as_object, most=most or answer_bytes(0))

    async def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[str], T | None],
        retried: frozenset[int] | None = None,
        *,
        most: int = 1 << 20,
    ) -> T:
        """What ``read`` makes of the body of a 2xx answer. Where it makes nothing (None), a proxy may have answered with
        a page of its own: a few more tries."""
        import httpx

        state, retried = self._loop_state(), retried or self._retried
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
                            raise self._bad(f"not with {self.wanted}", answer.text)
                    elif answer.status not in retried or self._final(answer.text):
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
        # A lone surrogate, which UTF-8 cannot hold, is its own escape in JSON: the server may think of it what it likes.
        sent = None if body is None else json.dumps(body, ensure_ascii=False)
        async with http.stream(
            method,
            self._base + path,
            content=None if sent is None else sent.encode("utf-8", "backslashreplace"),
            headers={} if sent is None else {"Content-Type": "application/json"},
            timeout=None,
        ) as answer:
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
            try:
                http = httpx.AsyncClient(
                    headers={"Accept-Encoding": "identity", **self._headers},
                    limits=limits,
                    trust_env=not self._loopback,
                )
            except (ImportError, ValueError, httpx.InvalidURL) as error:
                raise InputError(
                    "the proxy that the environment names cannot be used",
                    where="HTTP_PROXY, HTTPS_PROXY, ALL_PROXY or NO_PROXY",
                    why=self._clean(str(error)),
                    fix="correct the variable, or unset it; for a SOCKS proxy: pip install 'httpx[socks]'",
                ) from None
            self._state = _Loop(loop, http, asyncio.Semaphore(self._max_concurrency))
        return self._state

    def _final(self, text: str) -> bool:
        """Whether an answer with a status that may pass says that it will not."""
        return False

    # --- judging answers ------------------------------------------------------------------------------------------

    def _ids(self, answer: Mapping[str, object], key: str) -> list[int]:
        ids = answer.get(key)
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise self._bad(f"its '{key}' are not token ids", answer)
        return ids

    def _logprob(self, value: object, position: int) -> float:
        try:
            number = (
                float(value)
                if isinstance(value, int | float) and not isinstance(value, bool)
                else math.nan
            )
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

    def _bad(self, what: str, answer: object = None, *, why: str | None = None) -> BadAnswer:
        details = (self._shown(answer),) if answer is not None else ()
        message = f"the server at {self.url} answers wrongly: {what}"
        return BadAnswer(message, details=details, why=why)

    def _down(self, what: str, last: str) -> ServerDown:
        return ServerDown(f"the server at {self.url} {what}", why=f"the last try: {last}")

    def _refused(self, status: int, text: str) -> Refused:
        fix = None
        if status in (401, 403):
            fix = "give the right API key in the environment"
        if 300 <= status < 400:
            fix = "write the address that it sends elsewhere"
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


def as_object(text: str) -> Json | None:
    """The JSON object that a body is; None for anything else."""
    try:
        value = json.loads(text)
    except (
        ValueError,
        RecursionError,
    ):  # not JSON, thousands of digits, or nested a thousand times
        return None
    return value if isinstance(value, dict) else None


def answer_bytes(tokens: int, *, listed: int = 0, drawn: int = 0) -> int:
    """The longest answer to believe: several times what a server may need for what it was asked.

    Args:
        tokens: it may repeat.
        listed: log-probabilities at each of them, with rank and text.
        drawn: tokens it may generate, with their log-probabilities and text.
    """
    return (1 << 20) + tokens * (64 + listed * 512) + drawn * 4096


def _retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, in seconds or as a date (RFC 9110, 10.2.3); nonsense counts as none."""
    try:
        seconds = float(header or 0.0)
    except ValueError:
        try:
            date = parsedate_to_datetime(header or "")
        except (ValueError, OverflowError):  # a year of many digits
            return 0.0
        aware = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
        seconds = (aware - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
