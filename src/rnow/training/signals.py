"""Ctrl-C, SIGTERM and SIGHUP: the first asks for a stop at the next safe point, the second exits at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rnow.errors import (
    EXIT_DONE,
    EXIT_HUNG_UP,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    StopRequested,
)

_EXIT_CODES = {
    signal.SIGINT: EXIT_INTERRUPTED,
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGHUP: EXIT_HUNG_UP,
}


class StopFlag:
    """Remembers that the run must end; ``poll`` is called at safe points and raises then.

    Attributes:
        asked_at: ``time.monotonic()`` of the first signal; None before.
        handled: the signals are handled: this is the main thread, and the process is the run's to end.
    """

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.handled = False
        self._exit_code: int | None = None
        self._failure: Exception | None = None
        self._on_first: Callable[[], None] | None = None
        self._result_is_there = False

    @property
    def exit_code(self) -> int | None:
        """Of the first signal: 130, 143 or 129; None before."""
        return self._exit_code

    def poll(self) -> None:
        """Raise StopRequested if a stop was asked for, or what ``fail`` was given. Safe points: between tokens,
        micro-batches and stages."""
        if self._failure is not None:
            raise self._failure
        if self._exit_code is not None:
            raise StopRequested(exit_code=self._exit_code)

    def fail(self, error: Exception) -> None:
        """The run is to end with ``error`` at its next safe point. From any thread; the first one counts."""
        self._failure = self._failure or error

    def hear_callbacks(self, loop: asyncio.AbstractEventLoop) -> None:
        """What one of our own callbacks raises in the event loop ends the run. By default asyncio would log it, and
        whoever waits for what the callback was to do would wait for ever."""

        def heard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            called = getattr(context.get("handle"), "_callback", None)
            error = context.get("exception")
            if isinstance(error, Exception) and str(getattr(called, "__module__", "")).startswith(
                "rnow."
            ):
                self.fail(error)
            else:
                loop.default_exception_handler(context)

        loop.set_exception_handler(heard)

    @contextmanager
    def watch(self, on_first: Callable[[], None] | None = None) -> Iterator[None]:
        """Handle the signals while the block runs. Outside the main thread signals cannot be handled: nothing changes.

        Args:
            on_first: told of the first signal, which then is answered by ``poll``. Without it, the first signal raises
                KeyboardInterrupt at once: there is nothing yet that a safe point would save. ``from_here`` changes it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._on_first = on_first
        # A run started with nohup does not care for its terminal.
        numbers = [
            n for n in _EXIT_CODES if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
        ]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        self.handled = True
        try:
            with _exit_on_second(self._code_of_second):
                yield
        except KeyboardInterrupt:
            if self._exit_code is None:
                raise
            raise StopRequested(
                "before training began: there is nothing to save", exit_code=self._exit_code
            ) from None
        finally:
            self.handled = False
            for number, handler in previous.items():
                signal.signal(number, handler)

    def from_here(self, on_first: Callable[[], None]) -> None:
        """There is something to save now: the first signal waits for ``poll``, and ``on_first`` is told."""
        self._on_first = on_first

    def result_is_there(self, on_first: Callable[[], None]) -> None:
        """The run is done, whatever happens now: a first signal changes nothing, and one after it ends with 0."""
        self._result_is_there = True
        self._on_first = on_first

    def _code_of_second(self, number: int) -> int:
        return EXIT_DONE if self._result_is_there else _EXIT_CODES[signal.Signals(number)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code is not None:
            os._exit(self._code_of_second(number))
        self._exit_code = _EXIT_CODES[signal.Signals(number)]
        self.asked_at = time.monotonic()
        if self._on_first is None:
            raise KeyboardInterrupt
        self._on_first()


@contextmanager
def _exit_on_second(code_of: Callable[[int], int]) -> Iterator[None]:
    """The second signal ends the process although the main thread is inside a kernel, where Python's handlers have to wait:
    the interpreter writes each signal to a pipe as it comes, and a thread reads there."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    previous = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def listen() -> None:
        heard = 0
        while numbers := os.read(read_end, 64):
            for number in numbers:
                heard += number in _EXIT_CODES
                if heard > 1:
                    os._exit(code_of(number))
        os.close(read_end)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write_end)
