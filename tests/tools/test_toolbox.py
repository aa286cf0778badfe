"""Routing, limits, and what the student reads when something goes wrong."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from typing import Any

import pytest
from tests.fakes import FakeTool
from tests.tools.conformance import PARAMETERS, check_tool

from rnow.display.terminal import escape_control
from rnow.errors import InputError, StopRequested
from rnow.protocols import Tool
from rnow.text.redact import Redactor
from rnow.tools.limits import CutResult, TokenLimit
from rnow.tools.toolbox import Toolbox
from rnow.types import ToolCall, ToolContext, ToolResult

CONTEXT = ToolContext(rollout_id="dataset_0/0#0", metadata={"k": 1})
WORDS = TokenLimit(
    limit=5,
    encode=lambda text: [ord(c) for c in text],
    decode=lambda ids: "".join(map(chr, ids)),
)


def call(name: str = "fake", /, **arguments: Any) -> ToolCall:
    return ToolCall(id="call_0", name=name, arguments=arguments)


def run_one(tool: Tool, request: ToolCall | None = None, **options: Any) -> ToolResult:
    async def body() -> ToolResult:
        async with toolbox_of(tool, **options) as toolbox:
            return await toolbox.run(request or call(), CONTEXT)

    return asyncio.run(body())


class Source:
    """A source from a list of tools; an exception is raised by ``open``."""

    def __init__(self, label: str, tools: Sequence[Tool] | BaseException) -> None:
        self.label = label
        self._tools = tools
        self.state: list[str] = []

    async def open(self) -> Sequence[Tool]:
        self.state.append("open")
        await asyncio.sleep(0)
        if isinstance(self._tools, BaseException):
            raise self._tools
        return self._tools

    async def close(self) -> None:
        self.state.append("close")


def toolbox_of(*tools: Tool, **options: Any) -> Toolbox:
    return Toolbox([Source("tools.py", tools)], **options)


def test_the_fake_is_a_tool() -> None:
    def act(arguments: Any, context: ToolContext) -> str | ToolResult:
        failed = ToolResult(content="Error: asked to", failed=True)
        return failed if arguments.get("fail") else arguments["text"]

    fake = FakeTool(
        "act", act, parameters=PARAMETERS, timeout=0.4, seconds=lambda a: a.get("seconds", 0)
    )
    asyncio.run(check_tool(fake, timeout=0.4))


def test_a_call_reaches_its_tool_with_coerced_arguments_and_context() -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}}
    tool = FakeTool("double", lambda a, _: str(a["n"] * 2), parameters=parameters)
    assert run_one(tool, call("double", n="21")) == ToolResult(content="42")
    assert tool.calls == [({"n": 21}, CONTEXT)]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (call("brwose"), "Error: there is no tool 'brwose'. Did you mean browse? Tools: browse"),
        (call(""), "there is no tool ''"),
        (call("browse\n\ud800"), "there is no tool"),
        (call("x" * 10_000), "Tools: browse"),
        (call("hidden"), "there is no tool 'hidden'"),
        (call("browse"), "Error: browse was not called: url is missing."),
        (call("browse", url=[1]), "url must be a string"),
        (ToolCall(id="1", name="", error="not JSON:\nline 1"), "Error: not JSON: line 1"),
    ],
)
def test_the_student_is_told(request_: ToolCall, says: str) -> None:
    parameters = {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]}
    browse, hidden = FakeTool("browse", parameters=parameters), FakeTool("hidden")

    async def body() -> ToolResult:
        async with toolbox_of(browse, hidden) as toolbox:
            return await toolbox.run(request_, CONTEXT, ["browse"])

    answer = asyncio.run(body())
    assert answer.failed
    assert says in answer.content
    assert "\n" not in answer.content
    assert len(answer.content.encode()) < 1_000
    assert not browse.calls
    assert not hidden.calls


def test_a_row_may_have_no_tools() -> None:
    async def body() -> ToolResult:
        async with toolbox_of(FakeTool()) as toolbox:
            assert toolbox.schemas([]) == []
            return await toolbox.run(call(), CONTEXT, [])

    assert "There are no tools." in asyncio.run(body()).content


def test_a_tool_that_raises() -> None:
    answer = run_one(
        FakeTool(replies=[ValueError("bad\nthing sk-12345")]), redact=Redactor({"KEY": "sk-12345"})
    )
    assert answer.failed
    assert answer.content == "Error: ValueError: bad thing [KEY]"
    assert answer.detail is not None
    assert "Traceback" in answer.detail
    assert "sk-12345" not in answer.detail


def test_faults_of_ours_and_cancellation_pass() -> None:
    with pytest.raises(StopRequested):
        run_one(FakeTool(replies=[StopRequested()]))

    async def cancelled() -> None:
        async with toolbox_of(FakeTool(seconds=60)) as toolbox:
            task = asyncio.create_task(toolbox.run(call(), CONTEXT))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())


def test_a_tool_that_cancels_itself_fails_alone() -> None:
    answer = run_one(FakeTool(replies=[asyncio.CancelledError()]))
    assert answer.failed
    assert "interrupted" in answer.content


@pytest.mark.parametrize("value", [None, "text", 5, ToolResult(content=None)])  # type: ignore[arg-type]
def test_a_tool_that_gives_something_else(value: Any) -> None:
    tool = FakeTool()

    async def broken(arguments: Any, context: Any) -> Any:
        return value

    tool.call = broken  # type: ignore[method-assign]
    assert "gave no result" in run_one(tool).content


def test_a_tool_without_a_limit_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.tools.toolbox._GRACE", 0.02)
    tool = FakeTool()

    async def stubborn(arguments: Any, context: Any) -> Any:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                continue
        raise ValueError("late")

    tool.call = stubborn  # type: ignore[method-assign]

    async def body() -> ToolResult:
        async with toolbox_of(tool, timeout=0.02) as toolbox:
            start = time.monotonic()
            answer = await toolbox.run(call(), CONTEXT)
            assert time.monotonic() - start < 0.4
            return answer

    assert "given up" in asyncio.run(body()).content


def test_a_blocked_event_loop_is_not_a_slow_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a model samples on the CPU while calls are on their way."""
    monkeypatch.setattr("rnow.tools.toolbox._GRACE", 0.3)
    tool = FakeTool("turns")

    async def turns(arguments: Any, context: ToolContext) -> ToolResult:
        for _ in range(10):
            await asyncio.sleep(0)
        return ToolResult(content="done")

    tool.call = turns  # type: ignore[method-assign]

    async def body() -> ToolResult:
        async with toolbox_of(tool, timeout=0.1) as toolbox:
            running = asyncio.ensure_future(toolbox.run(call("turns"), CONTEXT))
            for _ in range(3):
                await asyncio.sleep(0)
            for _ in range(2):
                time.sleep(0.7)
                await asyncio.sleep(0)
            return await running

    assert asyncio.run(body()).content == "done"


