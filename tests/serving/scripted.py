"""A loopback server that speaks the API of vLLM, SGLang or an OpenAI-compatible server by rote, with faults on demand.

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
    return -4.2 - ((token * 7 + position * 3) % 29) / 10


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
    """The log-probability of a prompt's last token is ``value``, in each protocol."""

    def apply(handler: Handler, answer: dict[str, Any]) -> bool:
        if "meta_info" in answer:
            answer["meta_info"]["input_token_logprobs"][-1][0] = value
        elif "choices" in answer:
            choice = answer["choices"][0]
            if choice.get("prompt_logprobs") is not None:
                for entry in choice["prompt_logprobs"][-1].values():
                    entry["logprob"] = value
            elif choice["logprobs"] is not None and len(choice["logprobs"]["tokens"]) > 1:
                choice["logprobs"]["token_logprobs"][-2] = value
        return False

    return apply


def one_fewer(handler: Handler, answer: dict[str, Any]) -> bool:
    """The last token of a prompt is not listed."""
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"].pop()
    elif "choices" in answer:
        choice = answer["choices"][0]
        if choice.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"].pop()
        elif choice["logprobs"] is not None and len(choice["logprobs"]["tokens"]) > 1:
            for listed in choice["logprobs"].values():
                del listed[-2]
    return False


def first_judged(handler: Handler, answer: dict[str, Any]) -> bool:
    """The very first token has a log-probability, so something stands before it."""
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"][0][0] = -4.0
    elif "choices" in answer:
        choice = answer["choices"][0]
        if choice.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"][0] = {str(choice["prompt_token_ids"][0]): {"logprob": -4.0}}
        elif choice["logprobs"] is not None:
            choice["logprobs"]["token_logprobs"][0] = -4.0
    return False


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
                {
                    "id": name,
                    "root": root,
                    "parent": parent,
                    "max_model_len": server.window,
                    "owned_by": server.owned_by,
                }
                for name, (root, parent) in server.models.items()
            ]
            return 200, {"object": "list", "data": entries}
        if path == "/tokenize" and server.protocol in ("vllm", "sglang"):
            return 200, {"tokens": tokenize(body["prompt"])}
        if path == "/generate" and server.protocol == "sglang":
            return self._generate(body)
        if path == "/generate" and server.protocol == "tgi":
            return 422, {"error": "missing field `inputs`"}
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
        if path.endswith("/chat/completions") and server.script is not None:
            return 200, server.script(body)
        if path == "/v1/completions" and server.protocol == "vllm":
            return self._complete(body)
        if path == "/v1/completions" and server.protocol == "sglang":
            return 200, {"model": body["model"], "choices": [{"text": "", "logprobs": None}]}
        if path == "/v1/completions" and server.protocol == "tgi":
            return 422, {"error": "prompt: data did not match any variant"}
        if path == "/v1/completions":
            return self._echo(body)
        return 404, {"detail": "Not Found"}

    def _judged(self, ids: list[int], most: int, listed: int) -> tuple[list[Any], list[Any]]:
        """What is said of each token of a prompt: its log-probability, and the ``listed`` likeliest ids with theirs."""
        server = self.server
        with server.lock:
            offset = server.replicas[0]
            server.replicas.append(server.replicas.pop(0))
        begun = 0 if server.bos is None or ids[:1] == [server.bos] else 1
        values: list[Any] = [None]
        top: list[Any] = [None]
        for position in range(1, len(ids)):
            place = min(max(position + server.shift, 0), len(ids) - 1)
            values.append(logprob(ids[place], place + begun) - offset)
            table = {t: logprob(t, position + begun) - offset for t in range(VOCABULARY)}
            best = sorted(table, key=lambda t: -table[t])[: min(listed, most)]
            top.append({t: table[t] for t in best})
        return values, top

    def _generate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """As SGLang."""
        server, ids = self.server, body["input_ids"]
        if len(ids) >= (server.window or WINDOW):
            return 400, _error("longer than the model's context length")
        values, top = self._judged(ids, server.max_listed, body.get("top_logprobs_num", 0))
        text = body.get("return_text_in_logprobs")
        start = body["logprob_start_len"] % (len(ids) + 1)
        meta: dict[str, Any] = {
            "prompt_tokens": len(ids),
            "completion_tokens": body["sampling_params"]["max_new_tokens"],
            "finish_reason": {"type": "length", "length": 0},
            "input_token_logprobs": [
                [value, token, server.text(token) if text else None]
                for value, token in zip(values, ids, strict=True)
            ][start:],
            "output_token_logprobs": [],
        }
        if body.get("top_logprobs_num"):
            meta["input_top_logprobs"] = [
                [[value, t, None] for t, value in entry.items()] if entry else None for entry in top
            ]
        if wanted := body.get("token_ids_logprob"):
            if max(wanted) >= ROWS:
                self.server.read_past_the_head = True
            meta["output_token_ids_logprobs"] = [[[math.log(0.01), t, None] for t in wanted]]
        return 200, {"text": "", "meta_info": meta}

    def _echo(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """As an OpenAI-compatible server; as llama.cpp's, which echoes nothing."""
        server, ids = self.server, body["prompt"]
        if body["model"] not in server.models:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        strict = server.protocol == "openai-text"
        known = {"model", "prompt", "max_tokens", "temperature", "echo", "logprobs"}
        if strict and set(body) - known:
            return 400, _error("Extra inputs are not permitted")
        if server.protocol == "llamacpp":
            if body.get("echo"):
                return 500, _error("Only no echo is supported")
            return 200, {"model": body["model"], "choices": [{"text": "", "logprobs": None}]}
        if len(ids) + body["max_tokens"] > server.limit:
            return 400, _error("longer than the maximum model length")
        if not body.get("echo"):
            return 200, {"model": body["model"], "choices": [{"text": "", "logprobs": None}]}
        values, top = self._judged(ids, server.max_listed, body["logprobs"])

        def name(token: int) -> str:
            if body.get("return_tokens_as_token_ids"):
                return f"token_id:{token}"
            return server.text(token)

        drawn = (ids[-1] + 1) % VOCABULARY
        listed = {
            "tokens": [name(token) for token in [*ids, drawn]],
            "token_logprobs": [*values, -4.5],
            "top_logprobs": [
                entry and {name(t): value for t, value in entry.items()}
                for entry in [*top, {0: -4.5}]
            ],
        }
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": listed}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return 200, {"model": body["model"], "choices": [choice], "usage": usage}

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
            if body["prompt_logprobs"] > self.server.max_listed:
                return 400, _error("Requested prompt logprobs of more than max_logprobs")
            values, top = self._judged(ids, len(ids) + VOCABULARY, body["prompt_logprobs"])
            choice["prompt_logprobs"] = [None] + [
                {str(t): {"logprob": one, "rank": 1} for t, one in {**best, token: value}.items()}
                for token, value, best in zip(ids[1:], values[1:], top[1:], strict=True)
            ]
        if body.get("logprobs") is not None:
            choice["logprobs"] = {
                "token_logprobs": [logprob(t, len(ids) + i) for i, t in enumerate(drawn)],
                "top_logprobs": [
                    {f"token_id:{t}": math.log(0.01) for t in [*wanted, drawn[0]]},
                ],
            }
        return 200, {"model": body["model"], "choices": [choice]}


def chat(
    content: str | None = None,
    *calls: tuple[str, object],
    finish: str | None = None,
    usage: tuple[int, int] | None = (10, 5),
    **more: object,
) -> dict[str, Any]:
    """A chat completion: a text, and calls as (name, arguments). ``more`` goes into the message."""
    message: dict[str, Any] = {"role": "assistant", "content": content, **more}
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call-{index}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": given if isinstance(given, str) else json.dumps(given),
                },
            }
            for index, (name, given) in enumerate(calls)
        ]
    reason = finish or ("tool_calls" if calls else "stop")
    answer: dict[str, Any] = {"choices": [{"message": message, "finish_reason": reason}]}
    if usage is not None:
        answer["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return answer


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "code": 400}}


