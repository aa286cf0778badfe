"""A loopback server that speaks vLLM's API by rote, with faults on demand.

In a test: ``with ScriptedServer() as server: server.faults.append(status(429))``; each request takes one fault off the
list. As a program (``python scripted.py --model M --served-model-name N --host H --port P``) it stands in for vLLM's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

VOCABULARY, ROWS, WINDOW = 100, 104, 64

Fault = Callable[["Handler", dict[str, Any]], bool]
"""Sends an answer of its own (True), or changes the answer that is sent (False)."""


def logprob(token: int, position: int) -> float:
    """What the scripted model says of ``token`` at ``position``."""
    return -0.1 - ((token * 7 + position * 3) % 29) / 10


def tokenize(text: str) -> list[int]:
    """As the character tokenizer of tests/conftest.py."""
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    found = []
    for part in re.findall("|".join(map(re.escape, controls)) + r"|[\s\S]", text):
        if part in controls:
            found.append(controls.index(part))
        elif part == "\n":
            found.append(4)
        else:
            found.append(ord(part) - 27 if 32 <= ord(part) < 127 else 3)
    return found


# ---- faults ---------------------------------------------------------------------------------------------------------


def status(code: int, body: str = '{"error": {"message": "no"}}', **headers: str) -> Fault:
    def send(handler: Handler, answer: dict[str, Any]) -> bool:
        handler.send(code, body, headers)
        return True

    return send


def html(handler: Handler, answer: dict[str, Any]) -> bool:
    handler.send(200, "<html><body>Please log in\x1b[31m</body></html>", {})
    return True


def hang_up(handler: Handler, answer: dict[str, Any]) -> bool:
    handler.close_connection = True
    handler.connection.close()
    return True


def slow(seconds: float) -> Fault:
    def wait(handler: Handler, answer: dict[str, Any]) -> bool:
        time.sleep(seconds)
        return False

    return wait


def cut(handler: Handler, answer: dict[str, Any]) -> bool:
    """Goes away in the middle of its answer."""
    body = json.dumps(answer)
    handler.send_response(200)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2].encode())
    return hang_up(handler, answer)


def bomb(handler: Handler, answer: dict[str, Any]) -> bool:
    """Zeros, packed a thousandfold."""
    handler.send_response(200)
    handler.send_header("content-encoding", "gzip")
    handler.send_header("content-length", str(len(BOMB)))
    handler.end_headers()
    handler.wfile.write(BOMB)
    return True


def flood(handler: Handler, answer: dict[str, Any]) -> bool:
    """An answer without end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def drip(handler: Handler, answer: dict[str, Any]) -> bool:
    """A byte now and then, so that no single read is slow."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


def body(text: str) -> Fault:
    """Something else that is no answer."""

    def send(handler: Handler, answer: dict[str, Any]) -> bool:
        handler.send(200, text, {})
        return True

    return send


BOMB = gzip.compress(bytes(16 << 20))
DEEP = '{"choices": ' + "[" * 10_000 + "]" * 10_000 + "}"
DIGITS = '{"choices": ' + "9" * 5_000 + "}"


def changed(change: Callable[[dict[str, Any]], None]) -> Fault:
    """The right answer, tampered with: ``change`` gets the choice of a completion."""

    def apply(handler: Handler, answer: dict[str, Any]) -> bool:
        if "choices" in answer:
            change(answer["choices"][0])
        return False

    return apply


def prompt_value(value: object) -> Fault:
    def change(choice: dict[str, Any]) -> None:
        for entry in choice["prompt_logprobs"][-1].values():
            entry["logprob"] = value

    return changed(change)


# ---- the server -----------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer(json.loads(raw or b"{}"))

    def send(self, code: int, body: str, headers: dict[str, str]) -> None:
        data = body.encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.path, body))
            server.in_flight += 1
            self._counted = 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.pop(0) if server.faults else server.always
        try:
            locked = self.path.startswith("/v1") and server.key is not None
            given = self.headers.get("authorization", "").removeprefix("Bearer ")
            if locked and given != server.key:
                self.send(401, '{"error":"Unauthorized"}', {})
                return
            if server.pause:
                time.sleep(server.pause)
            code, answer = self._compute(body)
            if fault is not None and fault(self, answer):
                return
            # Before the answer leaves: the client may ask again before this thread goes on.
            self._leave()
            self.send(code, json.dumps(answer), {})
        except (BrokenPipeError, ConnectionResetError, OSError):
            pass
        finally:
            self._leave()

    def _leave(self) -> None:
        """This request is not in flight any more. Idempotent."""
        with self.server.lock:
            self.server.in_flight -= self._counted
            self._counted = 0

    def _compute(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        server = self.server
        path = self.path.partition("?")[0]
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            entries = [
                {"id": name, "root": root, "parent": parent, "max_model_len": WINDOW}
                for name, (root, parent) in server.models.items()
            ]
            return 200, {"object": "list", "data": entries}
        if path == "/tokenize":
            return 200, {"tokens": tokenize(body["prompt"])}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.models:
                return 400, _error("The lora adapter has already been loaded.")
            server.models[body["lora_name"]] = (body["lora_path"], "base")
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            if server.models.pop(body["lora_name"], None) is None:
                return 404, _error("The lora adapter cannot be found.")
            return 200, {}
        if path in ("/sleep", "/wake_up") and server.can_sleep:
            server.asleep = path == "/sleep"
            return 200, {}
        if path == "/v1/completions":
            return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids = body["prompt"]
        if body["model"] not in self.server.models:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        wanted = body.get("logprob_token_ids") or []
        if any(token >= ROWS for token in [*ids, *wanted]):
            return 400, _error("out-of-vocab token ids")
        if len(ids) + body["max_tokens"] > WINDOW:
            return 400, _error("longer than the maximum model length")
        stops = body.get("stop_token_ids") or []
        drawn = [(ids[-1] + 1 + i) % VOCABULARY for i in range(body["max_tokens"])]
        cut = next((i + 1 for i, token in enumerate(drawn) if token in stops), None)
        drawn = drawn[:cut]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": "length" if cut is None else "stop",
            "token_ids": drawn,
            "prompt_token_ids": ids,
            "logprobs": None,
            "prompt_logprobs": None,
        }
        if body.get("prompt_logprobs") is not None:
            top = range(body["prompt_logprobs"])
            choice["prompt_logprobs"] = [None] + [
                {
                    str(t): {"logprob": logprob(t, position), "rank": 1}
                    for t in {ids[position], *top}
                }
                for position in range(1, len(ids))
            ]
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "token_logprobs": [logprob(t, len(ids) + i) for i, t in enumerate(drawn)],
                "top_logprobs": [
                    {f"token_id:{t}": math.log(0.01) for t in [*wanted, drawn[0]]},
                ],
            }
        return 200, {"model": body["model"], "choices": [choice]}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": 400}}


class ScriptedServer(ThreadingHTTPServer):
    """``key``: a bearer token, or a whole header. ``faults``: for the next requests, in order; ``always``: for all others. ``pause``: seconds before each answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key = key
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.pause = 0.0
        self.models: dict[str, tuple[str, str | None]] = {"base": ("/models/base", None)}
        self.can_sleep = True
        self.asleep = False
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies of the requests for ``path``."""
        return [body for asked, body in self.requests if asked.partition("?")[0] == path]

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--stop-after", type=int, help="exit at this completion request")
    parser.add_argument(
        "--starts", help="a file that counts the starts; --stop-after holds for the first --faulty"
    )
    parser.add_argument("--faulty", type=int, default=1)
    known, _ = parser.parse_known_args()
    starts = 1
    if known.starts:
        with open(known.starts, "a+") as file:  # noqa: PTH123
            file.write("x")
            file.seek(0)
            starts = len(file.read())
    server = ScriptedServer(known.port, os.environ.get("VLLM_API_KEY"))
    server.models = {known.served_model_name: (known.model, None)}

    def maybe_stop(handler: Handler, answer: dict[str, Any]) -> bool:
        if len(server.asked("/v1/completions")) >= known.stop_after:
            os._exit(3)
        return False

    if known.stop_after and starts <= known.faulty:
        server.always = maybe_stop
    sys.stderr.write("serving\n")
    server.serve_forever()


if __name__ == "__main__":
    _main()
