"""A teacher's conversation as a row of train.jsonl, and why one can be none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rnow.core.messages import get_response
from rnow.project.variables import substitute_message
from rnow.rollout.tool_calls import THINK_CLOSE, THINK_OPEN
from rnow.types import Message, Prompt, Rollout

_NOT_SAID = ("failed", "detail")
"""What messages of tools say to transcripts alone."""


def training_row(prompt: Prompt, rollout: Rollout, teacher: str) -> dict[str, Any]:
    """The prompt and all that followed, for ``dataset_type: sft``; ``teacher`` is the model's name.

    Variables are filled in already: they are kept for rewards only where filling them in again would change nothing.
    """
    messages = [*prompt.messages, *map(_as_trained, rollout.messages)]
    row: dict[str, Any] = {"messages": [dict(message) for message in messages]}
    if prompt.tools is not None:
        row["tools"] = list(prompt.tools)
    if prompt.rewards:
        row["rewards"] = list(prompt.rewards)
    if prompt.metadata:
        row["metadata"] = dict(prompt.metadata)
    if prompt.variables and all(
        substitute_message(message, prompt.variables) == message for message in messages
    ):
        row["variables"] = dict(prompt.variables)
    if prompt.docker is not None:
        row["docker"] = prompt.docker
    if prompt.docker_env:
        row["docker_env"] = dict(prompt.docker_env)
    return {**row, "teacher": teacher}


def answered_by(row: Mapping[str, Any], prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a row after those of its prompt."""
    return tuple(row["messages"][len(prompt.messages) :])


def why_unfit(rollout: Rollout) -> str | None:
    """Why a finished rollout can be no row, in words; None where it can.

    What was cut, or stopped before an answer, teaches to stop there; a call that could not be read cannot be written down.
    """
    if rollout.status == "truncated":
        return "cut short"
    said = [message for message in rollout.messages if message.get("role") == "assistant"]
    for message in said:
        calls = message.get("tool_calls")
        if isinstance(calls, list) and any("error" in call for call in calls):
            return "malformed call"
    if not said:
        return "empty"
    if said[-1].get("tool_calls"):
        return "no answer within max_turns"
    return None if get_response(said[-1:]) else "empty"


def with_thinking(content: str, reasoning: str) -> str:
    """A message's text with the thinking that a server gave apart, as models write it themselves."""
    if not reasoning.strip():
        return content
    return f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{content}"


def _as_trained(message: Message) -> dict[str, Any]:
    """A message of the rollout with what a template reads. Where the prompt opened the thinking, what was written lacks that."""
    plain = {key: value for key, value in message.items() if key not in _NOT_SAID}
    content = plain.get("content")
    if (
        plain.get("role") == "assistant"
        and isinstance(content, str)
        and THINK_CLOSE in content
        and THINK_OPEN not in content
    ):
        plain["content"] = f"{THINK_OPEN}\n{content.lstrip()}"
    return plain
