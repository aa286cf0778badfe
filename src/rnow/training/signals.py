"""Ctrl-C and SIGTERM: the first asks for a stop at the next safe point, the second exits at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rnow.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, StopRequested

_EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class StopFlag:
    """Remembers that a stop was asked for; ``poll`` is called at safe points and raises then."""

    def __init__(self) -> None:
        self._exit_code: int | None = None

    def poll(self) -> None:
        """Raise StopRequested if a stop was asked for. Safe points: between tokens, micro-batches and stages."""
        if self._exit_code is not None:
            raise StopRequested(exit_code=self._exit_code)

    @contextmanager
    def watch(self, on_first: Callable[[], None]) -> Iterator[None]:
        """Handle the signals while the block runs. Outside the main thread signals cannot be handled: nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            code = _EXIT_CODES[signal.Signals(number)]
            if self._exit_code is not None:
                os._exit(code)
            self._exit_code = code
            on_first()

        previous = {number: signal.signal(number, handle) for number in _EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
