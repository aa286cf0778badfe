"""The line to the worker process: one JSON object per line over a socket, answers matched to requests by id."""

from __future__ import annotations

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import count
from typing import Any

from rnow import progress
from rnow.serving.http import Refused, ServerDown

_CHUNK = 1 << 20
_POLL = 1.0

Message = dict[str, Any]
"""One line of JSON; its fields are those of the engine's methods (``vllm_worker.Engine``)."""


class WorkerLink:
    """The trainer's end of the socket. Safe to use from any thread; a worker that stops reading blocks nobody.

    The worker sends ``{"id": ..., "ok": {...}}`` or ``{"id": ..., "refused": text}`` or ``{"id": ..., "gone": text}`` for each
    request, and ``{"progress": n}`` every second, where n grows as long as the engine draws tokens.

    Args:
        silence: seconds that requests may be owed without an answer or any progress before the worker counts as gone; may be
            changed.
    """

    def __init__(self, connection: socket.socket, *, silence: float) -> None:
        self._socket = connection
        self.silence = silence
        self._owed: dict[int, Future[Message]] = {}
        self._lock = threading.Lock()
        self._ids = count(1)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._gone: str | None = None
        self._progress = 0
        self._heard = time.monotonic()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="vllm-link", daemon=True).start()

    def call(self, op: str, **fields: object) -> Future[Message]:
        """Send a request. The future holds the ``ok`` part of the answer, or raises ServerDown or Refused;
        cancelling it tells the worker to abort."""
        future: Future[Message] = Future()
        number = next(self._ids)
        with self._lock:
            if self._gone:
                future.set_exception(ServerDown(self._gone))
                return future
            if not self._owed:
                self._heard = time.monotonic()
            self._owed[number] = future
        future.add_done_callback(lambda done: self._settled(number, done))
        self._send({"id": number, "op": op, **fields})
        return future

    def close(self) -> None:
        """Hang up. Requests still owed raise ServerDown."""
        self._fail("it was stopped")

    def _settled(self, number: int, future: Future[Message]) -> None:
        with self._lock:
            owed = self._owed.pop(number, None)
        if owed is not None and future.cancelled():
            self._send({"op": "abort", "id": number})

    def _send(self, message: Mapping[str, object]) -> None:
        self._outbox.put(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _write(self) -> None:
        try:
            while (line := self._outbox.get()) is not None:
                self._socket.sendall(line)
        except OSError:
            self._fail("its connection broke")

    def _read(self) -> None:
        rest = bytearray()
        try:
            while not self._gone:
                if not select.select([self._socket], [], [], _POLL)[0]:
                    self._check_silence()
                    continue
                chunk = self._socket.recv(_CHUNK)
                if not chunk:
                    self._fail("its process ended")
                    return
                rest += chunk
                if b"\n" in chunk:
                    *lines, tail = rest.split(b"\n")
                    rest = bytearray(tail)
                    for line in lines:
                        self._take(json.loads(line))
                self._check_silence()
        except (OSError, ValueError) as error:
            self._fail(f"its connection broke ({error})")

    def _take(self, message: Message) -> None:
        if "progress" in message:
            if message["progress"] != self._progress:
                self._progress = message["progress"]
                self._heard = time.monotonic()
                progress.moved()
            return
        progress.moved()
        self._heard = time.monotonic()
        with self._lock:
            future = self._owed.pop(message["id"], None)
        # False: its rollout was cancelled meanwhile.
        if future is None or not future.set_running_or_notify_cancel():
            return
        if "ok" in message:
            future.set_result(message["ok"])
        elif "refused" in message:
            future.set_exception(Refused(message["refused"]))
        else:
            future.set_exception(ServerDown(message["gone"]))

    def _check_silence(self) -> None:
        with self._lock:
            silent = time.monotonic() - self._heard if self._owed else 0.0
        if silent > self.silence:
            self._fail(f"it has not answered for {silent:.0f} s")

    def _fail(self, why: str) -> None:
        with self._lock:
            if self._gone:
                return
            self._gone = why
            owed = list(self._owed.values())
            self._owed.clear()
        self._outbox.put(None)
        # shutdown wakes a blocked recv and sendall; the reader or the last reference closes.
        for end in (lambda: self._socket.shutdown(socket.SHUT_RDWR), self._socket.close):
            try:
                end()
            except OSError:
                continue
        for future in owed:
            if future.set_running_or_notify_cancel():
                future.set_exception(ServerDown(why))
