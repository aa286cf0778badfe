"""Asking the judge's server, within a time limit. Network modules are imported when one is asked.

A redirect is not followed, since it would take the key to another server.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit, urlunsplit

from rnow.core.judge_errors import JudgeError, JudgeUnavailable
from rnow.core.messages import message_text

if TYPE_CHECKING:
    from email.message import Message
    from http.client import HTTPResponse
    from urllib.error import HTTPError
    from urllib.request import OpenerDirector

_MAX_ANSWER_BYTES = 1 << 20
_MAX_REFUSAL_BYTES = 2000
_CHUNK = 1 << 16
_ATTEMPTS = 3
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; twice as many before each later one."""
_CHAT = "/chat/completions"
_PASSING = frozenset({408, 409, 425, 429})
_LATE = "did not answer in time (timeout= of llm_judge and of @reward give it more)"
_REFUSES_A_FIELD = frozenset({400, 422})
SYSTEM = "system"
"""Among the fields that a server may refuse: its model's chat template knows no system message."""
_refused: dict[tuple[str, str], frozenset[str]] = {}
"""(address, model) -> fields that this server has refused, so that it is asked without them from then on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and where. ``spare``: the fields of the payload that may be left out for a server that refuses them, and
    ``SYSTEM``."""

    url: str
    key: str | None
    payload: Mapping[str, object]
    spare: frozenset[str]

    @property
    def shown(self) -> str:
        """The address without a query, which may hold a key."""
        return self.url.partition("?")[0]


def endpoint(address: str) -> str:
    """Where chat completions are asked for, from an address with or without that path; one of OpenAI's Responses API is taken
    for its neighbour.

    Raises:
        JudgeError: it is no address of a server, or holds a password.
    """
    try:
        parts = urlsplit(address.strip())
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        held = parts.username is not None or parts.password is not None
    except ValueError:
        known = held = False
    if not known or held:
        form = "it must start with http:// or https://, and a port in it is a number"
        why = "give its password as api_key" if held else form
        shown = address.rpartition("@")[2].partition("?")[0]
        raise JudgeError(f"the judge's address {shown!r:.200} cannot be used: {why}")
    path = parts.path.rstrip("/").removesuffix("/responses")
    if not path.endswith(_CHAT):
        path = f"{path or '/v1'}{_CHAT}"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def clean_key(key: str | None) -> str | None:
    """A key as a header can carry it.

    Raises:
        JudgeError: none can.
    """
    key = (key or "").strip()
    if not key.isascii() or not key.isprintable():
        raise JudgeError("the judge's key holds characters that no request can carry")
    return key or None


