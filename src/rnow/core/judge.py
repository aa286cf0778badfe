"""``llm_judge``: ask a model behind an OpenAI-compatible endpoint for a number.

This file is imported in every process that runs rewards, most of which never ask a judge: it imports little.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from rnow.core.deadline import answer_by
from rnow.core.judge_errors import JudgeError, JudgeUnavailable
from rnow.core.judge_http import SYSTEM, Question, ask, clean_key, endpoint, without_key
from rnow.core.judge_rule import Rule, read_rule
from rnow.core.verdict import verdict

__all__ = ["JudgeError", "JudgeUnavailable", "llm_judge"]

DEFAULT_MODEL = "gpt-4o-mini"
DEFAULT_API_URL = "https://api.openai.com/v1"
SETTINGS = (
    *("LLM_JUDGE_API_KEY", "LLM_JUDGE_API_URL"),
    *("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"),
)
"""Variables that ``llm_judge`` looks up in ``secrets`` and in the environment."""


def llm_judge(
    prompt: str,
    *,
    api_url: str | None = None,
    api_key: str | None = None,
    secrets: Mapping[str, Any] | None = None,
    model: str | None = None,
    temperature: float | None = 0.0,
    max_tokens: int | None = None,
    timeout: float = 60.0,
    schema: Mapping[str, Any] | None = None,
    score_key: str = "score",
    system: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    base_url: str | None = None,
    **more: object,
) -> Any:
    """The score that a judge model gives to ``prompt``, checked. In a sync reward it is a float; in an async one ``await`` it, or
    return it as it is.

    Args:
        prompt: what to judge and by which rule.
        api_url: the endpoint, with or without ``/chat/completions``; default ``LLM_JUDGE_API_URL``, else
            ``OPENAI_BASE_URL``, else OpenAI. ``base_url`` is the same.
        api_key: default ``LLM_JUDGE_API_KEY``, else ``OPENAI_API_KEY``. All such names are looked up in ``secrets``, then in
            the environment, where rnow puts what the project's ``.env`` says of them.
        secrets: ``args.secrets`` of the reward.
        model: default ``OPENAI_MODEL``, else ``gpt-4o-mini``.
        temperature: None leaves it to the server, and so does 0 where the server refuses it.
        max_tokens: of the judge's answer, its reasoning included; None leaves it to the server.
        timeout: seconds for the whole call, up to three attempts; the time limit of the running reward cuts it short.
        schema: the JSON schema of the answer, an object. Default: one number from 0 to 1, or ``minimum`` to ``maximum``.
        score_key: the property of ``schema`` that is the score: a number, or a boolean as 1 and 0. It is checked against its
            own part of the schema; of the others only those that are required must be there.
        system: extra instruction for the judge.
        minimum, maximum: the range of the score, whatever the schema says.
        more: further fields of the request, such as ``top_p`` or ``reasoning_effort``.

    Raises:
        JudgeUnavailable: the judge cannot be asked now: unreachable, too slow, 429, 5xx. A run that learns from it waits.
        JudgeError: no key, a refusal, or an answer that is not a score.
    """
    rule = read_rule(schema, score_key, minimum=minimum, maximum=maximum)
    given = secrets or {}
    url, key = _server(given, api_url or base_url, api_key)
    fields = {"temperature": temperature, "max_tokens": max_tokens}
    payload = {
        "model": model or _look_up(given, "OPENAI_MODEL") or DEFAULT_MODEL,
        "messages": _messages(prompt, rule, system),
        "response_format": rule.response_format(),
        **{name: value for name, value in fields.items() if value is not None},
        **more,
    }
    _check_json(payload)
    spare = {"response_format", "max_tokens"} | ({"temperature"} if temperature == 0 else set())
    spare = frozenset(spare & payload.keys() | {SYSTEM})
    question = Question(url=url, key=key, payload=payload, spare=spare)
    due = answer_by()
    return verdict(lambda: _score(question, rule, min(time.monotonic() + timeout, due)))


def _score(question: Question, rule: Rule, until: float) -> float:
    try:
        return rule.read(ask(question, until))
    except JudgeUnavailable:
        raise
    except JudgeError as error:
        text, shown = without_key(str(error), question.key), question.shown
        raise JudgeError(text if shown in text else f"{shown}: {text}") from None


def _server(
    secrets: Mapping[str, Any], api_url: str | None, api_key: str | None
) -> tuple[str, str | None]:
    """The judge's endpoint and key; only OpenAI's needs one."""
    address = api_url or _look_up(secrets, "LLM_JUDGE_API_URL", "OPENAI_BASE_URL")
    key = clean_key(api_key or _look_up(secrets, "LLM_JUDGE_API_KEY", "OPENAI_API_KEY"))
    if key is None and address is None:
        raise JudgeError(
            "llm_judge has no key: put OPENAI_API_KEY in .env (or LLM_JUDGE_API_URL of your own server)"
        )
    return endpoint(address or DEFAULT_API_URL), key


def _look_up(secrets: Mapping[str, Any], *names: str) -> str | None:
    """The first of these that is set, in the secrets before the environment."""
    for settings in (secrets, os.environ):
        for name in names:
            if value := settings.get(name):
                return str(value)
    return None


def _messages(prompt: str, rule: Rule, system: str | None) -> list[dict[str, str]]:
    instruction = rule.instruction()
    return [
        {"role": "system", "content": f"{instruction}\n{system}" if system else instruction},
        {"role": "user", "content": prompt},
    ]


def _check_json(payload: Mapping[str, object]) -> None:
    for name, value in payload.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise JudgeError(f"llm_judge cannot send {name} as JSON: {error}") from None
