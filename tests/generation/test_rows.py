"""Conversations as rows: what a row keeps, and what can be none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rnow.generation.rows import answered_by, training_row, why_unfit, with_thinking
from rnow.types import Message, Prompt, Rollout

ASKED: Message = {"role": "user", "content": "1 plus 2"}


def call(**more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": 1, "b": 2}}
    calls = [{"id": "c", "type": "function", "function": function, **more}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


RESULT: Message = {"role": "tool", "name": "add", "tool_call_id": "c", "content": "3"}
SAID: Message = {"role": "assistant", "content": "3"}


def prompt(**changes: Any) -> Prompt:
    return replace(Prompt(id="d/0", dataset="d", row=0, messages=(ASKED,)), **changes)


def rollout(*messages: Message, **changes: Any) -> Rollout:
    base = Rollout(
        prompt_id="d/0",
        index=0,
        turns=(),
        messages=messages,
        status="completed",
        end_reason="answer",
    )
    return replace(base, **changes)


def test_a_row() -> None:
    told = {**RESULT, "failed": True, "detail": "a traceback of /home"}
    row = training_row(
        prompt(
            tools=("add",),
            rewards=("right",),
            metadata={"answer": 3},
            docker="python",
            docker_env={"A": "b"},
        ),
        rollout(call(), told, SAID),
        "gpt",
    )
    assert row == {
        "messages": [ASKED, call(), RESULT, SAID],
        "tools": ["add"],
        "rewards": ["right"],
        "metadata": {"answer": 3},
        "docker": "python",
        "docker_env": {"A": "b"},
        "teacher": "gpt",
    }
    assert answered_by(row, prompt()) == (call(), RESULT, SAID)


def test_a_plain_row_has_no_empty_keys() -> None:
    row = training_row(prompt(), rollout(SAID), "gpt")
    assert row == {"messages": [ASKED, SAID], "teacher": "gpt"}


def test_variables_are_not_filled_in_twice() -> None:
    asked = prompt(variables={"name": "x"})
    kept = training_row(asked, rollout(SAID), "gpt")
    assert kept["variables"] == {"name": "x"}
    spelled = training_row(asked, rollout({"role": "assistant", "content": "echo $name"}), "gpt")
    assert "variables" not in spelled


def test_thinking_that_the_prompt_opened_is_closed_in_the_row_as_well() -> None:
    half = {"role": "assistant", "content": "\nso three\n</think>\n\n3"}
    whole = {"role": "assistant", "content": "<think>\nso three\n</think>\n\n3"}
    assert training_row(prompt(), rollout(half), "gpt")["messages"][1] == whole
    assert training_row(prompt(), rollout(whole), "gpt")["messages"][1] == whole


def test_thinking_given_apart() -> None:
    assert with_thinking("3", " so three\n") == "<think>\nso three\n</think>\n\n3"
    assert with_thinking("3", " ") == "3"


@pytest.mark.parametrize(
    ("finished", "reason"),
    [
        (rollout(SAID), None),
        (rollout(call(), RESULT, SAID), None),
        (rollout(SAID, {"role": "user", "content": "Continue."}, SAID), None),
        (rollout({"role": "assistant", "content": "<think>hm</think>3"}), None),
        (rollout(SAID, status="truncated", end_reason="length"), "cut short"),
        (rollout(status="truncated", end_reason="window"), "cut short"),
        (rollout(call(error="no JSON"), RESULT, SAID), "malformed call"),
        (rollout(call(), RESULT, call(), end_reason="max_turns"), "no answer within max_turns"),
        (rollout({"role": "assistant", "content": " \n"}), "empty"),
        (rollout({"role": "assistant", "content": "<think>hm</think>"}), "empty"),
        (rollout(), "empty"),
    ],
)
def test_what_can_be_a_row(finished: Rollout, reason: str | None) -> None:
    assert why_unfit(finished) == reason
