"""The client of chat endpoints: what it sends, what it waits for, what it makes of an answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from tests.serving.scripted import ScriptedServer, body, chat, cut, hang_up, html, status

from rnow.errors import InputError
from rnow.serving.chat import ChatAnswer, ChatClient, Usage, _completion, check_address
from rnow.serving.http import BadAnswer, Refused, ServerDown, _retry_after

ASKED: list[dict[str, object]] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        started.script = lambda body: chat("hello")
        yield started


def ask(
    server: ScriptedServer, path: str = "", timeout: float = 20.0, **options: Any
) -> ChatAnswer:
    client = ChatClient(server.url + path, None, timeout)
    return asyncio.run(client.complete(ASKED, model="base", max_tokens=32, **options))


def test_an_answer(server: ScriptedServer) -> None:
    assert ask(server) == ChatAnswer(
        content="hello", reasoning="", calls=(), finish_reason="stop", usage=Usage(10, 5)
    )
    assert server.requests == [
        ("/v1/chat/completions", {"model": "base", "messages": ASKED, "max_tokens": 32})
    ]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/api/v1/", "/api/v1/chat/completions"),
        ("/v1beta/openai/", "/v1beta/openai/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1beta/openai/chat/completions/", "/v1beta/openai/chat/completions"),
    ],
)
def test_addresses(server: ScriptedServer, path: str, asked: str) -> None:
    ask(server, path)
    assert server.requests[0][0] == asked


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://h/v1?api-version=1", "query"),
        ("http://[::1/v1", "not an http"),
        ("localhost:8000/v1", "not an http"),
        ("http://h:99999/v1", "not an http"),
        ("", "not an http"),
    ],
)
def test_an_address_that_cannot_be_one_is_refused(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        check_address(url, where="--url")
    assert caught.value.where == "--url"
    assert caught.value.fix


def test_what_is_sent_of_a_conversation(server: ScriptedServer) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    conversation: list[dict[str, object]] = [
        {"role": "user", "content": [{"type": "text", "text": "1+1"}], "note": "kept by rows"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}, "error": "x"}],
        },
        {"role": "tool", "name": "add", "tool_call_id": "7", "content": "2", "detail": "trace"},
    ]
    client = ChatClient(server.url)
    asked = client.complete(
        conversation, model="base", max_tokens=9, tools=tools, temperature=0.5, top_p=0.9
    )
    asyncio.run(asked)
    (_, sent) = server.requests[0]
    call = {
        "id": "call_0",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": 1}'},
    }
    assert sent == {
        "model": "base",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+1"}]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "tool_call_id": "7", "content": "2"},
        ],
        "tools": tools,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 9,
    }


@pytest.mark.parametrize(
    ("given", "name", "arguments", "error"),
    [
        ('{"a": "1"}', "add", {"a": "1"}, None),
        ({"a": 1}, "add", {"a": 1}, None),
        ("", "add", {}, None),
        (None, "add", {}, None),
        ('{"a": ', "add", {}, "no JSON object"),
        ("[1]", "add", {}, "no JSON object"),
        ('{"a": NaN}', "add", {}, "no JSON object"),
        ('{"a": 1}', None, {}, "names no tool"),
    ],
)
def test_calls(
    server: ScriptedServer, given: object, name: str | None, arguments: object, error: str | None
) -> None:
    answer = chat(None, ("add", {}))
    answer["choices"][0]["message"]["tool_calls"][0]["function"] = {
        "name": name,
        "arguments": given,
    }
    server.script = lambda body: answer
    (call,) = ask(server).calls
    assert call.arguments == arguments
    assert call.id == "call-0"
    assert (error is None) == (call.error is None)
    assert (error or "") in (call.error or "")


@pytest.mark.parametrize("calls", ["x", [None], [{"function": 3}], {"a": 1}])
def test_calls_of_no_known_form_are_no_crash(server: ScriptedServer, calls: object) -> None:
    server.script = lambda body: chat("", tool_calls=calls)
    assert all(call.error for call in ask(server).calls)


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_thinking_and_parts(server: ScriptedServer, key: str) -> None:
    parts = [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]
    server.script = lambda body: chat(parts, usage=None, **{key: "two and two"})  # type: ignore[arg-type]
    answer = ask(server)
    assert (answer.content, answer.reasoning, answer.usage) == ("four", "two and two", None)


@pytest.mark.parametrize(
    "usage",
    [
        3,
        {},
        {"prompt_tokens": "1", "completion_tokens": 2},
        {"prompt_tokens": -1, "completion_tokens": 2},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": 10**400, "completion_tokens": 2},
        {"prompt_tokens": 4, "completion_tokens": 10**12},
    ],
)
def test_usage_that_is_none(server: ScriptedServer, usage: object) -> None:
    server.script = lambda body: {**chat("hello"), "usage": usage}
    assert ask(server).usage is None


@pytest.mark.parametrize(("total", "completion"), [(81, 60), (20, 3), ("81", 3), (None, 3)])
def test_thinking_that_only_the_total_counts_is_billed(
    server: ScriptedServer, total: object, completion: int
) -> None:
    usage = {"prompt_tokens": 21, "completion_tokens": 3, "total_tokens": total}
    server.script = lambda body: {**chat("hello"), "usage": usage}
    assert ask(server).usage == Usage(21, completion)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, "stop"),
        ("length", "length"),
        ("MAX_TOKENS", "length"),
        ("model_length", "length"),
        ("abort", "error"),
        ("error", "error"),
        ("eos", "eos"),
    ],
)
def test_why_an_answer_ended(server: ScriptedServer, given: str | None, meant: str) -> None:
    answer = chat("hello")
    answer["choices"][0]["finish_reason"] = given
    server.script = lambda body: answer
    assert ask(server).finish_reason == meant


def test_what_no_file_and_no_request_can_hold_is_mended_or_refused(server: ScriptedServer) -> None:
    server.script = lambda body: chat("half \ud83d", ("add", {"a": "\udc00"}))
    answer = ask(server)
    assert answer.content == "half \ufffd"
    assert answer.calls[0].arguments == {"a": "\ufffd"}
    deep: object = 1
    for _ in range(200):
        deep = {"a": deep}
    for arguments in (deep, {"a": float("nan")}):
        made = chat(None, ("add", {}))
        made["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] = arguments
        assert _completion(json.dumps(made)) is None


@pytest.mark.parametrize(
    "faults",
    [
        [status(429, retry_after="0.1"), status(429)],
        [status(500), status(502), status(503), status(529)],
        [status(520), status(409), status(425)],
        [hang_up, cut],
        [html, body("[]"), body('{"error": {"message": "overloaded"}}')],
        [body('{"choices": []}'), body('{"choices": [{"text": "x"}]}')],
    ],
    ids=["429", "5xx", "others", "cut", "garbage", "no choice"],
)
def test_what_passes_is_waited_for(server: ScriptedServer, faults: list[Any]) -> None:
    server.faults += faults
    assert ask(server).content == "hello"
    assert len(server.requests) == len(faults) + 1


def test_retry_after_is_respected(server: ScriptedServer) -> None:
    server.faults.append(status(429, retry_after="1"))
    before = time.monotonic()
    ask(server)
    assert time.monotonic() - before > 0.95


def test_half_a_letter_that_is_sent_is_no_crash(server: ScriptedServer) -> None:
    """From the command line, for instance."""
    client = ChatClient(server.url)
    asyncio.run(client.complete(ASKED, model="base\udcff", max_tokens=32))
    assert server.requests[0][1]["model"] == "base\udcff"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9", "SOCKS"),
        ("HTTPS_PROXY", "ftp://127.0.0.1:9", "scheme"),
    ],
)
def test_a_proxy_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    if said == "SOCKS":
        monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="the proxy") as caught:
        asyncio.run(ChatClient("https://endpoint.invalid/v1").model_names())
    assert said in (caught.value.why or "")


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("7", 7.0),
        ("0.5", 0.5),
        (" 2 ", 2.0),
        ("-3", 0.0),
        ("nan", 0.0),
        ("9" * 400, 0.0),
        ("1, 2", 0.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 +99999999", 0.0),
        ("Wed, 99999999999999 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_forms_of_retry_after(header: str | None, seconds: float) -> None:
    assert _retry_after(header) == seconds


def test_a_date_to_retry_after() -> None:
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 85 < _retry_after(format_datetime(later, usegmt=True)) < 91
    assert 85 < _retry_after(format_datetime(later.replace(tzinfo=None))) < 91


def test_an_exhausted_quota_does_not_pass(server: ScriptedServer) -> None:
    said = json.dumps(
        {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    )
    server.always = status(429, said)
    with pytest.raises(Refused, match="exceeded your quota"):
        ask(server)
    assert len(server.requests) == 1


def test_what_stays_wrong(server: ScriptedServer) -> None:
    server.always = body('{"choices": []}')
    with pytest.raises(BadAnswer, match="not with a chat completion"):
        ask(server)
    server.always = status(500)
    with pytest.raises(ServerDown):
        ask(server, timeout=0.4)
    server.always = status(401)
    with pytest.raises(Refused) as caught:
        ask(server)
    assert caught.value.status == 401


def test_a_newer_name_of_the_limit(server: ScriptedServer) -> None:
    told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server.faults.append(status(400, json.dumps({"error": {"message": told}})))
    client = ChatClient(server.url)

    async def twice() -> None:
        for _ in range(2):
            await client.complete(ASKED, model="base", max_tokens=32)

    asyncio.run(twice())
    caps = [[key for key in body if key.startswith("max_")] for _, body in server.requests]
    assert caps == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


def test_vllm_without_tools_says_how_to_start_it(server: ScriptedServer) -> None:
    told = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    server.always = status(400, json.dumps({"error": {"message": told}}))
    with pytest.raises(Refused) as caught:
        ask(server)
    assert "--enable-auto-tool-choice" in (caught.value.fix or "")


def test_models(server: ScriptedServer) -> None:
    assert asyncio.run(ChatClient(server.url).model_names()) == ["base"]
    server.always = body('{"data": 3}')
    with pytest.raises(BadAnswer):
        asyncio.run(ChatClient(server.url).model_names())
