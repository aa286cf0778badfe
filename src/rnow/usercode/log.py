"""The file that holds what the user's code prints: small, and without secrets."""

from __future__ import annotations

import codecs
import contextlib
import os
from pathlib import Path

from rnow.text.redact import Redactor

LIMIT = 1 << 20
"""Bytes of a log file. The rest is dropped; a full one is begun anew by the next host."""

_FULL = "\n... this log is full, the rest is left out ...\n"


class OutputLog:
    """Appends text to ``path``. A problem with the file ends the logging, nothing else.

    ``waiting`` is what is kept back until more comes, or ``flush``.
    """

    def __init__(self, path: Path, redact: Redactor) -> None:
        self._path = path
        self._redact = redact
        # A secret may arrive in two pieces: so much of the end waits for what follows.
        self._overlap = max(redact.longest - 1, 0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.waiting = ""
        self._file: int | None = None
        self._size = 0
        self._done = False

    def write(self, data: bytes) -> None:
        """Take what was printed; the last few characters are kept back until more comes, or ``flush``."""
        if self._done:
            return
        self.waiting = self._redact(self.waiting + self._decoder.decode(data))
        cut = len(self.waiting) - self._overlap
        if cut > 0:
            self._append(self.waiting[:cut])
            self.waiting = self.waiting[cut:]

    def flush(self) -> None:
        """Write what was kept back."""
        if self.waiting and not self._done:
            self._append(self.waiting)
        self.waiting = ""

    def close(self) -> None:
        """Flush and close the file; a later write opens it again."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, text: str) -> None:
        try:
            if self._file is None:
                self._open()
            raw = text.encode("utf-8", "replace")
            room = LIMIT - self._size
            if len(raw) > room:
                raw = raw[: max(0, room)] + _FULL.encode()
                self._done = True
            self._size += len(raw)
            if self._file is not None:
                os.write(self._file, raw)
        except OSError:
            self._done = True

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size >= LIMIT:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
            self._size = 0
