"""The client against a scripted server: what it sends, what it believes, and what it does when the server is unwell."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from tests.serving.scripted import (
    Fault,
    ScriptedServer,
    changed,
    hang_up,
    html,
    logprob,
    prompt_value,
    slow,
    status,
    tokenize,
)

from rnow.errors import InputError, ModelError, RnowError, TemporaryError
from rnow.processes.process import free_port
from rnow.serving import http as http_module
from rnow.serving.client import Generated, VllmClient
from rnow.serving.http import BadAnswer, Refused, ServerDown
from rnow.serving.scoring import ServedModel
from rnow.types import SamplingParams

IDS = [5, 9, 77, 3]
KEY = "s3cret-k3y"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(key=KEY) as started:
        yield started


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "_FIRST_PAUSE", 0.01)


def connect(server: ScriptedServer, timeout: float = 5.0, **changes: Any) -> VllmClient:
    return VllmClient(server.url, KEY, timeout, **changes)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def judge(client: VllmClient) -> list[float | None]:
    return run(client.prompt_logprobs(IDS, model="base"))


def draw(
    client: VllmClient,
    *,
    model: str = "base",
    seed: int = 1,
    logit_bias: dict[int, float] | None = None,
    **changes: Any,
) -> Generated:
    params = SamplingParams(**{"max_tokens": 5, "stop_token_ids": ()} | changes)
    return run(client.complete(IDS, params, seed, model=model, logit_bias=logit_bias))


EXPECTED = [None, *(pytest.approx(logprob(token, i)) for i, token in enumerate(IDS) if i)]


# ---- what is sent and read ------------------------------------------------------------------------------------------


def test_prompt_logprobs_are_those_of_the_given_ids(server: ScriptedServer) -> None:
    assert judge(connect(server)) == EXPECTED
    (body,) = server.asked("/v1/completions")
    assert body["prompt"] == IDS
    assert body["prompt_logprobs"] == 0
    assert run(connect(server).prompt_logprobs([7], model="base")) == [None]


def test_top_logprobs(server: ScriptedServer) -> None:
    found = run(connect(server).prompt_top_logprobs(IDS, model="base", top_k=2))
    assert found[0] is None
    for position, entry in enumerate(found[1:], 1):
        best = sorted(range(100), key=lambda token: -logprob(token, position))[:2]
        assert set(entry) == {*best, IDS[position]}
    assert found[2][77] == pytest.approx(logprob(77, 2))


def test_a_completion(server: ScriptedServer) -> None:
    found = draw(connect(server), seed=2**63 - 1, stop_token_ids=(6, 99), top_k=3, top_p=0.9)
    assert found.token_ids == (4, 5, 6)
    assert found.finish_reason == "stop"
    assert found.logprobs == pytest.approx([logprob(4, 4), logprob(5, 5), logprob(6, 6)])
    (body,) = server.asked("/v1/completions")
    assert (body["seed"], body["top_k"], body["top_p"]) == (2**63 - 1, 3, 0.9)


def test_nothing_is_left_to_the_servers_defaults(server: ScriptedServer) -> None:
    """A model's generation_config.json fills in whatever a request leaves out."""
    draw(connect(server), logit_bias={101: -100.0})
    (body,) = server.asked("/v1/completions")
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "ignore_eos": True,
    }
    assert {name: body[name] for name in neutral} == neutral
    assert body["logit_bias"] == {"101": -100.0}


def test_a_cut_completion(server: ScriptedServer) -> None:
    found = draw(connect(server))
    assert found.token_ids == (4, 5, 6, 7, 8)
    assert found.finish_reason == "length"


def test_wanted_ids_after_a_prefix(server: ScriptedServer) -> None:
    found = run(connect(server).next_logprobs(IDS, [101, 102], model="base"))
    assert found == {101: pytest.approx(-4.60517), 102: pytest.approx(-4.60517)}

    def forget(choice: dict[str, Any]) -> None:  # as an older server, which knows nothing of it
        choice["logprobs"]["top_logprobs"][0].pop("token_id:101")

    server.faults.append(changed(forget))
    assert run(connect(server).next_logprobs(IDS, [101, 102], model="base")) is None


def test_about_the_server(server: ScriptedServer) -> None:
    client = connect(server)
    assert run(client.health())
    assert run(client.models()) == [
        ServedModel(id="base", root="/models/base", parent=None, max_model_len=64, owned_by="vllm")
    ]
    assert run(client.tokenize("hi\n", model="base")) == tokenize("hi\n")


def test_health_never_raises(server: ScriptedServer) -> None:
    server.faults += [status(503), hang_up]
    client = connect(server)
    assert not run(client.health())
    assert not run(client.health())
    assert not run(VllmClient(f"http://127.0.0.1:{free_port()}").health())


