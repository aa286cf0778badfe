"""Conversations with tools: who is asked, what is answered, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from tests.rollout.families import BY_NAME, TOOLS, Family

from rnow.errors import TemporaryError
from rnow.rollout.environment import Episodes, RunCall, SingleTurn, ToolEnvironment
from rnow.types import Completion, EnvironmentStep, Prompt, ToolCall, ToolResult

QWEN = BY_NAME["qwen3"]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"q": "x"}}\n</tool_call>'
PROMPT = (1, 2, 3)


def answered(step: EnvironmentStep) -> tuple[int, int]:
    """How many calls of this step were answered, and how many of the answers say that something failed."""
    answers = [message for message in step.messages if message["role"] == "tool"]
    return len(answers), sum(bool(message.get("failed")) for message in answers)


def completion(
    text: str, family: Family = QWEN, *, cut: bool = False, ended_by: str = ""
) -> Completion:
    ids = family.encode(text)
    if not cut:
        ids = (*ids, family.tokenizer.convert_tokens_to_ids(ended_by or family.eos))
    return Completion(
        token_ids=ids,
        logprobs=(-0.5,) * len(ids),
        finish_reason="length" if cut else "stop",
        policy_version=0,
    )


class Tools:
    """Answers every call with its number, and remembers it."""

    def __init__(self, answer: Callable[[ToolCall], Awaitable[ToolResult]] | None = None) -> None:
        self.calls: list[ToolCall] = []
        self._answer = answer

    async def __call__(self, call: ToolCall) -> ToolResult:
        self.calls.append(call)
        if self._answer is not None:
            return await self._answer(call)
        return ToolResult(content=f"answer {len(self.calls)}")


def make(
    run_call: RunCall, family: Family = QWEN, *, max_turns: int = 5, **options: Any
) -> ToolEnvironment:
    return ToolEnvironment(PROMPT, family.dialogue(), run_call, max_turns=max_turns, **options)


def play(environment: ToolEnvironment, *completions: Completion) -> list[EnvironmentStep]:
    async def steps() -> list[EnvironmentStep]:
        assert await environment.start() == environment._prompt_token_ids
        found = [await environment.step(one) for one in completions]
        await environment.close()
        return found

    return asyncio.run(steps())


def test_a_call_is_run_and_answered() -> None:
    tools = Tools()
    (step,) = play(make(tools), completion(f"<think>hm</think>\n\nI look.\n{CALL}"))
    (call,) = tools.calls
    assert (call.id, call.name, call.arguments) == ("call_0_0", "look_up", {"q": "x"})
    said, answer = step.messages
    assert said == {
        "role": "assistant",
        "content": "<think>hm</think>\n\nI look.",
        "tool_calls": [
            {
                "id": "call_0_0",
                "type": "function",
                "function": {"name": "look_up", "arguments": {"q": "x"}},
            }
        ],
    }
    assert answer == {
        "role": "tool",
        "name": "look_up",
        "tool_call_id": "call_0_0",
        "content": "answer 1",
    }
    assert QWEN.tokenizer.decode(step.observation_token_ids) == (
        "\n<|im_start|>user\n<tool_response>\nanswer 1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert (step.done, step.end_reason, *answered(step)) == (False, None, 1, 0)


def test_an_answer_without_a_call_ends() -> None:
    tools = Tools()
    first, second = play(make(tools), completion(CALL), completion("It is 7."))
    assert not first.done
    assert second == EnvironmentStep(
        observation_token_ids=(),
        messages=({"role": "assistant", "content": "It is 7."},),
        done=True,
        end_reason="answer",
    )


def test_ids_go_on_counting_through_the_turns() -> None:
    tools = Tools()
    play(make(tools), completion(CALL + CALL), completion(CALL))
    assert [call.id for call in tools.calls] == ["call_0_0", "call_0_1", "call_1_0"]


def test_calls_of_one_turn_run_at_once_and_are_answered_in_order() -> None:
    running: list[str] = []
    most = 0

    async def answer(call: ToolCall) -> ToolResult:
        nonlocal most
        running.append(call.id)
        most = max(most, len(running))
        for _ in range(10 - int(call.id[-1])):  # the last one is done first
            await asyncio.sleep(0)
        running.remove(call.id)
        return ToolResult(content=call.id)

    (step,) = play(make(Tools(answer)), completion(CALL * 4))
    assert most == 4
    expected = [f"call_0_{index}" for index in range(4)]
    assert [m["content"] for m in step.messages[1:]] == expected
    assert [m["tool_call_id"] for m in step.messages[1:]] == expected
    text = QWEN.tokenizer.decode(step.observation_token_ids)
    assert sorted(expected, key=text.index) == expected


def test_failures_are_told_and_counted() -> None:
    async def answer(call: ToolCall) -> ToolResult:
        return ToolResult(content="Error: timed out", failed=True, detail="Traceback ...")

    (step,) = play(make(Tools(answer)), completion(CALL))
    assert step.messages[1]["failed"] is True
    assert step.messages[1]["detail"] == "Traceback ..."
    assert answered(step) == (1, 1)
    assert "Traceback" not in QWEN.tokenizer.decode(step.observation_token_ids)


def test_a_malformed_call_is_answered_without_a_tool() -> None:
    tools = Tools()
    (step,) = play(make(tools), completion("<tool_call>{bad}</tool_call>" + CALL))
    assert [call.id for call in tools.calls] == ["call_0_1"]
    said, bad, good = step.messages
    assert "<tool_call>{bad}</tool_call>" in said["content"]
    assert said["tool_calls"][0]["function"] == {"name": "", "arguments": {}}
    assert "not valid JSON" in said["tool_calls"][0]["error"]
    assert bad["content"].startswith("Error: the call is not valid JSON")
    assert bad["failed"] is True
    assert good["content"] == "answer 1"
    assert answered(step) == (2, 1)
    assert not step.done, "the student gets another turn to mend it"


def test_hundreds_of_calls() -> None:
    tools = Tools()
    (step,) = play(make(tools), completion(CALL * 500))
    assert len(tools.calls) == 32
    assert len(step.messages) == 1 + 33
    assert "468 more calls" in step.messages[-1]["content"]
    assert answered(step) == (33, 1)


def test_a_turn_cut_by_length_runs_nothing() -> None:
    tools = Tools()
    (step,) = play(make(tools), completion(CALL, cut=True))
    assert tools.calls == []
    assert (step.done, step.end_reason) == (True, "length")
    assert step.messages == ({"role": "assistant", "content": CALL},)


@pytest.mark.parametrize("policy", ["last_tool", "max_turns"])
def test_a_call_in_the_last_turn_is_not_run(policy: Any) -> None:
    tools = Tools()
    environment = make(tools, max_turns=2, termination_policy=policy)
    first, second = play(environment, completion(CALL), completion(CALL))
    assert len(tools.calls) == 1
    assert not first.done
    assert (second.done, second.end_reason, answered(second)[0]) == (True, "max_turns", 0)
    assert len(second.messages) == 1
    assert second.messages[0]["tool_calls"]


def test_an_answer_in_the_last_turn_is_an_answer() -> None:
    (step,) = play(make(Tools(), max_turns=1), completion("done"))
    assert step.end_reason == "answer"


def test_max_turns_goes_on_after_an_answer() -> None:
    environment = make(Tools(), max_turns=3, termination_policy="max_turns")
    steps = play(environment, completion("one"), completion(CALL), completion("three"))
    assert [step.done for step in steps] == [False, False, True]
    assert QWEN.tokenizer.decode(steps[0].observation_token_ids) == "\n<|im_start|>assistant\n"
    assert len(steps[0].messages) == 1
    assert steps[2].end_reason == "max_turns"


def test_max_turns_with_a_template_that_needs_a_user_between() -> None:
    family = BY_NAME["mistral"]
    environment = make(Tools(), family, max_turns=2, termination_policy="max_turns")
    (step,) = play(environment, completion("one", family))
    assert [message["role"] for message in step.messages] == ["assistant", "user"]
    assert family.tokenizer.decode(step.observation_token_ids).endswith("[INST]Continue.[/INST]")


def test_another_end_of_turn_is_kept_as_it_was_sampled() -> None:
    (step,) = play(make(Tools()), completion(CALL, ended_by="<|endoftext|>"))
    text = QWEN.tokenizer.decode(step.observation_token_ids)
    assert text.startswith("<|im_end|>\n<|im_start|>user")


def test_control_tokens_are_left_out_of_the_text_but_those_of_the_format() -> None:
    family = BY_NAME["llama3_1"]  # all of its control tokens are special
    tools = Tools()
    text = '<|python_tag|>{"name": "look_up", "parameters": {}}<|eom_id|>'
    (step,) = play(make(tools, family), completion(text, family, ended_by="<|eom_id|>"))
    assert len(tools.calls) == 1
    assert step.messages[0]["content"] == ""
    (step,) = play(make(tools, family), completion("a<|end_header_id|>b", family))
    assert step.messages[0]["content"] == "ab"


def test_nothing_but_the_end_of_the_turn_is_an_empty_answer() -> None:
    (step,) = play(make(Tools()), completion(""))
    assert step.messages[0]["content"] == ""
    assert step.end_reason == "answer"


def test_a_call_inside_thinking_that_the_prompt_opened_is_none() -> None:
    family = BY_NAME["qwen3_5_think"]
    call = (
        "<tool_call>\n<function=look_up>\n<parameter=q>\nx\n</parameter>\n</function>\n</tool_call>"
    )
    prompt = family.encode("<|im_start|>assistant\n<think>\n")
    tools = Tools()
    environment = ToolEnvironment(prompt, family.dialogue(), tools, max_turns=9)
    first, second, third = play(
        environment,
        completion(f"hm\n</think>\n\n{call}", family),
        completion(f"{call}\n</think>\n\n{call}", family),
        completion(f"{call} never closed", family),
    )
    assert len(tools.calls) == 2, "the next turn begins inside thinking too"
    assert not first.done
    assert not second.done
    assert third.end_reason == "answer"


def test_each_turn_begins_where_the_context_before_it_ends() -> None:
    """The prompt of this rollout opens no thinking; what the template writes after a tool does."""
    family, tools = BY_NAME["qwen3_5_think"], Tools()
    call = "<tool_call>\n<function=look_up>\n</function>\n</tool_call>"
    first, second = play(make(tools, family), completion(call, family), completion(call, family))
    assert len(tools.calls) == 1
    assert not first.done
    assert second.end_reason == "answer"


def test_a_stop_id_that_is_ordinary_text_is_not_part_of_the_answer() -> None:
    ids = QWEN.encode("so.\n")
    ended = Completion(
        token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", policy_version=0
    )
    (step,) = play(make(Tools()), ended)
    assert step.messages[0]["content"] == "so."


def test_types_of_bare_text_come_from_the_tools() -> None:
    family = BY_NAME["qwen3_5_nothink"]
    tools = Tools()
    text = "<tool_call>\n<function=look_up>\n<parameter=n>\n7\n</parameter>\n<parameter=q>\n7\n</parameter>\n</function>\n</tool_call>"
    play(make(tools, family), completion(text, family))
    assert tools.calls[0].arguments == {"n": 7, "q": "7"}


def test_no_tools_at_all() -> None:
    tools = Tools()
    dialogue = QWEN.dialogue(())
    environment = ToolEnvironment(PROMPT, dialogue, tools, max_turns=2)
    (step,) = play(environment, completion(CALL))
    assert [call.name for call in tools.calls] == ["look_up"], "what runs calls says it is unknown"
    assert not step.done


@pytest.mark.parametrize("error", [TemporaryError("host is gone"), RuntimeError("bug")])
def test_a_fault_of_ours_gets_through_as_itself(error: Exception) -> None:
    ended: list[str] = []

    async def answer(call: ToolCall) -> ToolResult:
        if call.id.endswith("0"):
            raise error
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(call.id)
        raise AssertionError

    with pytest.raises(type(error), match=str(error)):
        play(make(Tools(answer)), completion(CALL * 2))
    assert ended == ["call_0_1"], "the other calls of the turn are not left running"


def test_a_cancelled_step_cancels_its_calls() -> None:
    ended: list[str] = []

    async def answer(call: ToolCall) -> ToolResult:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(call.id)
        raise AssertionError

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await make(Tools(answer)).step(completion(CALL * 3))

    asyncio.run(run())
    assert len(ended) == 3


@pytest.mark.parametrize(("cut", "reason"), [(False, "answer"), (True, "length")])
def test_a_single_turn_says_why_it_ended(cut: bool, reason: str) -> None:
    def decode(ids: Sequence[int]) -> str:
        return "text"

    step = asyncio.run(SingleTurn(PROMPT, decode).step(completion("x", cut=cut)))
    assert (step.done, step.end_reason) == (True, reason)


def test_a_dialogue_knows_its_format() -> None:
    assert QWEN.dialogue(TOOLS).format.name == "hermes"


@pytest.mark.parametrize("sandboxed", [True, False])
def test_the_episodes_of_a_project_close_what_they_hold(sandboxed: bool) -> None:
    released: list[str] = []

    async def release(rollout: str) -> None:
        released.append(rollout)

    prompt = Prompt(id="d/3", dataset="d", row=3, messages=[{"role": "user", "content": "x"}])
    episodes = Episodes(
        prompt_token_ids={"d/3": PROMPT},
        decode=lambda ids: "",
        dialogues={"d/3": QWEN.dialogue()},
        run_call=lambda prompt, index: Tools(),
        release=release if sandboxed else None,
    )
    environment = episodes(prompt, 2)
    assert isinstance(environment, ToolEnvironment)
    play(environment, completion("done"))
    assert released == (["d/3#2"] if sandboxed else [])
