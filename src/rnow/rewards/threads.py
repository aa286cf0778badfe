"""Synchronous user code off the event loop, with a deadline for each call, at almost no cost for short calls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_TICK = 0.02
_MAX_WORKERS = 16
_MAX_HANGING = 8


class CallTimeout(Exception):
    """A call did not return within its time. Its thread cannot be ended and is left behind."""


class HangingCalls(Exception):
    """So many earlier calls of this function still hang that it is not called again."""


class _Call:
    __slots__ = (
        "abandoned",
        "arguments",
        "error",
        "function",
        "future",
        "started",
        "timeout",
        "value",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        timeout: float,
        future: asyncio.Future[Any],
    ) -> None:
        self.function = function
        self.arguments = arguments
        self.timeout = timeout
        self.future = future
        self.started: float | None = None
        self.abandoned = False
        self.value: Any = None
        self.error: BaseException | None = None


class ThreadLane:
    """Runs calls in threads for one event loop.

    Calls made in the same turn of the loop are handed to one worker thread together, and their results come back
    together: a thousand trivial calls cost two thread switches. While calls are still waiting after 20 ms, further
    workers join (up to 16), so slow calls run side by side. Workers end when nothing is left; an idle lane has no thread.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[_Call] = deque()
        self._done: deque[_Call] = deque()
        self._running: dict[int, _Call] = {}
        self._hanging: dict[Callable[..., Any], int] = {}
        self._lock = threading.Lock()
        self._workers = 0
        self._next_worker = 0
        self._flush_scheduled = False
        self._ticking = False
        self._delivery_scheduled = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop whose calls it runs."""
        return self._loop

    async def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """``function(*arguments)``, from a thread.

        Raises CallTimeout after ``timeout`` seconds of running (waiting for a worker does not count), HangingCalls,
        or what the function raises.
        """
        if self._hanging.get(function, 0) >= _MAX_HANGING:
            raise HangingCalls(f"not called: {_MAX_HANGING} earlier calls still hang")
        call = _Call(function, arguments, timeout, self._loop.create_future())
        self._waiting.append(call)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)
        try:
            await call.future
        finally:
            # Cancelled: a worker that finds it skips it.
            call.abandoned = True
        if call.error is not None:
            raise call.error
        return call.value

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._workers == 0:
            self._add_worker()
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(_TICK, self._tick)

    def _add_worker(self) -> None:
        with self._lock:
            self._workers += 1
            self._next_worker += 1
            worker = self._next_worker
        # Daemon: a thread that hangs must not keep the program from ending.
        thread = threading.Thread(
            target=self._work, args=(worker,), name=f"reward-{worker}", daemon=True
        )
        thread.start()

    def _work(self, worker: int) -> None:
        while True:
            with self._lock:
                call = self._waiting.popleft() if self._waiting else None
                if call is None:
                    self._workers -= 1
                    return
                if call.abandoned:
                    continue
                call.started = time.monotonic()
                self._running[worker] = call
            try:
                call.value = call.function(*call.arguments)
            except BaseException as error:
                call.error = error
            with self._lock:
                if self._running.pop(worker, None) is None:
                    # The tick gave this thread up long ago and counted it out.
                    self._hanging[call.function] -= 1
                    return
            self._done.append(call)
            self._schedule_delivery()

    def _schedule_delivery(self) -> None:
        if self._delivery_scheduled:
            return
        self._delivery_scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop was closed while the call ran: nobody waits for it any more.
            self._done.clear()

    def _deliver(self) -> None:
        self._delivery_scheduled = False
        while self._done:
            call = self._done.popleft()
            if not call.future.done():
                call.future.set_result(None)

    def _tick(self) -> None:
        """Give up on calls past their time, and add a worker while calls are waiting."""
        now = time.monotonic()
        with self._lock:
            late = [
                (worker, call)
                for worker, call in self._running.items()
                if call.started is not None and now - call.started > call.timeout
            ]
            for worker, call in late:
                del self._running[worker]
                self._workers -= 1
                self._hanging[call.function] = self._hanging.get(call.function, 0) + 1
            busy = bool(self._running or self._waiting)
            wanted = bool(self._waiting) and self._workers < _MAX_WORKERS
        for _, call in late:
            if not call.future.done():
                call.error = CallTimeout(f"took longer than {call.timeout:g} s")
                call.future.set_result(None)
        if late:
            self._fail_waiting()
        if wanted:
            self._add_worker()
        self._ticking = busy
        if busy:
            self._loop.call_later(_TICK, self._tick)

    def _fail_waiting(self) -> None:
        """Calls of a function that reached its limit of hanging threads are not worth another thread each."""
        hopeless = {function for function, count in self._hanging.items() if count >= _MAX_HANGING}
        if not hopeless:
            return
        with self._lock:
            failed = [call for call in self._waiting if call.function in hopeless]
            kept = [call for call in self._waiting if call.function not in hopeless]
            self._waiting.clear()
            self._waiting.extend(kept)
        for call in failed:
            if not call.future.done():
                call.error = HangingCalls(f"not called: {_MAX_HANGING} earlier calls still hang")
                call.future.set_result(None)