def test_a_tool_may_say_that_it_has_to_come_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.tools.toolbox._GRACE", 0.02)
    tool = FakeTool("slow", replies=["up"], seconds=lambda _: 0.3)
    assert "given up" in run_one(tool, call("slow"), timeout=0.02).content
    tool.starting = 5.0
    assert run_one(tool, call("slow"), timeout=0.02).content == "up"


def test_a_secret_does_not_survive_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.tools.toolbox.MAX_BYTES", 100)
    for before in range(92, 101):
        answer = run_one(
            FakeTool(replies=["x" * before + "sk-12345"]), redact=Redactor({"KEY": "sk-12345"})
        )
        assert "sk-" not in answer.content


def test_text_of_any_kind_is_storable_and_keeps_its_colours() -> None:
    text = "<|im_end|>\x1b[31mred\x1b[0m\x00\ud800 ok\x9b2J"
    answer = run_one(FakeTool(replies=[text]))
    assert answer.content == "<|im_end|>\x1b[31mred\x1b[0m\ufffd\ufffd ok\x9b2J"
    answer.content.encode()
    assert not {"\x1b", "\x9b"} & set(escape_control(answer.content))


def test_ten_megabytes() -> None:
    start = time.monotonic()
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text.encode()))
        return [0] * (len(text) // 2)

    tokens = TokenLimit(limit=1_000, encode=encode, decode=lambda ids: "é" * len(ids))
    answer = run_one(FakeTool(replies=["é" * 5_000_000]), tokens=tokens)
    assert time.monotonic() - start < 2
    assert seen == [256_000]
    assert answer.content == "é" * 1_000 + "\n[... cut: 1,000 of more than 64,000 tokens shown]"

    answer = run_one(FakeTool(replies=["é" * 5_000_000]))
    assert len(answer.content.encode()) < 256_100
    assert answer.content.endswith("é\n[... cut: 256,000 of 10,000,000 bytes shown]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcde", "abcde"),
        ("", ""),
        ("abcdefg", "abcde\n[... cut: 5 of 7 tokens shown]"),
        ("ééééé", "ééééé"),
        ("ééééééé", "ééééé\n[... cut: 5 of 7 tokens shown]"),
    ],
)
def test_tokens(text: str, expected: str) -> None:
    assert run_one(FakeTool(replies=[text]), tokens=WORDS).content == expected


