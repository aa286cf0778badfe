"""How a call ended, in words, from what a worker or the supervisor said of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rnow.usercode.functions import how_it_ended
from rnow.usercode.text import escape, redact

Status = Literal["ok", "raised", "invalid", "timeout", "died"]

_MAX_ERROR = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOutcome:
    """How a call ended. Secrets are taken out of every text.

    ``value`` is a tool's text or a reward's number, None unless ``status`` is ``ok``. ``error`` is one line for the model:
    ``raised`` an exception, ``invalid`` result of a reward, ``timeout``, or ``died`` with its process. ``place`` is the
    line of the function's file that raised, ``detail`` the traceback. ``omitted`` counts the bytes cut off the end of
    ``value``; ``seconds`` is the time the function took (0 when it did not end).
    """

    status: Status
    value: Any = None
    error: str | None = None
    place: str | None = None
    detail: str | None = None
    omitted: int = 0
    seconds: float = 0.0


def read_outcome(
    body: bytes,
    *,
    seconds: float,
    timeout: float,
    limit: int,
    file: str,
    hidden: Mapping[str, str],
    hidden_in_value: Mapping[str, str],
) -> CallOutcome:
    """The body of a RESULT.

    Args:
        limit: bytes of a tool's text. The worker has cut it; a worker is not trusted.
        file: the name of the user's file.
        hidden: secrets by name, which are taken out of errors.
        hidden_in_value: those that are taken out of what the model reads.
    """
    answer = json.loads(body)
    if "value" in answer:
        value, omitted = answer["value"], answer.get("omitted", 0)
        if isinstance(value, str):
            raw = value.encode("utf-8", "replace")
            if len(raw) > limit:
                value, omitted = raw[:limit].decode("utf-8", "ignore"), omitted + len(raw) - limit
            value = redact(value, hidden_in_value)
        return CallOutcome(status="ok", value=value, omitted=omitted, seconds=seconds)
    if "bad" in answer:
        return CallOutcome(status="invalid", error=redact(answer["bad"], hidden), seconds=seconds)
    if "error" in answer:
        return _raised(answer["error"], seconds, hidden)
    if answer.get("fault") == "timeout":
        return CallOutcome(status="timeout", error=f"took longer than {timeout:g} s")
    return CallOutcome(status="died", error=redact(_ending(answer, file), hidden))


def _raised(error: Mapping[str, Any], seconds: float, hidden: Mapping[str, str]) -> CallOutcome:
    """One line: kind and message."""
    text = redact(escape(" ".join(error["message"].split())), hidden)[:_MAX_ERROR]
    return CallOutcome(
        status="raised",
        error=f"{error['type']}: {text}" if text else error["type"],
        place=error.get("place"),
        detail=redact(error.get("traceback") or "", hidden) or None,
        seconds=seconds,
    )


def _ending(answer: Mapping[str, Any], file: str) -> str:
    fault, why = answer.get("fault"), escape(str(answer.get("why")))
    if fault == "died":
        return f"its process ended ({how_it_ended(answer.get('status'))})"
    if fault == "processes":
        return f"started more than {answer['limit']} processes"
    if fault == "blocked":
        return "was ended with its process, which another call had blocked"
    if fault == "worn":
        return "was ended with its process, in which too many timed-out calls went on"
    if fault == "start":
        return f"a process of {file} could not be started: {why}"[:_MAX_ERROR]
    return f"the process of {file} failed: {why}"
