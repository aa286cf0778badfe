"""The client of OpenAI-compatible servers: what it sends, and what only this protocol can get wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from tests.serving.scripted import VOCABULARY, ScriptedServer, changed, logprob

from rnow.serving.echo import EchoClient
from rnow.serving.http import BadAnswer, Unsupported
from rnow.serving.scoring import FewerListed

IDS = [5, 9, 77, 3]
EXPECTED = [None, *(pytest.approx(logprob(token, i)) for i, token in enumerate(IDS) if i)]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(protocol="openai") as started:
        yield started


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def judge(server: ScriptedServer, top_k: int = 0) -> Any:
    return run(EchoClient(server.url).prompt_top_logprobs(IDS, model="base", top_k=top_k))


def test_what_is_sent_and_read(server: ScriptedServer) -> None:
    found = judge(server, top_k=3)
    (body,) = server.asked("/v1/completions")
    assert body == {
        "model": "base",
        "prompt": IDS,
        "max_tokens": 1,
        "temperature": 1.0,
        "echo": True,
        "logprobs": 3,
        "return_tokens_as_token_ids": True,
    }
    assert found[0] is None
    for position, entry in enumerate(found[1:], 1):
        table = {token: logprob(token, position) for token in range(VOCABULARY)}
        best = sorted(table, key=lambda token: -table[token])[:3]
        assert entry == {token: table[token] for token in {*best, IDS[position]}}


def test_by_text(server: ScriptedServer) -> None:
    """A strict server is sent no word that OpenAI's own did not know."""
    server.protocol = "openai-text"
    client = EchoClient(server.url).by_text()
    assert run(client.prompt_logprobs(IDS, model="base")) == EXPECTED
    assert "return_tokens_as_token_ids" not in server.asked("/v1/completions")[0]
    assert run(client.texts(IDS, model="base")) == [server.text(token) for token in IDS]
    with pytest.raises(FewerListed, match="which several ids can share"):
        run(client.prompt_top_logprobs(IDS, model="base", top_k=1))


def test_texts_of_a_server_that_names_ids_anyway(server: ScriptedServer) -> None:
    server.always = changed(
        lambda choice: choice["logprobs"].update(
            tokens=[f"token_id:{token}" for token in [*IDS, 4]]
        )
    )
    assert run(EchoClient(server.url).texts(IDS, model="base")) is None


def test_an_end_of_text_that_is_not_shown(server: ScriptedServer) -> None:
    def end(choice: dict[str, Any]) -> None:
        choice["finish_reason"] = "stop"
        for listed in choice["logprobs"].values():
            listed.pop()

    server.always = changed(end)
    found = judge(server, top_k=2)
    assert len(found) == len(IDS)
    assert found[3][3] == pytest.approx(logprob(3, 3))


def test_some_say_zero_for_none(server: ScriptedServer) -> None:
    server.always = changed(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, 0.0))
    assert judge(server)[0] is None


def _only_drawn(choice: dict[str, Any]) -> None:
    for listed in choice["logprobs"].values():
        del listed[:-1]


def _by_text(choice: dict[str, Any]) -> None:
    choice["logprobs"]["tokens"][1] = "the"


def _rival_by_text(choice: dict[str, Any]) -> None:
    choice["logprobs"]["top_logprobs"][1]["the"] = -1.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (_only_drawn, Unsupported, "none of the prompt"),
        (lambda choice: choice.update(logprobs=None), Unsupported, "no log-probabilities by token"),
        (_by_text, Unsupported, "names tokens by their text: the"),
        (_rival_by_text, Unsupported, "names tokens by their text: the"),
        (lambda choice: choice["logprobs"]["tokens"].pop(), BadAnswer, "5 log-probabilities of 4"),
        (lambda choice: choice["logprobs"].pop("top_logprobs"), FewerListed, "no likeliest"),
        (
            lambda choice: choice["logprobs"]["top_logprobs"][1].popitem(),
            FewerListed,
            "lists 2 of the 3",
        ),
    ],
)
def test_wrong_answers(
    server: ScriptedServer, change: Any, error: type[Exception], message: str
) -> None:
    server.always = changed(change)
    with pytest.raises(error, match=message):
        judge(server, top_k=3)
