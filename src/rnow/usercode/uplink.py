"""The supervisor's words to rnow, on stdout, without ever waiting for it to read them."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal

from rnow.usercode import frames

_CHUNK = 256 * 1024
_LOG_AHEAD = 256 * 1024  # bytes that may wait for rnow before output of the user's code is dropped
_LAST_WORDS = 2  # seconds


class Uplink:
    """Messages on their way to rnow. ``broken`` once nobody can read them any more."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._waiting = bytearray()
        self._registered = False
        self._output = -1
        self.broken = False
        os.set_blocking(1, False)

    def send(self, message: bytes) -> None:
        """Send with the next ``flush``."""
        self._waiting += message

    def open_output(self, wanted: bool) -> int:
        """What becomes stdout and stderr of the user's code: a pipe whose content goes to rnow, or nothing."""
        if not wanted:
            return os.open(os.devnull, os.O_WRONLY)
        self._output, write_end = os.pipe()
        os.set_blocking(self._output, False)
        self._selector.register(self._output, selectors.EVENT_READ, self._on_output)
        return write_end

    def close(self) -> None:
        """Send the last of it. The user's code has ended."""
        for _ in range(16 if self._output >= 0 else 0):
            self._on_output()
        os.set_blocking(1, True)
        signal.alarm(_LAST_WORDS)  # rnow may not be reading any more
        with contextlib.suppress(OSError):
            while self._waiting:
                del self._waiting[: os.write(1, self._waiting[:_CHUNK])]

    def _on_output(self) -> None:
        try:
            data = os.read(self._output, _CHUNK)
        except OSError:
            return
        if data and len(self._waiting) < _LOG_AHEAD:
            self.send(frames.pack(frames.LOG, body=data))

    def flush(self) -> None:
        """Send as much of it as rnow takes now."""
        while self._waiting:
            try:
                sent = os.write(1, self._waiting[:_CHUNK])
            except BlockingIOError:
                break
            except OSError:
                self.broken = True
                return
            del self._waiting[:sent]
        wanted = bool(self._waiting)
        if wanted and not self._registered:
            self._selector.register(1, selectors.EVENT_WRITE, self.flush)
        elif not wanted and self._registered:
            self._selector.unregister(1)
        self._registered = wanted