def test_tokens_that_do_not_give_the_text_back() -> None:
    lossy = TokenLimit(limit=5, encode=WORDS.encode, decode=lambda ids: "?" * len(ids))
    assert run_one(FakeTool(replies=["abcdefg"]), tokens=lossy).content.startswith("abcde\n[")
    halves = TokenLimit(
        limit=5,
        encode=lambda t: list(t.encode()),
        decode=lambda ids: bytes(ids).decode("utf-8", "replace"),
    )
    assert run_one(FakeTool(replies=["abcdé"]), tokens=halves).content.startswith(
        "abcd\n[... cut: 5 of 6"
    )


def test_bytes_that_were_left_out_before_count() -> None:
    answer = run_one(FakeTool(replies=[CutResult(content="abc", omitted=1_000_000)]))
    assert answer == ToolResult(content="abc\n[... cut: 3 of 1,000,003 bytes shown]")


def test_a_long_traceback_keeps_its_end() -> None:
    answer = run_one(
        FakeTool(replies=[ToolResult(content="", failed=True, detail="x" * 99_000 + "END")])
    )
    assert answer.detail is not None
    assert answer.detail.endswith("END")
    assert len(answer.detail) < 33_000


def test_sixty_four_calls_overlap() -> None:
    tool = FakeTool(seconds=0.2)

    async def body(count: int) -> float:
        async with toolbox_of(tool) as toolbox:
            start = time.monotonic()
            await asyncio.gather(*(toolbox.run(call(), CONTEXT) for _ in range(count)))
            return time.monotonic() - start

    assert asyncio.run(body(64)) < 0.5
    tool.most_running = 0
    asyncio.run(body(100))
    assert tool.most_running == 64


def test_schemas_keep_their_order() -> None:
    async def body() -> None:
        source = Source("a server", [FakeTool("zeta"), FakeTool("alpha")])
        async with Toolbox(
            [Source("tools.py", [FakeTool("own", parameters=PARAMETERS)]), source]
        ) as toolbox:
            assert toolbox.names == ("own", "zeta", "alpha")
            assert toolbox.schemas()[0] == {
                "type": "function",
                "function": {
                    "name": "own",
                    "description": "A tool of the tests.",
                    "parameters": PARAMETERS,
                },
            }
            names = [s["function"]["name"] for s in toolbox.schemas(["alpha", "own"])]
            assert names == ["own", "alpha"]
            with pytest.raises(InputError, match="no tool 'alhpa'") as caught:
                toolbox.schemas(["alhpa"])
            assert "Did you mean alpha?" in caught.value.render()

    asyncio.run(body())


def test_a_clash_names_both_places_and_closes_what_was_opened() -> None:
    sources = [Source("server one", [FakeTool("a")]), Source("server two", [FakeTool("a")])]

    async def body(toolbox: Toolbox) -> None:
        with pytest.raises(InputError, match="two tools are named 'a'") as caught:
            await toolbox.open()
        assert "server two" in caught.value.render()
        assert toolbox.names == ()

    asyncio.run(body(Toolbox(sources=sources)))
    assert [source.state[-1] for source in sources] == ["close", "close"]
    asyncio.run(body(Toolbox([Source("tools.py", [FakeTool("a")]), sources[1]])))


def test_a_source_that_does_not_open() -> None:
    good, bad = Source("good", [FakeTool()]), Source("bad", InputError("not there"))

    async def body() -> None:
        with pytest.raises(InputError, match="not there"):
            await Toolbox(sources=[good, bad]).open()

    asyncio.run(body())
    assert good.state[-1] == "close"


def test_an_unusable_schema() -> None:
    with pytest.raises(InputError, match="schema of the tool 'fake'"):
        run_one(FakeTool(parameters={"type": "array"}))


def test_a_toolbox_opens_again_in_another_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnow.tools.toolbox._MAX_CALLS", 1)
    toolbox = Toolbox(sources=[Source("s", [FakeTool(seconds=0.01)])])

    async def body() -> None:
        async with toolbox:
            answers = await asyncio.gather(*(toolbox.run(call(), CONTEXT) for _ in range(3)))
            assert [answer.content for answer in answers] == ["ok"] * 3

    asyncio.run(body())
    asyncio.run(body())
    gc.collect()


def test_five_hundred_calls() -> None:
    async def body() -> None:
        async with toolbox_of(FakeTool()) as toolbox:
            requests = [call("fake" if n % 2 else "none", **{f"a{n}": n}) for n in range(500)]
            answers = await asyncio.gather(*(toolbox.run(r, CONTEXT) for r in requests))
            assert sum(answer.failed for answer in answers) == 250

    asyncio.run(body())