def ask(question: Question, until: float) -> str:
    """The text of the judge's answer, which must be there at ``until`` (of ``time.monotonic``).

    Raises:
        JudgeUnavailable: no answer, or none that makes sense, after three attempts or when the time is over.
        JudgeError: the server refuses the question, or the judge the answer.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return _attempt(question, until)
        except _Passing as fault:
            pause = max(FIRST_PAUSE * 2 ** (attempt - 1), fault.retry_after)
            if attempt >= _ATTEMPTS or time.monotonic() + pause >= until:
                raise JudgeUnavailable(f"the judge at {question.shown} {fault}") from None
        time.sleep(pause)


class _Passing(Exception):
    """What is wrong now and may not be later."""

    def __init__(self, text: str, retry_after: float = 0.0) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def _attempt(question: Question, until: float) -> str:
    """One answer, without the fields that the server refuses."""
    import http.client
    import urllib.error

    server = (question.url, str(question.payload.get("model")))
    refused = _refused.get(server, frozenset()) & question.spare
    while True:
        try:
            text = _text_of(_post(question, refused, until), question)
        except urllib.error.HTTPError as error:
            body = _said(error, until)
            more = _newly_refused(error.code, body, question.spare - refused)
            if not more:
                raise _refusal(error, body, question) from None
            refused |= more
        except (UnicodeError, http.client.InvalidURL):
            raise JudgeError(f"{question.shown} is not the address of a server") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            late = isinstance(reason, TimeoutError)
            what = _LATE if late else f"cannot be reached: {reason}"
            raise _Passing(without_key(what, question.key)) from None
        else:
            # Not before: a refusal that names a field may have had another reason.
            _refused[server] = _refused.get(server, frozenset()) | refused
            return text


def _said(error: HTTPError, until: float) -> str:
    """The text that came with a refusal, as far as it did."""
    found = bytearray()
    with contextlib.suppress(Exception), contextlib.closing(error):
        for part in _parts(cast("HTTPResponse", error.fp), until):
            found += part
            if len(found) >= _MAX_REFUSAL_BYTES:
                break
    return found[:_MAX_REFUSAL_BYTES].decode("utf-8", "replace").strip()


def _newly_refused(code: int, body: str, spare: frozenset[str]) -> frozenset[str]:
    if code not in _REFUSES_A_FIELD:
        return frozenset()
    return frozenset(field for field in spare if field in body.lower())


def _refusal(error: HTTPError, body: str, question: Question) -> Exception:
    text = f"answered {error.code}: {without_key(body, question.key)[:300] or error.reason}"
    if error.code in _PASSING or error.code >= 500:
        return _Passing(text, _retry_after(error.headers))
    return JudgeError(f"the judge at {question.shown} {text}")


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks for; 0 where it says nothing, or a date."""
    try:
        seconds = float(headers.get("Retry-After", ""))
    except ValueError:
        return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _post(question: Question, refused: frozenset[str], until: float) -> bytes:
    import urllib.request

    payload = {key: value for key, value in question.payload.items() if key not in refused}
    if SYSTEM in refused:
        messages = cast("list[dict[str, str]]", payload["messages"])
        text = "\n\n".join(message["content"] for message in messages)
        payload["messages"] = [{"role": "user", "content": text}]
    if "max_tokens" in refused:
        payload["max_completion_tokens"] = question.payload["max_tokens"]
    headers = {"Content-Type": "application/json"}
    if question.key:
        headers["Authorization"] = f"Bearer {question.key}"
    call = urllib.request.Request(
        question.url, data=json.dumps(payload).encode(), headers=headers, method="POST"
    )
    left = until - time.monotonic()
    direct = is_loopback(urlsplit(question.url).hostname or "")
    with _opener(direct=direct).open(call, timeout=max(left, 0.1)) as response:
        return _read(response, until)


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine by its very name: no proxy stands between."""
    return host in ("localhost", "::1") or host.startswith("127.")


@cache
def _opener(*, direct: bool) -> OpenerDirector:
    """``direct``: past the proxies that the environment names."""
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *redirect: object) -> None:
            """None makes an HTTPError of it."""

    past = [urllib.request.ProxyHandler({})] if direct else []
    return urllib.request.build_opener(NoRedirects, *past)


def _read(response: HTTPResponse, until: float) -> bytes:
    """The body."""
    found = bytearray()
    for part in _parts(response, until):
        found += part
        if len(found) > _MAX_ANSWER_BYTES:
            raise _Passing(f"sent more than {_MAX_ANSWER_BYTES:,} bytes")
    return bytes(found)


def _parts(response: HTTPResponse, until: float) -> Iterator[bytes]:
    """The body as it comes. A server that sends a byte now and then meets the time limit as well as one that stops in the middle:
    the limit that urllib was given is for each wait anew."""
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise _Passing(_LATE)
        # Nothing public leads to the socket: HTTPResponse -> BufferedReader -> SocketIO -> socket.
        connection = getattr(getattr(response.fp, "raw", None), "_sock", None)
        if connection is not None:
            connection.settimeout(left)
        part = response.read1(_CHUNK)
        if not part:
            return
        yield part


def _text_of(raw: bytes, question: Question) -> str:
    """The judge's words in a chat completion."""
    try:
        choice = json.loads(raw)["choices"][0]
        message = choice["message"]
        refusal, content = message.get("refusal"), message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        shown = without_key(raw[:200].decode("utf-8", "replace"), question.key)
        raise _Passing(f"sent no chat completion: {shown!r}") from None
    if choice.get("finish_reason") == "length":
        raise JudgeError(
            "the judge's answer was cut off at its limit of tokens: raise max_tokens of llm_judge"
        )
    if isinstance(refusal, str) and refusal:
        raise JudgeError(
            f"the judge refuses to answer: {without_key(refusal, question.key)!r:.200}"
        )
    return message_text(content)


def without_key(text: str, key: str | None) -> str:
    """A text of the server, which may repeat what it was sent."""
    return text.replace(key, "***") if key else text
