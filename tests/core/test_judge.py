"""llm_judge against a server on the loopback interface."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rnow.core import JudgeError, llm_judge


class Judge:
    """Answers each request with the next of ``answers``: (status, body); the last one repeats."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answers: list[tuple[int, str]] = []
        self.url = ""

    def says(self, *contents: str) -> None:
        self.answers = [
            (200, json.dumps({"choices": [{"message": {"content": content}}]}))
            for content in contents
        ]


@pytest.fixture
def judge() -> Iterator[Judge]:
    state = Judge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.requests.append(json.loads(body))
            state.headers.append(dict(self.headers))
            state.paths.append(self.path)
            index = min(len(state.requests), len(state.answers)) - 1
            status, answer = state.answers[index]
            payload = answer.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1/"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def ask(judge: Judge, **options: Any) -> float:
    return asyncio.run(llm_judge("Is it right?", base_url=judge.url, **options))


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


@pytest.mark.parametrize("content", ['```json\n{"score": 1}\n```', "1", "1.0", 'So: {"score":1}'])
def test_looser_spellings_of_the_answer(judge: Judge, content: str) -> None:
    judge.says(content)
    assert ask(judge) == 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("excellent", "no score"),
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
    judge.answers = [(200, "<html>hello</html>")]
    with pytest.raises(JudgeError, match="no chat completion"):
        ask(judge)


def test_a_refusal_is_not_retried_and_hides_the_key(judge: Judge) -> None:
    judge.answers = [(401, "bad key k-secret-1")]
    with pytest.raises(JudgeError, match="401") as caught:
        ask(judge, api_key="k-secret-1")
    assert len(judge.requests) == 1
    assert "k-secret-1" not in str(caught.value)


def test_a_busy_server_is_asked_again(judge: Judge) -> None:
    judge.says('{"score": 1}')
    judge.answers.insert(0, (429, "slow down"))
    assert ask(judge) == 1.0
    assert len(judge.requests) == 2


def test_a_server_without_schemas_is_asked_without(judge: Judge) -> None:
    judge.says('{"score": 1}')
    judge.answers.insert(0, (400, "unknown field response_format"))
    assert ask(judge) == 1.0
    assert "response_format" not in judge.requests[1]


def test_no_server() -> None:
    with pytest.raises(JudgeError, match="cannot be reached"):
        asyncio.run(llm_judge("?", base_url="http://127.0.0.1:9/v1", timeout=1))


def test_only_http_addresses() -> None:
    with pytest.raises(JudgeError, match="http://"):
        asyncio.run(llm_judge("?", base_url="file:///etc", timeout=1))
