"""``llm_judge``: ask an OpenAI-compatible endpoint for a number.

The network modules are imported when a judge is asked: most rewards never do, and this file is imported in every process
that runs them.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

DEFAULT_MODEL = "gpt-4o-mini"
DEFAULT_BASE_URL = "https://api.openai.com/v1"
_MAX_ANSWER_BYTES = 1 << 20
_MAX_JUDGES = 32
_ATTEMPTS = 3
_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})


class JudgeError(RuntimeError):
    """The judge gave no usable score: unreachable, refused, or an answer outside the schema."""


async def llm_judge(
    prompt: str,
    *,
    model: str | None = None,
    system: str | None = None,
    minimum: float = 0.0,
    maximum: float = 1.0,
    base_url: str | None = None,
    api_key: str | None = None,
    temperature: float | None = None,
    timeout: float = 60.0,
) -> float:
    """The score a judge model gives to ``prompt``, checked to be a number from ``minimum`` to ``maximum``.

    Args:
        prompt: what to judge and by which rule.
        model: default ``OPENAI_MODEL``, else ``gpt-4o-mini``.
        system: extra instruction for the judge.
        base_url: address of the endpoint up to ``/v1``; default ``OPENAI_BASE_URL``, else OpenAI.
        api_key: default ``OPENAI_API_KEY``. These names are looked up in the environment, where rnow puts what the project's ``.env`` says of them.
        timeout: seconds for the whole call, retries included.

    Raises:
        JudgeError: no key, no answer, or an answer that is not a score.
    """
    address = base_url or _setting("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    key = api_key or _setting("OPENAI_API_KEY")
    if key is None and address == DEFAULT_BASE_URL:
        raise JudgeError(
            "llm_judge has no key: put OPENAI_API_KEY in .env (or OPENAI_BASE_URL of your own server)"
        )
    instruction = f'You are a judge. Answer with JSON only: {{"score": number from {minimum:g} to {maximum:g}}}.'
    payload: dict[str, object] = {
        "model": model or _setting("OPENAI_MODEL") or DEFAULT_MODEL,
        "messages": [
            {"role": "system", "content": f"{instruction}\n{system}" if system else instruction},
            {"role": "user", "content": prompt},
        ],
        "response_format": _score_schema(minimum, maximum),
    }
    if temperature is not None:
        payload["temperature"] = temperature
    import asyncio

    url = address.rstrip("/") + "/chat/completions"
    loop = asyncio.get_running_loop()
    answer = await loop.run_in_executor(_executor(), _ask, url, key, payload, timeout)
    return _read_score(answer, minimum, maximum)


def _setting(name: str) -> str | None:
    return os.environ.get(name) or None


@cache
def _executor() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    # asyncio's own pool has only a few threads on a small machine; judging is waiting, not computing.
    return ThreadPoolExecutor(_MAX_JUDGES, thread_name_prefix="judge")


def _score_schema(minimum: float, maximum: float) -> dict[str, object]:
    score = {"type": "number", "description": f"from {minimum:g} to {maximum:g}"}
    schema = {
        "type": "object",
        "properties": {"score": score},
        "required": ["score"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "score", "strict": True, "schema": schema},
    }


def _ask(url: str, key: str | None, payload: dict[str, object], timeout: float) -> str:
    """The judge's text. Runs in a thread."""
    import http.client
    import urllib.error

    deadline = time.monotonic() + timeout
    attempt = 0
    while True:
        attempt += 1
        left = deadline - time.monotonic()
        try:
            return _post(url, key, payload, timeout=max(left, 0.1))
        except urllib.error.HTTPError as error:
            body = error.read(500).decode("utf-8", "replace").strip()
            if error.code == 400 and "response_format" in body and "response_format" in payload:
                # Some servers know no schemas; the instruction and the check of the answer remain.
                del payload["response_format"]
                continue
            problem = f"answered {error.code}: {body or error.reason}"
            final = error.code not in _RETRIED
        except (OSError, http.client.HTTPException) as error:
            problem = f"cannot be reached: {getattr(error, 'reason', None) or error}"
            final = False
        pause = 0.5 * 2**attempt
        if final or attempt >= _ATTEMPTS or time.monotonic() + pause >= deadline:
            if key:
                problem = problem.replace(key, "***")
            raise JudgeError(f"the judge at {url} {problem}")
        time.sleep(pause)


def _post(url: str, key: str | None, payload: Mapping[str, object], *, timeout: float) -> str:
    import urllib.request

    if not url.startswith(("http://", "https://")):
        raise JudgeError(f"the judge's address must start with http:// or https://, not {url}")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    call = urllib.request.Request(
        url, data=json.dumps(payload).encode(), headers=headers, method="POST"
    )
    with urllib.request.urlopen(call, timeout=timeout) as response:
        raw = response.read(_MAX_ANSWER_BYTES)
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        shown = raw[:200].decode("utf-8", "replace")
        raise JudgeError(f"the judge at {url} sent no chat completion: {shown!r}") from None
    if not isinstance(content, str):
        raise JudgeError(f"the judge at {url} sent no text: {content!r:.200}")
    return content


def _read_score(answer: str, minimum: float, maximum: float) -> float:
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        score = json.loads(found.group() if found else answer)
        score = score["score"] if isinstance(score, dict) else score
    except (ValueError, LookupError, RecursionError):
        raise JudgeError(f"the judge gave no score: {answer!r:.200}") from None
    try:
        number = float(score) if type(score) in (int, float) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise JudgeError(f"the judge's score is not a number: {score!r:.200}")
    if not minimum <= number <= maximum:
        raise JudgeError(f"the judge's score {number:g} is not between {minimum:g} and {maximum:g}")
    return number
