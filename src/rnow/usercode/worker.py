"""The process that runs a user's functions: one call after another, or all at once on one event loop."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import sys

from rnow.core.deadline import answer_within
from rnow.core.marks import Spec
from rnow.core.reward import RewardArgs
from rnow.core.tool import ToolArgs
from rnow.usercode import frames
from rnow.usercode.answers import error_answer, reward_answer, tool_answer
from rnow.usercode.inbox import take
from rnow.usercode.records import Settings
from rnow.usercode.user_file import UserFile

_MAX_STUBBORN = 16


def serve(
    inbox: socket.socket,
    outbox: socket.socket,
    code: UserFile,
    names: list[str],
    settings: Settings,
    *,
    is_async: bool,
) -> None:
    """Answer calls until the inbox closes. Does not return.

    Raises KeyError for a name that the file no longer has.
    """
    worker = _Worker(inbox, outbox, code, code.named(names), settings)
    _reseed()
    worker.send(frames.pack(frames.HELLO, call=os.getpid()))
    if is_async:
        _AsyncWorker(worker).run()
    else:
        worker.run()


def _reseed() -> None:
    """Python reseeds ``random`` in a fork; numpy does not, and workers would all draw the same numbers."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        with contextlib.suppress(Exception):
            numpy_random.seed()


class _Worker:
    def __init__(
        self,
        inbox: socket.socket,
        outbox: socket.socket,
        code: UserFile,
        specs: list[Spec],
        settings: Settings,
    ) -> None:
        self.inbox = inbox
        self._outbox = outbox
        self._code = code
        self._specs = specs
        self._settings = settings
        self._folder = str(code.folder)

    def run(self) -> None:
        while True:
            _, call, function, seconds, body = self.receive(wait=True)
            answer_within(seconds)
            with contextlib.suppress(OSError):
                os.chdir(self._folder)  # an earlier call may have gone elsewhere
            try:
                value = self.invoke(function, body)
                if inspect.isawaitable(value):
                    import asyncio

                    value = asyncio.run(_awaited(value))
                answer = self.answer(value)
            except BaseException as error:
                answer = self.failure(error, function)
            self.reply(call, answer)

    def receive(self, *, wait: bool) -> frames.Frame:
        """The next message. Ends the process when the inbox is closed."""
        message = take(self.inbox, wait=wait)
        if not message:
            flush_output()
            os._exit(0)
        return frames.unpack(message)

    def invoke(self, function: int, body: bytes) -> object:
        """What the function returns for this payload: a value, or something to await."""
        spec = self._specs[function]
        payload = json.loads(body)
        metadata, variables = payload.get("metadata") or {}, payload.get("variables") or {}
        if self._code.kind == "rewards":
            args = RewardArgs(
                metadata=metadata, variables=variables, secrets=dict(self._settings["secrets"])
            )
            return spec.function(args, payload["messages"])
        arguments = dict(payload["arguments"])
        if spec.name in self._code.injected:
            arguments["args"] = ToolArgs(
                metadata=metadata, variables=variables, rollout_id=payload.get("episode", "")
            )
        return spec.function(**arguments)

    def answer(self, value: object) -> bytes:
        """A result as the body of a message."""
        if self._code.kind == "rewards":
            return _json(reward_answer(value))
        return _json(tool_answer(value, frames.RESULT_BYTES))

    def failure(self, error: BaseException, function: int) -> bytes:
        """An exception as the body of a message."""
        target = inspect.unwrap(self._specs[function].function)
        try:
            return _json(error_answer(error, target.__code__.co_filename, self._code.folder))
        except BaseException:
            return _json({"error": {"type": type(error).__name__, "message": ""}})

    def reply(self, call: int, body: bytes) -> None:
        """Send a result. Ends the process when nobody listens."""
        self.send(frames.pack(frames.RESULT, call=call, body=body))

    def send(self, message: bytes) -> None:
        """Send a message. Ends the process when nobody listens."""
        try:
            self._outbox.sendall(message)
        except OSError:
            os._exit(1)


class _AsyncWorker:
    """All calls as tasks of one event loop, so that they share what the module holds, a browser for instance."""

    def __init__(self, worker: _Worker) -> None:
        import asyncio

        self._worker = worker
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._stubborn: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        import asyncio

        asyncio.set_event_loop(self._loop)
        self._loop.add_reader(self._worker.inbox.fileno(), self._receive)
        while True:
            try:
                self._loop.run_forever()
            except BaseException as error:
                # sys.exit() in a task that the user's code started itself.
                sys.stderr.write(f"a background task ended with {type(error).__name__}\n")

    def _receive(self) -> None:
        while True:
            try:
                kind, call, function, seconds, body = self._worker.receive(wait=False)
            except BlockingIOError:
                return
            if kind == frames.CANCEL:
                self._cancel(call)
            else:
                answer = self._answer(call, function, seconds, body)
                self._tasks[call] = self._loop.create_task(answer)

    def _cancel(self, call: int) -> None:
        task = self._tasks.pop(call, None)
        if task is None:
            return  # its result is on the way
        task.cancel()
        self._stubborn.add(task)
        task.add_done_callback(self._stubborn.discard)
        self._worker.send(frames.pack(frames.ACK, call=call))
        if len(self._stubborn) > _MAX_STUBBORN:
            self._worker.send(frames.pack(frames.WORN))

    async def _answer(self, call: int, function: int, seconds: float, body: bytes) -> None:
        import asyncio

        answer_within(seconds)
        try:
            value = await _awaited(self._worker.invoke(function, body))
            answer = self._worker.answer(value)
        except asyncio.CancelledError:
            if call not in self._tasks:
                return  # told to end, and answered for already
            answer = self._worker.failure(RuntimeError("it cancelled itself"), function)
        except BaseException as error:
            answer = self._worker.failure(error, function)
        if self._tasks.pop(call, None) is not None:
            self._worker.reply(call, answer)


async def _awaited(value: object) -> object:
    """What it comes to in the end: older projects `return llm_judge(...)` without await."""
    while inspect.isawaitable(value):
        value = await value
    return value


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def flush_output() -> None:
    """Write out what the user's code printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
