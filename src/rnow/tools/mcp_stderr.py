"""What the command of an MCP server says on stderr: small, and without secrets, as what other code of the user's prints."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from rnow.text.redact import Redactor
from rnow.usercode.log import OutputLog

_CHUNK = 64 * 1024
_TAIL_BYTES = 64 * 1024


class Stderr:
    """A pipe, and the thread that empties it: a command must never wait for us because it complained.

    Args:
        log: the file that keeps it; None keeps only its end, in memory.
        redact: takes the secrets out.
    """

    def __init__(self, log: Path | None, redact: Redactor) -> None:
        self._redact = redact
        self._log = None if log is None else OutputLog(log, redact)
        self._tail = bytearray()
        read, self._write = os.pipe()
        self._thread = threading.Thread(
            target=self._empty, args=(read,), name="rnow-mcp-stderr", daemon=True
        )
        self._thread.start()

    @property
    def path(self) -> Path:
        """What the command is started with, before ``started``."""
        return Path(f"/proc/{os.getpid()}/fd/{self._write}")

    def started(self) -> None:
        """The command has the pipe now, or was never started: it ends when nobody else holds it. Idempotent."""
        write, self._write = self._write, -1
        if write >= 0:
            os.close(write)

    def wait(self, seconds: float) -> None:
        """Until all was read of a command that has ended."""
        self._thread.join(seconds)

    def last_lines(self, lines: int = 20) -> list[str]:
        """The end of it."""
        text = bytes(self._tail).decode("utf-8", "replace")
        return self._redact(text).splitlines()[-lines:]

    def _empty(self, read: int) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(read, _CHUNK):
                self._tail += data
                del self._tail[:-_TAIL_BYTES]
                if self._log is not None:
                    self._log.write(data)
        os.close(read)
        if self._log is not None:
            self._log.close()