class ScriptedServer(ThreadingHTTPServer):
    """A server.

    Attributes:
        protocol: vllm, sglang, openai (tokens named by id where that is asked for), openai-text (only by text), and, for what
            cannot be a teacher, llamacpp and tgi.
        key: a bearer token, or a whole header.
        faults: for the next requests, in order; ``always``: for all others.
        pause: seconds before each answer.
        window: what it says of its window; ``limit``: the tokens that it takes where it says nothing.
        max_listed: how many of the likeliest tokens it lists at most.
        replicas: nats by which each of the models behind it is off, in turn.
        shift: by how many positions its log-probabilities are off.
        bos: an id that it puts before every prompt that lacks it, without telling.
        names: other texts of tokens.
        script: what it answers to a chat: the body of a request -> the body of an answer, see ``chat``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0, key: str | None = None, protocol: str = "vllm") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key = key
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.pause = 0.0
        self.protocol = protocol
        self.owned_by: str | None = {"openai": None, "openai-text": None}.get(protocol, protocol)
        self.window: int | None = WINDOW if protocol in ("vllm", "sglang") else None
        self.limit = 512
        self.max_listed = VOCABULARY
        self.replicas = [0.0]
        self.shift = 0
        self.bos: int | None = None
        self.read_past_the_head = False
        self.names: dict[int, str] = {}
        self.models: dict[str, tuple[str, str | None]] = {"base": ("/models/base", None)}
        self.script: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.can_sleep = True
        self.asleep = False
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    def text(self, token: int) -> str:
        """What a token stands for."""
        if token in self.names:
            return self.names[token]
        controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>", "\n"]
        return controls[token] if token < 5 else chr(token + 27)

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
    parser.add_argument("--lora-modules", type=json.loads)
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
    if module := known.lora_modules:
        server.models[module["name"]] = (module["path"], module["base_model_name"])

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
