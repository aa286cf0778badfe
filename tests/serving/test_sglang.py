"""The client of SGLang's /generate: what it sends, and what only this protocol can get wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from tests.serving.scripted import VOCABULARY, ScriptedServer, logprob

from rnow.serving.http import BadAnswer, ServerDown, Unsupported
from rnow.serving.scoring import FewerListed
from rnow.serving.sglang import SglangClient

IDS = [5, 9, 77, 3]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(protocol="sglang") as started:
        yield started


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def judge(server: ScriptedServer, top_k: int = 0) -> Any:
    return run(SglangClient(server.url).prompt_top_logprobs(IDS, model="base", top_k=top_k))


def meta(change: Any) -> Any:
    def apply(handler: Any, answer: dict[str, Any]) -> bool:
        change(answer["meta_info"])
        return False

    return apply


def test_what_is_sent_and_read(server: ScriptedServer) -> None:
    found = judge(server, top_k=3)
    (body,) = server.asked("/generate")
    assert body == {
        "input_ids": IDS,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 3,
    }
    assert found[0] is None
    for position, entry in enumerate(found[1:], 1):
        table = {token: logprob(token, position) for token in range(VOCABULARY)}
        best = sorted(table, key=lambda token: -table[token])[:3]
        assert entry == {token: table[token] for token in {*best, IDS[position]}}


def test_single_tokens_have_no_log_probability(server: ScriptedServer) -> None:
    assert run(SglangClient(server.url).prompt_logprobs([7], model="base")) == [None]


def test_older_answers_have_no_text(server: ScriptedServer) -> None:
    server.always = meta(
        lambda said: said.update(
            input_token_logprobs=[item[:2] for item in said["input_token_logprobs"]]
        )
    )
    assert judge(server)[1] == {9: pytest.approx(logprob(9, 1))}
    assert run(SglangClient(server.url).texts(IDS, model="base")) is None


def test_texts(server: ScriptedServer) -> None:
    found = run(SglangClient(server.url).texts(IDS, model="base"))
    assert found == [server.text(token) for token in IDS]


def test_ids_after_a_prompt(server: ScriptedServer) -> None:
    found = run(SglangClient(server.url).next_logprobs(IDS, [101, 102], model="base"))
    assert found == {101: pytest.approx(-4.60517), 102: pytest.approx(-4.60517)}
    (body,) = server.asked("/generate")
    assert body["token_ids_logprob"] == [101, 102]
    assert body["sampling_params"]["max_new_tokens"] == 1
    server.always = meta(lambda said: said.pop("output_token_ids_logprobs"))
    assert run(SglangClient(server.url).next_logprobs(IDS, [101], model="base")) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda said: said.pop("input_token_logprobs"), Unsupported, "no log-probabilities"),
        (lambda said: said.update(prompt_tokens=5), BadAnswer, "read 5 tokens where 4 were sent"),
        (lambda said: said["input_top_logprobs"].pop(), BadAnswer, "3 log-probabilities for 4"),
        (lambda said: said.pop("input_top_logprobs"), FewerListed, "no likeliest tokens"),
        (lambda said: said["input_top_logprobs"][2].pop(), FewerListed, "lists 2 of the 3"),
        (lambda said: said["input_token_logprobs"][1].clear(), BadAnswer, "with token ids"),
        (
            lambda said: said.update(finish_reason={"type": "abort", "message": "x"}),
            ServerDown,
            "aborted a request",
        ),
    ],
)
def test_wrong_answers(
    server: ScriptedServer, change: Any, error: type[Exception], message: str
) -> None:
    server.always = meta(change)
    with pytest.raises(error, match=message):
        judge(server, top_k=3)
