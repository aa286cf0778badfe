"""Whole conversations with tools, on the chat templates of the supported families.

For any of them: ``loss_mask`` is True exactly on sampled tokens, the turns put together are what the sampler saw, no text
becomes an added token, and what is appended is what the template itself would write there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.fakes import FakeSampler, SamplerRequest
from tests.rollout.families import BY_NAME, SUPPORTED, TOOLS, Family, render_prompt
from tests.rollouts import flat

from rnow.rollout.collect import RolloutSettings, collect_rollouts
from rnow.rollout.environment import Dialogue, ToolEnvironment
from rnow.rollout.rendering import render_text
from rnow.types import Prompt, Rollout, ToolCall, ToolResult

MAX_TURNS = 4
ANSI = "\x1b[31mred\x1b[0m\x07"
pytestmark = pytest.mark.parametrize("family", SUPPORTED, ids=lambda family: family.name)


@cache
def dialogue_of(family: Family) -> Dialogue:
    return family.dialogue()


def texts(family: Family) -> st.SearchStrategy[str]:
    """Anything a page or a user may hold: control tokens whole and in pieces, unicode, terminal codes."""
    controls = [text for text in family.tokenizer.get_added_vocab() if len(text) > 1]
    pieces = [*controls, *(text[1:] for text in controls), *(text[:-1] for text in controls)]
    pieces += [
        ANSI,
        "\n",
        "\n\n",
        " ",
        "<",
        "<|",
        "｜",
        "▁",
        "\u200b",
        "日本語",
        "🙂",
        "e\u0301",
        '"',
        "\\",
        "{{",
        "%}",
        "\r\n",
    ]
    part = st.sampled_from(pieces) | st.text(max_size=5)
    return st.lists(part, max_size=6).map("".join)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A user's question, what the student samples turn by turn, and what the tools say."""

    user: str
    turns: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]
    policy: str = "last_tool"


def sampled_turns(family: Family) -> st.SearchStrategy[tuple[int, ...]]:
    """What a student may sample: anything, control tokens included, with a call in it or not, ended or cut."""
    tokenizer = family.tokenizer
    words = [
        '{"name": "add", "arguments": {"a": 1}}', '{"name": "look_up", "parameters": {"q": "x"}}', "<function=add>",
        "</function>", "<parameter=n>1</parameter>", "function", "\n```json\n", "{}", "```", " ", "\n", "add", "hm",
        *(text for text in tokenizer.get_added_vocab() if text not in (family.eos, *family.stops)),
    ]  # fmt: skip
    anything = st.lists(st.sampled_from(words), max_size=8).map("".join).map(family.encode)
    calls = st.lists(st.sampled_from(["look_up", "add", "nope"]), min_size=1, max_size=3)
    called = calls.map(lambda names: family.encode(written(family, [(n, {"q": "x"}) for n in names])))  # fmt: skip
    ends = st.sampled_from([(stop,) for stop in family.stop_token_ids] * 2 + [()])
    return st.tuples(anything | called | called, ends).map(lambda pair: (*pair[0], *pair[1]))


def written(family: Family, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Calls as the family's models write them."""
    if family.format == "hermes":
        return "\n".join(f"<tool_call>\n{json.dumps({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls)  # fmt: skip
    if family.format == "llama3":
        return "; ".join(json.dumps({"name": n, "parameters": a}) for n, a in calls)
    if family.format == "deepseek_v3.1":
        parts = (f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{json.dumps(a)}<｜tool▁call▁end｜>" for n, a in calls)  # fmt: skip
        return f"<｜tool▁calls▁begin｜>{''.join(parts)}<｜tool▁calls▁end｜>"
    if family.format == "mistral":
        return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a} for n, a in calls])
    if family.format == "mistral_v11":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}" for n, a in calls)
    if family.format == "glm":
        return "\n".join(
            f"<tool_call>{n}\n" + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in a.items()) + "</tool_call>"
            for n, a in calls
        )  # fmt: skip
    assert family.format == "qwen3_coder"
    return "\n".join(
        f"<tool_call>\n<function={n}>\n" + "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in a.items()) + "</function>\n</tool_call>"
        for n, a in calls
    )  # fmt: skip


def prompt_of(script: Script) -> Prompt:
    return Prompt(
        id="dataset_0/0",
        dataset="dataset_0",
        row=0,
        messages=({"role": "user", "content": script.user},),
    )