def test_adapters(server: ScriptedServer) -> None:
    client = connect(server)
    run(client.load_lora_adapter("v1", "/adapters/v1"))
    assert run(client.models())[1] == ServedModel(
        id="v1", root="/adapters/v1", parent="base", max_model_len=64, owned_by="vllm"
    )
    assert draw(client, model="v1").token_ids
    run(client.load_lora_adapter("v1", "/adapters/v1"))
    with pytest.raises(Refused, match="already been loaded"):
        run(client.load_lora_adapter("v1", "/adapters/other"))
    run(client.unload_lora_adapter("v1"))
    run(client.unload_lora_adapter("v1"))
    with pytest.raises(Refused, match="`v1` does not exist") as caught:
        draw(client, model="v1")
    assert caught.value.status == 404


def test_a_load_whose_answer_got_lost_is_no_failure(server: ScriptedServer) -> None:
    server.faults.append(hang_up)
    run(connect(server).load_lora_adapter("v1", "/adapters/v1"))
    assert len(server.asked("/v1/load_lora_adapter")) == 2


def test_a_load_that_fails_is_not_tried_again(server: ScriptedServer) -> None:
    server.always = status(500, '{"error": {"message": "rank 64 is greater than 32"}}')
    with pytest.raises(Refused, match="rank 64"):
        run(connect(server).load_lora_adapter("v1", "/adapters/v1"))
    assert len(server.requests) == 1


def test_sleep(server: ScriptedServer) -> None:
    client = connect(server)
    run(client.sleep())
    assert server.requests[-1][0] == "/sleep?level=1"
    assert server.asleep
    run(client.wake_up())
    assert not server.asleep
    server.can_sleep = False
    with pytest.raises(Refused, match="cannot sleep") as caught:
        run(client.sleep())
    assert "VLLM_SERVER_DEV_MODE=1" in (caught.value.fix or "")


def test_addresses() -> None:
    for url in ("http://h:8000", "http://h:8000/", "http://h:8000/v1", " http://h:8000/v1/ "):
        assert VllmClient(url).url == "http://h:8000"
    assert VllmClient("https://h/a/b/v1").url == "https://h/a/b"
    assert VllmClient("http://[::1]:8000/v1").url == "http://[::1]:8000"
    for url in ("h:8000", "ftp://h", "http://", "", "http://h:99999", "file:///etc/passwd"):
        with pytest.raises(InputError):
            VllmClient(url)
    for key in ("key\n", " key", "key "):
        with pytest.raises(InputError, match="header"):
            VllmClient("http://h", key)


# ---- a server that is unwell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        [status(429)] * 3,
        [status(500), status(502), status(503), status(504)],
        [hang_up, hang_up],
        [html, status(200, "[1, 2]"), status(200, "")],
        [status(429, retry_after="0.1"), status(503, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")],
    ],
    ids=["429", "5xx", "hang-up", "garbage", "retry-after"],
)
def test_what_passes_is_waited_for(server: ScriptedServer, faults: list[Fault]) -> None:
    server.faults += faults
    assert judge(connect(server)) == EXPECTED
    assert len(server.requests) == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "last"),
    [
        (
            status(500, '{"error": {"message": "CUDA out of memory"}}'),
            "HTTP 500: CUDA out of memory",
        ),
        (status(429), "HTTP 429"),
        (hang_up, "RemoteProtocolError"),
        (slow(3), "too slow"),
        (status(503, retry_after="3600"), "HTTP 503"),
        (status(503, retry_after="Fri, 01 Jan 2100 00:00:00 GMT"), "HTTP 503"),
    ],
    ids=["500", "429", "hang-up", "slow", "come back in an hour", "come back that day"],
)
def test_what_does_not_pass_ends_at_the_deadline(
    server: ScriptedServer, fault: Fault, last: str
) -> None:
    server.always = fault
    before = time.monotonic()
    with pytest.raises(ServerDown) as caught:
        judge(connect(server, timeout=0.4))
    assert time.monotonic() - before < 2
    assert isinstance(caught.value, TemporaryError)
    assert last in (caught.value.why or "")
    assert server.url in caught.value.message


def test_nobody_there() -> None:
    with pytest.raises(ServerDown, match=r"gave no answer in 0\.3 s") as caught:
        judge(VllmClient(f"http://127.0.0.1:{free_port()}", None, 0.3))
    assert "ConnectError" in (caught.value.why or "")


def test_a_server_of_ours_that_ended_is_not_waited_for() -> None:
    before = time.monotonic()
    with pytest.raises(ServerDown, match="has ended"):
        judge(VllmClient(f"http://127.0.0.1:{free_port()}", None, 60, alive=lambda: False))
    assert time.monotonic() - before < 5


def test_refusals_are_not_repeated(server: ScriptedServer) -> None:
    with pytest.raises(Refused, match="out-of-vocab"):
        run(connect(server).prompt_logprobs([5, 700], model="base"))
    with pytest.raises(Refused, match="Unauthorized") as caught:
        judge(VllmClient(server.url, "wrong", 5))
    assert caught.value.status == 401
    assert "API key" in (caught.value.fix or "")
    assert len(server.requests) == 2


