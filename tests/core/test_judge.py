"""llm_judge against a server on the loopback interface."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.judges import VARIABLES, Answer, Judge, completion, judge_server

from rnow.core import JudgeError, JudgeUnavailable, judge_http, llm_judge
from rnow.core.deadline import answer_by, answer_within
from rnow.core.verdict import Score

REFUSED = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."


@pytest.fixture
def judge() -> Iterator[Judge]:
    with judge_server() as judge:
        yield judge


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_http, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(judge_http, "_refused", {})


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def ask(judge: Judge, **options: Any) -> float:

    async def asked() -> float:
        return await llm_judge("Is it right?", **{"api_url": judge.url, **options})

    return asyncio.run(asked())


def test_the_score_and_the_request(judge: Judge) -> None:
    judge.says('{"score": 0.75}')
    assert ask(judge, model="m", api_key="k-123", system="Be strict.", temperature=0) == 0.75
    (request,) = judge.requests
    assert judge.paths == ["/v1/chat/completions"]
    assert judge.headers[0]["Authorization"] == "Bearer k-123"
    assert request["model"] == "m"
    assert request["temperature"] == 0
    assert request["messages"][1] == {"role": "user", "content": "Is it right?"}
    assert "Be strict." in request["messages"][0]["content"]
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["score"]


def test_key_address_and_model_come_from_the_environment(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.says('{"score": 1}')
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    monkeypatch.setenv("OPENAI_MODEL", "small")
    assert asyncio.run(llm_judge("?")) == 1.0
    assert ask(judge, api_key="given", model="large") == 1.0
    sent = [headers["Authorization"] for headers in judge.headers]
    assert sent == ["Bearer from-environment", "Bearer given"]
    assert [request["model"] for request in judge.requests] == ["small", "large"]


def test_without_a_key_the_default_endpoint_is_not_called() -> None:
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"):
        asyncio.run(llm_judge("?"))


@pytest.mark.parametrize(
    "content",
    [
        '```json\n{"score": 1}\n```',
        "1",
        "1.0",
        'So: {"score":1}',
        'As {rules} say, {"score": 1}, or {"1"}.',
        '{"why": "{"} and {"score": 1}',
        '{"score": 1}, that is {"score": 1.0}',
    ],
)
def test_looser_spellings_of_the_answer(judge: Judge, content: str) -> None:
    judge.says(content)
    assert ask(judge) == 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("excellent", "no score"),
        ('not {"score": 0} but {"score": 1}', "more than one answer"),
        ('{"a": {"score": 1}}!', "gave no score"),
        ("{" * 5000, "no score"),
        ('{"points": 1}', "no score"),
        ('{"score": "1"}', "not a number"),
        ('{"score": true}', "not a number"),
        ('{"score": NaN}', "not a number"),
        ('{"score": 1.5}', "not between 0 and 1"),
    ],
)
def test_answers_outside_the_schema(judge: Judge, content: str, words: str) -> None:
    judge.says(content)
    with pytest.raises(JudgeError, match=words):
        ask(judge)


def test_a_wider_range(judge: Judge) -> None:
    judge.says('{"score": 7}')
    assert ask(judge, minimum=1, maximum=10) == 7.0


def test_no_completion_in_the_body(judge: Judge) -> None:
    judge.answers = [Answer(body="<html>hello</html>")]
    with pytest.raises(JudgeError, match="no chat completion"):
        ask(judge)


def test_a_refusal_is_not_retried_and_hides_the_key(judge: Judge) -> None:
    judge.answers = [Answer(status=401, body="bad key k-secret-1")]
    with pytest.raises(JudgeError, match="401") as caught:
        ask(judge, api_key="k-secret-1")
    assert len(judge.requests) == 1
    assert "k-secret-1" not in str(caught.value)


def test_a_busy_server_is_asked_again(judge: Judge) -> None:
    judge.says('{"score": 1}')
    judge.answers.insert(0, Answer(status=429, body="slow down"))
    assert ask(judge) == 1.0
    assert len(judge.requests) == 2


def test_a_server_without_schemas_is_asked_without(judge: Judge) -> None:
    judge.says('{"score": 1}')
    judge.answers.insert(0, Answer(status=400, body="unknown field response_format"))
    assert ask(judge) == 1.0
    assert "response_format" not in judge.requests[1]


def test_no_server() -> None:
    with pytest.raises(JudgeError, match="cannot be reached"):
        asyncio.run(llm_judge("?", base_url="http://127.0.0.1:9/v1", timeout=1))


def test_only_http_addresses() -> None:
    with pytest.raises(JudgeError, match="http://"):
        asyncio.run(llm_judge("?", base_url="file:///etc", timeout=1))


# -- the hosted arguments ----------------------------------------------------------------------------------------------

GRADES = {
    "type": "object",
    "properties": {
        "reasoning": {"type": "string"},
        "grade": {"type": "integer", "minimum": 0, "maximum": 10},
        "passed": {"type": "boolean"},
        "level": {"type": "string", "enum": ["0", "0.5", "1"]},
        "either": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["reasoning", "grade"],
    "additionalProperties": False,
}


def test_a_schema_of_ones_own(judge: Judge) -> None:
    judge.says('{"reasoning": "{well}", "grade": 7, "passed": true, "level": "0.5", "either": 3}')
    assert ask(judge, schema=GRADES, score_key="grade") == 7.0
    assert ask(judge, schema=GRADES, score_key="passed") == 1.0
    assert ask(judge, schema=GRADES, score_key="level") == 0.5
    assert ask(judge, schema=GRADES, score_key="either") == 3.0
    first = judge.requests[0]
    sent = first["response_format"]["json_schema"]
    assert (sent["strict"], sent["schema"]) == (False, GRADES), "not all of it is required"
    assert json.dumps(GRADES) in first["messages"][0]["content"], "for servers that know no schemas"


def test_openais_strict_form_is_asked_for_only_where_it_takes_the_schema(judge: Judge) -> None:
    judge.says('{"score": 1}')
    open_object = {"type": "object", "properties": {"score": {"type": "number"}}}
    closed = open_object | {"additionalProperties": False}
    for schema in (open_object, closed, closed | {"required": ["score"]}, None):
        assert ask(judge, schema=schema) == 1.0
    asked = [request["response_format"]["json_schema"]["strict"] for request in judge.requests]
    assert asked == [False, False, True, True]


@pytest.mark.parametrize(
    ("content", "key", "words"),
    [
        ('{"grade": 7}', "grade", "lacks reasoning"),
        ('{"reasoning": "", "grade": 7.5}', "grade", "not of type integer: 7.5"),
        ('{"reasoning": "", "grade": 11}', "grade", "score 11 is outside its schema: maximum 10"),
        ('{"reasoning": "", "grade": -1}', "grade", "minimum 0"),
        ('{"reasoning": "", "grade": "7"}', "grade", "not of type integer: '7'"),
        ('{"reasoning": "", "grade": null}', "grade", "not of type integer: None"),
        ('{"reasoning": "", "grade": 1, "passed": 1}', "passed", "not of type boolean: 1"),
        ('{"reasoning": "", "grade": 1, "level": "2"}', "level", "one of '0', '0.5', '1'"),
        ('{"reasoning": "", "grade": 1}', "passed", "gave no passed"),
        ("7", "grade", "no JSON object"),
        ('["7"]', "grade", "no JSON object"),
        ('{"reasoning": "", "grade": ', "grade", "gave no score"),
        ("{" * 5000, "grade", "gave no score"),
        ('{"reasoning": "", "grade": 1' + "0" * 400 + "}", "grade", "not a number"),
    ],
)
def test_answers_that_break_the_schema(judge: Judge, content: str, key: str, words: str) -> None:
    judge.says(content)
    with pytest.raises(JudgeError, match=words) as caught:
        ask(judge, schema=GRADES, score_key=key)
    assert not isinstance(caught.value, JudgeUnavailable), "asking again would not change it"
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schema": GRADES}, "no property 'score': say with score_key= which of reasoning, grade"),
        ({"schema": {"type": "number"}}, "no properties"),
        ({"schema": "score"}, "not that of an object"),
        (
            {"schema": {"properties": {"score": {"type": "array"}}}},
            "property 'score' of llm_judge's schema is no number",
        ),
        ({"schema": {"properties": {"score": {"type": "number", "of": int}}}}, "is not JSON"),
        ({"minimum": 2, "maximum": 1}, "minimum 2 above maximum 1"),
        ({"api_key": "kéy"}, "no request can carry"),
        ({"api_key": "k\r\nX-Other: 1"}, "no request can carry"),
        ({"seed": object()}, "cannot send seed as JSON"),
        ({"api_url": "http://ann:pass-word@host/v1"}, "give its password as api_key"),
        ({"api_url": "localhost:8000"}, "must start with http://"),
        ({"api_url": "http://[::1"}, "must start with http://"),
        ({"api_url": "http://host:port/v1"}, "a port in it is a number"),
        ({"api_url": "http://127.0.0.1:9/a b"}, "is not the address of a server"),
        ({"api_url": "host/v1?key=pass-word"}, "must start with http://"),
    ],
)
def test_what_cannot_be_asked(judge: Judge, options: dict[str, Any], words: str) -> None:
    with pytest.raises(JudgeError, match=words) as caught:
        ask(judge, **options)
    assert "pass-word" not in str(caught.value)
    assert not judge.requests


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("/v1", "/v1/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/responses", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/api/v2?version=3", "/api/v2/chat/completions?version=3"),
    ],
)
def test_spellings_of_the_address(judge: Judge, given: str, path: str) -> None:
    judge.says('{"score": 1}')
    assert ask(judge, api_url=judge.url.removesuffix("/v1") + given) == 1.0
    assert judge.paths == [path]


def test_no_proxy_stands_before_a_judge_on_this_machine(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge.says('{"score": 1}')
    judge_http._opener.cache_clear()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(judge) == 1.0
    judge_http._opener.cache_clear()


def test_secrets_win_over_the_environment(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    judge.says('{"score": 1}')
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-environment")
    secrets = {"OPENAI_API_KEY": "of-the-secrets", "LLM_JUDGE_API_URL": judge.url, "OTHER": 3}
    assert asyncio.run(llm_judge("?", secrets=secrets)) == 1.0
    assert asyncio.run(llm_judge("?", secrets=secrets, api_key=" given\n")) == 1.0
    assert asyncio.run(llm_judge("?", secrets={**secrets, "LLM_JUDGE_API_KEY": "own"})) == 1.0
    monkeypatch.setenv("LLM_JUDGE_API_URL", judge.url)
    assert asyncio.run(llm_judge("?", secrets={})) == 1.0
    sent = [headers["Authorization"] for headers in judge.headers]
    names = ["of-the-secrets", "given", "own", "of-the-environment"]
    assert sent == [f"Bearer {name}" for name in names]


def test_the_rest_of_the_request(judge: Judge) -> None:
    judge.says('{"score": 1}')
    ask(judge)
    ask(judge, temperature=None, max_tokens=64, top_p=0.5, model="m")
    plain, given = judge.requests
    assert plain["temperature"] == 0
    assert "max_tokens" not in plain
    assert "temperature" not in given
    assert (given["max_tokens"], given["top_p"], given["model"]) == (64, 0.5, "m")


def test_fields_that_a_server_refuses_are_left_out_from_then_on(judge: Judge) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        if "temperature" in request:
            return Answer(status=400, body=REFUSED)
        if "max_tokens" in request:
            return Answer(status=400, body="Use 'max_completion_tokens' instead of 'max_tokens'")
        return completion('{"score": 1}')

    judge.answer = answer
    assert ask(judge, max_tokens=9) == 1.0
    assert len(judge.requests) == 3
    assert judge.requests[-1]["max_completion_tokens"] == 9
    assert ask(judge, max_tokens=9) == 1.0
    assert len(judge.requests) == 4
    with pytest.raises(JudgeError, match="answered 400"):
        ask(judge, temperature=0.5)  # asked for on purpose


def test_a_judge_whose_chat_template_has_no_system_message_is_told_in_the_question(
    judge: Judge,
) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        if request["messages"][0]["role"] == "system":
            return Answer(status=400, body='{"message": "System role not supported"}')
        return completion('{"score": 1}')

    judge.answer = answer
    assert ask(judge, system="Be strict.") == 1.0
    assert ask(judge, system="Be strict.") == 1.0
    assert len(judge.requests) == 3
    (message,) = judge.requests[-1]["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith("You are a judge. Answer with JSON only")
    assert message["content"].endswith("Be strict.\n\nIs it right?")


def test_a_refusal_with_another_reason_changes_no_later_question(judge: Judge) -> None:
    """Some servers repeat the whole request in what they say of any fault in it."""
    sound: list[dict[str, Any]] = []

    def answer(request: dict[str, Any]) -> Answer:
        if "bad" in request["messages"][-1]["content"]:
            return Answer(status=422, body=json.dumps({"input": request}))
        sound.append(request)
        return completion('{"score": 1}')

    judge.answer = answer
    with pytest.raises(JudgeError, match="answered 422"):
        asyncio.run(llm_judge("a bad one", api_url=judge.url))
    assert ask(judge) == 1.0
    assert {"response_format", "temperature"} <= sound[0].keys()


def test_what_a_judge_says_beside_its_score(judge: Judge) -> None:
    thought = '<think>Is it {"score": 0}? No.</think>{"score": 1}'
    judge.says(thought, [{"type": "text", "text": '{"score": 1}'}])
    assert ask(judge) == 1.0
    assert ask(judge) == 1.0
    judge.answers = [completion('{"sco', finish_reason="length")]
    with pytest.raises(JudgeError, match="raise max_tokens"):
        ask(judge)
    body = {"choices": [{"message": {"content": None, "refusal": "I will not."}}]}
    judge.answers = [Answer(body=json.dumps(body))]
    with pytest.raises(JudgeError, match="refuses to answer: 'I will not"):
        ask(judge)


# -- a judge that is down, slow or broken ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=429, body="slow down"), "answered 429: slow down"),
        (Answer(status=500), "answered 500"),
        (Answer(status=503, body="loading"), "answered 503: loading"),
        (Answer(body="<html>"), "no chat completion"),
        (Answer(body='{"choices": []}'), "no chat completion"),
        (Answer(body="[" * 5000), "no chat completion"),
        (Answer(body=" " * (2 << 20)), "more than 1,048,576 bytes"),
        (Answer(body=completion("1").body, how="cut"), "no chat completion"),
    ],
)
def test_a_judge_that_is_broken_may_answer_later(judge: Judge, answer: Answer, words: str) -> None:
    judge.answers = [answer]
    with pytest.raises(JudgeUnavailable, match=words):
        ask(judge)
    assert len(judge.requests) == 3
    judge.answers = [answer, answer, completion('{"score": 1}')]
    judge.requests.clear()
    assert ask(judge) == 1.0


def test_nobody_there_may_be_there_later() -> None:
    with pytest.raises(JudgeUnavailable, match="cannot be reached"):
        asyncio.run(llm_judge("?", api_url="http://127.0.0.1:9/v1", timeout=1))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=completion("1").body, after=30.0),
        Answer(body=completion("1" * 2000).body, how="trickled"),
        Answer(body=completion("1").body, how="stalled"),
        Answer(body=completion("1").body, how="stalled", after=0.3),
    ],
)
def test_the_time_limit_holds_for_every_kind_of_slowness(judge: Judge, answer: Answer) -> None:
    judge.answers = [answer]
    began = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="did not answer in time"):
        ask(judge, timeout=0.4)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("status", [200, 503])
def test_the_time_limit_is_one_for_all_of_an_answer(judge: Judge, status: int) -> None:
    """Not one for its beginning and another for the rest."""
    judge.answers = [Answer(status=status, body="x" * 100, how="stalled", after=0.8)]
    began = time.monotonic()
    with pytest.raises(JudgeUnavailable):
        ask(judge, timeout=1.0)
    assert time.monotonic() - began < 1.6


def test_the_time_limit_of_the_reward_holds_too(judge: Judge) -> None:
    judge.answers = [Answer(after=30.0)]

    async def reward() -> float:
        answer_within(0.5)
        return await llm_judge("?", api_url=judge.url, timeout=60)

    began = time.monotonic()
    with pytest.raises(JudgeUnavailable, match="did not answer in time"):
        asyncio.run(reward())
    assert time.monotonic() - began < 5


def test_a_call_has_time_left_to_say_what_was_wrong() -> None:
    assert answer_by() == math.inf

    async def left_of(seconds: float) -> float:
        answer_within(seconds)
        return answer_by() - time.monotonic()

    assert asyncio.run(left_of(2)) == pytest.approx(1.5, abs=0.1)
    assert asyncio.run(left_of(60)) == pytest.approx(57, abs=0.1)
    assert answer_by() == math.inf, "each call has its own limit"


def test_a_server_that_asks_for_patience_gets_it_or_none(judge: Judge) -> None:
    judge.answers = [
        Answer(status=429, headers={"Retry-After": "0.2"}),
        completion('{"score": 1}'),
    ]
    began = time.monotonic()
    assert ask(judge) == 1.0
    assert time.monotonic() - began >= 0.2
    judge.requests.clear()
    judge.answers = [Answer(status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(JudgeUnavailable, match="429"):
        ask(judge)
    assert len(judge.requests) == 1


def test_the_key_goes_to_no_other_server_and_into_no_message(judge: Judge) -> None:
    key = "k-secret-1"
    with judge_server() as other:
        other.says('{"score": 1}')
        moved = {"Location": f"{other.url}/chat/completions"}
        judge.answers = [Answer(status=307, headers=moved)]
        with pytest.raises(JudgeError, match="answered 307"):
            ask(judge, api_key=key)
        assert not other.requests
    said = completion(f"{key} is your key").body
    for status, body in (
        (401, f"no {key}"),
        (500, f"no {key}"),
        (200, f"<p>{key}</p>"),
        (200, said),
    ):
        judge.answers = [Answer(status=status, body=body)]
        with pytest.raises(JudgeError) as caught:
            ask(judge, api_key=key, api_url=f"{judge.url}?key={key}")
        assert key not in str(caught.value)
        assert f"{judge.url}/chat/completions" in str(caught.value), "which of several it was"


def test_many_are_asked_at_once(judge: Judge) -> None:
    """None waits for another here, while the time of its reward goes by."""
    count = 40
    met = threading.Barrier(count)
    judge.together = lambda: met.wait(20)
    judge.says('{"score": 1}')

    async def ask_all() -> list[float]:
        return await asyncio.gather(*(llm_judge("?", api_url=judge.url) for _ in range(count)))

    assert asyncio.run(ask_all()) == [1.0] * count
    assert threading.stack_size() == 0, "of the user's own threads"


# -- sync and async ----------------------------------------------------------------------------------------------------


def test_in_sync_code_it_is_the_number(judge: Judge) -> None:
    judge.says('{"score": 0.5}')
    score = llm_judge("?", api_url=judge.url)
    assert isinstance(score, float)
    assert score / 2 == 0.25
    assert max(0.0, min(1.0, score)) == 0.5
    assert len(judge.requests) == 1
    assert asyncio.run(score) == 0.5


def test_in_async_code_it_can_be_reckoned_with_before_it_is_there(judge: Judge) -> None:
    judge.says('{"score": 0.5}')

    async def reckon() -> list[float]:
        def asked() -> Any:
            return llm_judge("?", api_url=judge.url)

        several = [asked() / 2, 1 - asked(), 2 * asked() + asked(), 1 / asked(), asked() - 0.5]
        return [*await asyncio.gather(*several), await asyncio.create_task(asked())]

    assert asyncio.run(reckon()) == [0.25, 0.5, 1.5, 2.0, 0.0, 0.5]
    assert len(judge.requests) == 7


@pytest.mark.parametrize(
    "use",
    [
        lambda score: 1.0 if score else 0.0,
        lambda score: max(0.0, score),
        lambda score: score == 1,
        lambda score: float(score),
        lambda score: f"{round(score)}",
    ],
)
def test_a_forgotten_await_is_said_and_nothing_is_asked(judge: Judge, use: Any) -> None:
    async def reward() -> Any:
        return use(llm_judge("?", api_url=judge.url))

    with pytest.raises(JudgeError, match="write `await llm_judge"):
        asyncio.run(reward())
    assert not judge.requests


def test_a_task_that_is_cancelled_ends(judge: Judge) -> None:
    judge.answers = [Answer(after=1.0)]

    async def cancelled() -> None:
        task = asyncio.create_task(llm_judge("?", api_url=judge.url, timeout=2))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_a_score_is_a_coroutine_too() -> None:
    assert asyncio.iscoroutine(Score(0.5))
    assert json.dumps(Score(0.5)) == "0.5"
