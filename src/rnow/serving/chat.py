"""Talking to a chat endpoint: messages in, a message out, as OpenAI defined ``/chat/completions`` and everybody serves it.

Text, where ``client`` has token ids: good enough to learn from what a model says, never to score it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from rnow.core.messages import message_text
from rnow.errors import InputError
from rnow.serving.http import RETRIED, Json, Refused, ServerClient, answer_bytes
from rnow.text.json_values import read_arguments
from rnow.text.strict_json import JsonError, read_json
from rnow.types import Message, ToolCall

_PASSING = RETRIED | {409, 425, *range(520, 531)}
"""Besides: a conflict, "too early", and what proxies (520 to 527, 530) and Anthropic (529, overloaded) say of a bad moment."""
_FINAL = ("insufficient_quota", "billing_hard_limit_reached")
"""Codes of a 429 that no waiting mends."""
_SENT = ("role", "content", "name", "tool_calls", "tool_call_id")
_CAP, _OTHER_CAP = "max_tokens", "max_completion_tokens"
_TOOLS_OFF = "--tool-call-parser"
"""In what vLLM says where it was started without tools."""
_REASONING = ("reasoning_content", "reasoning")
"""Where servers put thinking: DeepSeek and vLLM, and OpenRouter."""
_ASKED = "/chat/completions"
_ENDS = {"max_tokens": "length", "model_length": "length", "abort": "error"}
"""Words of some servers for what OpenAI, or OpenRouter (error), names otherwise: Mistral's, and those of vLLM and SGLang."""
_MOST_TOKENS = 10**9
"""Of one answer; above, a server does not count."""


