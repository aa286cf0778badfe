"""A judge on the loopback interface that says what it is told to say, or fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

VARIABLES = (
    *(
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_MODEL",
        "LLM_JUDGE_API_KEY",
        "LLM_JUDGE_API_URL",
    ),
    *("http_proxy", "HTTP_PROXY"),
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer. ``how``: as a server should; its first half, and the end or nothing more; or a byte now and then. ``after``:
    seconds before it begins."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    how: Literal["whole", "cut", "stalled", "trickled"] = "whole"
    after: float = 0.0


def completion(content: object, **choice: Any) -> Answer:
    """A chat completion with this content."""
    body = {"choices": [{"message": {"role": "assistant", "content": content}, **choice}]}
    return Answer(body=json.dumps(body))


class Judge:
    """Gives each request the next of ``answers``, the last one again and again; ``answer`` wins, where it is set.

    Attributes:
        together: called for each request, whatever others are under way, before it is answered.
        url: its address, up to ``/v1``.
        requests, headers, paths: what it was asked, oldest first.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answers: list[Answer] = []
        self.answer: Callable[[dict[str, Any]], Answer] | None = None
        self.together: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def says(self, *contents: object) -> None:
        """These are its next answers."""
        self.answers = [completion(content) for content in contents]

    def next_answer(self, path: str, headers: dict[str, str], request: dict[str, Any]) -> Answer:
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            if self.answer is not None:
                return self.answer(request)
            return self.answers[min(len(self.requests), len(self.answers)) - 1]


@contextmanager
def judge_server(port: int = 0) -> Iterator[Judge]:
    """A judge that listens until the block ends."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.together()
            answer = judge.next_answer(self.path, dict(self.headers), request)
            ended.wait(answer.after)
            try:
                self._give(answer)
            except OSError:  # nobody waits for it any more
                self.close_connection = True

        def _give(self, answer: Answer) -> None:
            payload = answer.body.encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            if answer.how in ("cut", "stalled"):
                self.wfile.write(payload[: len(payload) // 2])
                ended.wait(30.0 if answer.how == "stalled" else 0.0)
                self.close_connection = True
            elif answer.how == "trickled":
                for byte in payload:
                    self.wfile.write(bytes([byte]))
                    if ended.wait(0.05):
                        break
            else:
                self.wfile.write(payload)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