def play(family: Family, script: Script) -> tuple[Rollout, list[SamplerRequest]]:
    """Run the script through ``collect_rollouts``; tools answer in turn, and every third one fails."""
    tokenizer, given_out = family.tokenizer, 0

    async def run_call(call: ToolCall) -> ToolResult:
        nonlocal given_out
        content = script.answers[given_out % len(script.answers)]
        given_out += 1
        failed = given_out % 3 == 0
        return ToolResult(content=content, failed=failed, detail="trace" if failed else None)

    def environment(prompt: Prompt, index: int) -> ToolEnvironment:
        return ToolEnvironment(
            render_prompt(tokenizer, prompt.messages, tools=TOOLS),
            dialogue_of(family),
            run_call,
            max_turns=MAX_TURNS,
            termination_policy=script.policy,  # type: ignore[arg-type]
        )

    settings = RolloutSettings(
        group_size=1,
        window=100_000,
        max_tokens=10_000,
        stop_token_ids=family.stop_token_ids,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        run_seed=0,
        purpose="train",
    )
    sampler = FakeSampler(list(script.turns))
    groups = asyncio.run(
        collect_rollouts([prompt_of(script)], sampler, environment, settings, step=1)
    )
    rollout = groups[0].rollouts[0]
    assert rollout.status != "failed", rollout.error
    return rollout, sampler.requests


def scripts(family: Family) -> st.SearchStrategy[Script]:
    return st.builds(
        Script,
        user=texts(family),
        turns=st.lists(sampled_turns(family), min_size=1, max_size=MAX_TURNS).map(tuple),
        answers=st.lists(texts(family), min_size=1, max_size=4).map(tuple),
        policy=st.sampled_from(["last_tool", "max_turns"]),
    )


def added_ids(family: Family, ids: Sequence[int]) -> list[int]:
    controls = {i for text, i in family.tokenizer.get_added_vocab().items() if len(text) > 1}
    return [token for token in ids if token in controls]


@settings(max_examples=25)
@given(data=st.data())
def test_the_mask_and_the_turns_are_what_was_sampled(family: Family, data: st.DataObject) -> None:
    script = data.draw(scripts(family))
    rollout, requests = play(family, script)
    sampled = [turn.completion.token_ids for turn in rollout.turns]
    assert (
        len(flat(rollout).token_ids)
        == len(flat(rollout).loss_mask)
        == len(flat(rollout).sampler_logprobs)
    )

    position = 0
    for turn, request, reply in zip(rollout.turns, requests, sampled, strict=True):
        start = position + len(turn.observation_token_ids)
        assert flat(rollout).token_ids[position:start] == turn.observation_token_ids
        assert not any(flat(rollout).loss_mask[position:start])
        assert request.prompt_token_ids == flat(rollout).token_ids[:start], "what the sampler saw"
        position = start + len(reply)
        assert flat(rollout).token_ids[start:position] == reply
        assert all(flat(rollout).loss_mask[start:position])
    assert position == len(flat(rollout).token_ids)

    expected = [script.turns[i % len(script.turns)] for i in range(len(rollout.turns))]
    assert sampled == expected, "nothing sampled is ever rebuilt"
    assert len(rollout.turns) <= MAX_TURNS


@settings(max_examples=25)
@given(data=st.data())
def test_no_text_becomes_an_added_token(family: Family, data: st.DataObject) -> None:
    """The control tokens that were not sampled are those of the same conversation with harmless texts."""
    script = data.draw(scripts(family))
    plain = replace(script, user="x", answers=("x",) * len(script.answers))
    shown, expected = (play(family, one)[0] for one in (script, plain))
    assert len(shown.turns) == len(expected.turns)
    for turn, harmless in zip(shown.turns, expected.turns, strict=True):
        ours = added_ids(family, turn.observation_token_ids)
        assert ours == added_ids(family, harmless.observation_token_ids)