def _lose(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"].pop()


def _other_token(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][-1] = {"50": {"logprob": -1.0}}


def _reread(choice: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = [1, *choice["prompt_token_ids"]]


def _none(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = None


def _hole(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][2] = None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed(_lose), "3 log-probabilities for 4 tokens"),
        (changed(_none), "no log-probabilities of a prompt"),
        (changed(_other_token), "no log-probability for the token at 3"),
        (changed(_hole), "no log-probability for the token at 2"),
        (changed(_reread), "other token ids than it was sent"),
        (prompt_value(float("nan")), "is nan"),
        (prompt_value(float("-inf")), "is -inf"),
        (prompt_value(0.5), "0.5, which is above 0"),
        (prompt_value(-1e30), r"-1e\+30, and vLLM gives -9999"),
        (status(200, '{"model": "base", "choices": []}'), "one completion"),
        (status(200, '{"model": "other", "choices": [{}]}'), "other answered where base was asked"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_log_probabilities(server: ScriptedServer, fault: Fault, message: str) -> None:
    server.faults.append(fault)
    with pytest.raises(BadAnswer, match=message) as caught:
        judge(connect(server))
    assert isinstance(caught.value, ModelError)


def test_rounding_above_zero_is_zero(server: ScriptedServer) -> None:
    server.faults.append(prompt_value(1e-7))
    assert judge(connect(server))[-1] == 0.0


def test_html_for_good(server: ScriptedServer) -> None:
    server.always = html
    with pytest.raises(BadAnswer, match="not with a JSON object") as caught:
        judge(connect(server))
    assert caught.value.details == ("<html><body>Please log in [31m</body></html>",)
    assert len(server.requests) == 4


def _set(**values: Any) -> Fault:
    return changed(lambda choice: choice.update(values))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_set(token_ids=None), "'token_ids' are not token ids"),
        (_set(token_ids=["4"]), "'token_ids' are not token ids"),
        (_set(token_ids=[4, 5]), "2 tokens and 5 log-probabilities"),
        (_set(token_ids=[]), "0 tokens"),
        (_set(logprobs=None), "no log-probabilities"),
        (_set(finish_reason="tool_calls"), "ended a completion with tool_calls"),
        (_set(finish_reason="stop"), "stopped at id 8"),
        (_set(logprobs={"token_logprobs": [-1, -1, None, -1, -1]}), "at 2 is None"),
        (_set(token_ids=[4], logprobs={"token_logprobs": [-1]}), "cut a completion after 1 of 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_completions(server: ScriptedServer, fault: Fault, message: str) -> None:
    server.faults.append(fault)
    with pytest.raises(BadAnswer, match=message):
        draw(connect(server), stop_token_ids=(50,))


def test_an_aborted_completion_is_an_outage(server: ScriptedServer) -> None:
    server.faults.append(_set(finish_reason="abort"))
    with pytest.raises(ServerDown, match="aborted"):
        draw(connect(server))


# ---- many at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_concurrency_is_bounded_and_waiting_is_free(server: ScriptedServer, most: int) -> None:
    """Twelve requests, one deadline shorter than all of them together: it starts when a request is sent."""
    server.pause = 0.05
    client = connect(server, timeout=0.5, max_concurrency=most)

    async def everything() -> list[Any]:
        return await asyncio.gather(
            *(client.prompt_logprobs([i, 1, 2], model="base") for i in range(12))
        )

    found = run(everything())
    assert server.most_in_flight == most
    assert len(found) == 12
    run(everything())  # in another event loop


def test_a_second_bound_for_the_same_server(server: ScriptedServer) -> None:
    server.pause = 0.05
    client = connect(server, max_concurrency=1)
    other = client.limited(2)

    async def everything() -> None:
        await asyncio.gather(*(other.prompt_logprobs([i, 1], model="base") for i in range(6)))

    run(everything())
    assert server.most_in_flight == 2
    assert other.url == client.url


def test_no_secret_in_an_error(server: ScriptedServer) -> None:
    leak = json.dumps({"error": {"message": f"bad key {KEY} for hunter2"}})
    url = server.url.replace("http://", "http://me:hunter2@") + "/?token=t0ken"

    def shown(call: Callable[[], object]) -> str:
        with pytest.raises(RnowError) as caught:
            call()
        return caught.value.render()

    client = VllmClient(url, KEY, 0.3)
    server.always = status(500, leak)
    texts = [shown(lambda: judge(client))]
    server.always = status(400, leak)
    texts.append(shown(lambda: judge(client)))
    server.always = status(200, leak)
    texts.append(shown(lambda: judge(client)))
    for text in texts:
        assert not any(secret in text for secret in (KEY, "hunter2", "t0ken"))
    assert "***" in texts[0]