class Usage(NamedTuple):
    """Tokens that one answer is billed for."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """One answer.

    Attributes:
        content: its text, without calls.
        reasoning: the thinking that the server keeps apart; empty where it does not, or there is none.
        calls: in order; those that cannot be run have ``error``.
        finish_reason: ``stop``, ``length``, ``tool_calls``, ``content_filter``, ``error`` or a word of the server's own.
        usage: as the server counts; None where it does not say.
    """

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage | None


class ChatClient(ServerClient):
    """A client for one endpoint; see ``ServerClient``. Statuses that may pass (429 and most of 5xx, not an exhausted quota), cut
    connections and bodies that are no chat completion are asked again until ``timeout``, as late as ``Retry-After`` says.

    Args:
        url: up to ``/v1``, as the OpenAI SDK takes it. A path that ends otherwise (``.../v1beta/openai``) is taken as it is,
            without ``/chat/completions``.
    """

    wanted = "a chat completion"

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_concurrency: int = 16,
    ) -> None:
        url = url.strip().rstrip("/").removesuffix(_ASKED)
        super().__init__(url, api_key, timeout, max_concurrency)
        path = urlsplit(url).path.rstrip("/")
        self._root = "" if path and not path.endswith("/v1") else "/v1"
        self._retried = _PASSING
        self._cap = _CAP

    async def model_names(self) -> list[str]:
        """What the endpoint serves, by ``/models``."""
        answer = await self._json("GET", f"{self._root}/models", most=answer_bytes(1 << 16))
        entries = answer.get("data")
        if not isinstance(entries, list):
            raise self._bad("its list of models is not one", answer)
        names = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
        return [name for name in names if isinstance(name, str)]

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        max_tokens: int,
        tools: Sequence[Mapping[str, object]] = (),
        temperature: float | None = None,
        top_p: float | None = None,
        turn: int = 0,
    ) -> ChatAnswer:
        """The next message of a conversation.

        Args:
            messages: as train.jsonl has them.
            tools: as ``describe_tools`` gives them; with none, none are offered.
            temperature, top_p: None leaves them to the server.
            turn: of this conversation, from 0: names calls that the server gives no id.

        Raises:
            ServerDown: no answer before the deadline.
            Refused: the endpoint does not take the request.
            BadAnswer: what comes is no chat completion, or longer than was asked for.
        """
        body = request_body(messages, model, tools)
        body |= {
            name: value
            for name, value in (("temperature", temperature), ("top_p", top_p))
            if value is not None
        }
        while True:
            cap = self._cap
            try:
                read = await self._request(
                    "POST",
                    f"{self._root}{_ASKED}",
                    body | {cap: max_tokens},
                    _completion,
                    most=answer_bytes(0, drawn=max_tokens),
                )
                return _answer(read, turn)
            except Refused as error:
                if _TOOLS_OFF in error.message:
                    error.fix = "start that vLLM with --enable-auto-tool-choice --tool-call-parser NAME (hermes for Qwen)"
                # OpenAI's reasoning models know the limit under its newer name only.
                if cap == _OTHER_CAP or _OTHER_CAP not in error.message:
                    raise
                self._cap = _OTHER_CAP

    def _final(self, text: str) -> bool:
        return any(code in text for code in _FINAL)


def request_body(
    messages: Sequence[Message], model: str, tools: Sequence[Mapping[str, object]] = ()
) -> Json:
    """What is asked, but for how it is drawn."""
    body: Json = {"model": model, "messages": [_as_sent(message) for message in messages]}
    if tools:
        body["tools"] = list(tools)
    return body


def check_address(url: str, *, where: str) -> None:
    """
    Raises:
        InputError: it is no http(s) address, or the address of an endpoint holds a query, which would get lost.
    """
    try:
        ChatClient(url)
    except InputError as error:
        error.where = where
        raise
    if urlsplit(url.strip()).query:
        raise InputError(
            "the address of the endpoint has a query",
            where=where,
            why="/chat/completions is appended to it, and a query cannot stand before that",
            fix="give the address up to /v1, and the key in the environment",
        )


def _as_sent(message: Message) -> Json:
    """A message with what an endpoint knows, the arguments of calls as the text that it wants them to be."""
    sent: Json = {key: message[key] for key in _SENT if message.get(key) is not None}
    sent.setdefault("content", "")
    if isinstance(calls := message.get("tool_calls"), list | tuple):
        sent["tool_calls"] = [_call_as_sent(call, index) for index, call in enumerate(calls)]
    return sent


def _call_as_sent(call: Mapping[str, object], index: int) -> Json:
    function = call.get("function", call)
    assert isinstance(function, Mapping), "the row's checks refuse anything else"
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call.get("id") or f"call_{index}",
        "type": "function",
        "function": {"name": function.get("name"), "arguments": arguments},
    }


def _completion(text: str) -> Json | None:
    """The answer, with a message; None where it is something else: some proxies say with status 200 what is wrong."""
    try:
        # As strictly as a file is read: what it says is sent back, rendered and written, where NaN and lone surrogates end.
        answer = read_json(text)
    except JsonError:
        return None
    if not isinstance(answer, dict):
        return None
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return answer if isinstance(first, dict) and isinstance(first.get("message"), dict) else None


def _answer(answer: Json, turn: int) -> ChatAnswer:
    choices = answer["choices"]
    assert isinstance(choices, list), "read by _completion"
    choice = choices[0]
    message = choice["message"]
    given = message.get("tool_calls")
    calls = given if isinstance(given, list) else []
    reasoning = next((text for key in _REASONING if isinstance(text := message.get(key), str)), "")
    end = str(choice.get("finish_reason") or "stop").lower()
    return ChatAnswer(
        content=message_text(message.get("content")),
        reasoning=reasoning,
        calls=tuple(_call(call, turn, index) for index, call in enumerate(calls)),
        finish_reason=_ENDS.get(end, end),
        usage=_usage(answer.get("usage")),
    )


def _call(call: object, turn: int, index: int) -> ToolCall:
    """A call as the model wrote it, whatever it wrote."""
    call = call if isinstance(call, dict) else {}
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    name, given = function.get("name"), call.get("id")
    identity = given if isinstance(given, str) and given else f"call_{turn}_{index}"
    arguments = function.get("arguments")
    read = {} if arguments is None else read_arguments(arguments)
    if not isinstance(name, str) or not name:
        return ToolCall(id=identity, name="", error="the call names no tool")
    if read is None:
        return ToolCall(id=identity, name=name, error="the arguments are no JSON object")
    return ToolCall(id=identity, name=name, arguments=read)


def _usage(given: object) -> Usage | None:
    """What a server counted. Some count thinking, which they bill, in the total alone (Gemini's, Grok's)."""
    if not isinstance(given, dict):
        return None
    prompt, completion, total = (
        value if type(value := given.get(f"{name}_tokens")) is int and value <= _MOST_TOKENS else -1
        for name in ("prompt", "completion", "total")
    )
    if prompt < 1 or completion < 0:  # no prompt is empty
        return None
    return Usage(prompt, max(completion, total - prompt))