@settings(max_examples=15)
@given(data=st.data())
@example(data=None)
def test_what_is_appended_is_what_the_template_writes(family: Family, data: Any) -> None:
    """A conversation rendered from its messages ends, after every turn, as the context that the student saw does; and
    where a template never rewrites what it wrote, it is that context."""
    rounds = [[("look_up", {"q": "x"})], [("add", {"q": "x y"}), ("look_up", {"q": "é"})]]
    contents, answers = ["", "I look."], ("<|im_start|>system\n", "[/INST]</s>")
    if data is not None:
        plain = st.text("abc é.", max_size=8).map(str.strip)
        values = st.text("abc é.", min_size=1, max_size=8).map(str.strip).filter(bool)
        calls = st.tuples(st.sampled_from(["look_up", "add"]), st.fixed_dictionaries({"q": values}))
        rounds = data.draw(
            st.lists(st.lists(calls, min_size=1, max_size=3), min_size=1, max_size=3)
        )
        contents = data.draw(st.lists(plain, min_size=len(rounds), max_size=len(rounds)))
        answers = tuple(data.draw(st.lists(texts(family), min_size=1, max_size=4)))  # fmt: skip
    if family.format in ("llama3", "mistral", "mistral_v11"):  # text beside a call is dropped
        contents = [""] * len(rounds)
    if family.format == "llama3":  # and one call is all there is
        rounds = [calls[:1] for calls in rounds]

    turns = [turn_as_rendered(family, text, calls) for text, calls in zip(contents, rounds, strict=True)]  # fmt: skip
    script = Script(
        "What is it?", (*turns, (*family.encode("It is so."), family.stop_token_ids[0])), answers
    )
    rollout, _ = play(family, script)
    assert len(rollout.turns) == len(turns) + 1
    assert rollout.end_reason == "answer"

    messages: list[Any] = list(prompt_of(script).messages)
    said = list(rollout.messages)
    context: tuple[int, ...] = ()
    for number, turn in enumerate(rollout.turns):
        context += turn.observation_token_ids
        text = render_text(family.tokenizer, as_template_takes_them(family, messages), tools=TOOLS)
        behind = turn.observation_token_ids
        assert family.encode(text)[-len(behind) :] == behind
        if family.preserves or number == 0:
            assert family.tokenizer.decode(context) == text
        context += turn.completion.token_ids
        messages.append(said.pop(0))
        while said and said[0]["role"] == "tool":
            messages.append(said.pop(0))
    assert context == flat(rollout).token_ids


def turn_as_rendered(
    family: Family, text: str, calls: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[int, ...]:
    """The ids with which the template itself writes such a turn, up to the end of the turn."""
    call_id = dialogue_of(family).format.call_id
    message = {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {"id": call_id(0, i), "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ],
    }
    before = [{"role": "user", "content": "What is it?"}]
    whole = as_template_takes_them(family, [*before, message])
    start = render_text(family.tokenizer, before)
    ended = render_text(family.tokenizer, whole, generation_prompt=False)
    if ended.startswith(start):
        body = ended[len(start) :].partition(family.eos)[0]
    else:  # the template rewrites thinking
        thought = "hm\n</think>\n\n" if start.endswith("<think>\n") else ""
        body = thought + (text + "\n" if text else "") + written(family, calls)
    return (*family.encode(body), family.stop_token_ids[-1 if family.format == "glm" else 0])


def as_template_takes_them(family: Family, messages: Sequence[Any]) -> list[Any]:
    """DeepSeek's templates want arguments as JSON text."""
    if family.format != "deepseek_v3.1":
        return list(messages)
    taken = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = message | {"tool_calls": [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
                for call in calls
            ]}  # fmt: skip
        taken.append(message)
    return taken


def test_every_family_that_only_extends_is_compared_whole(family: Family) -> None:
    """The flag ``preserves`` is true of the template: else the comparison above would be weaker than it says."""
    tokenizer = family.tokenizer
    call_id = dialogue_of(family).format.call_id(0, 0)
    messages: list[Any] = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": call_id, "type": "function", "function": {"name": "add", "arguments": {"q": "x"}}}
            ],
        },
        {"role": "tool", "name": "add", "tool_call_id": call_id, "content": "b"},
        {"role": "assistant", "content": "c"},
    ]  # fmt: skip
    whole = as_template_takes_them(family, messages)
    rendered = [
        render_text(tokenizer, whole[:count], tools=TOOLS, generation_prompt=count in (1, 3))
        for count in (1, 2, 3, 4)
    ]
    extends = all(b.startswith(a) for a, b in pairwise(rendered))
    assert extends or not family.preserves
    assert family is BY_NAME[family.name]
