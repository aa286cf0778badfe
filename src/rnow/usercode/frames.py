"""The messages between rnow, the supervisor and its workers: a fixed header, then a body (JSON, text or nothing).

One stream carries them, so that the same words work through a socket, ``docker run -i`` and bubblewrap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct(">IBQHd")
"""Bytes of the body, kind, id of the call, number of the function, seconds (a call: its time limit)."""

START, CALL, CANCEL, PING = 1, 2, 3, 4
READY, FAULT, RESULT, LOG, PONG = 10, 11, 12, 13, 14
# Of workers only. It runs (body: its problem, if any); it told a call to end; too many of those calls have not ended.
HELLO, ACK, WORN = 20, 21, 22

MAX_BODY = 64 << 20
"""Bytes. What claims to be larger is no message."""

Frame = tuple[int, int, int, float, bytes]
"""(kind, call, function, seconds, body)."""


RESULT_BYTES = 256 * 1024
"""Bytes of a tool's text."""

MAX_ANSWER = 6 * RESULT_BYTES + (4 << 20)
"""Bytes that the body of an answer may have: JSON writes a byte as up to six, and tracebacks and schemas need room."""


class BadFrame(Exception):
    """The stream holds something that is not a message."""


def pack(
    kind: int, *, call: int = 0, function: int = 0, seconds: float = 0.0, body: bytes = b""
) -> bytes:
    """One message as bytes."""
    return HEADER.pack(len(body), kind, call, function, seconds) + body


def unpack(message: bytes) -> Frame:
    """The one message that ``message`` is."""
    _, kind, call, function, seconds = HEADER.unpack_from(message)
    return kind, call, function, seconds, message[HEADER.size :]


class FrameReader:
    """Cuts a stream into messages. ``max_body``: bytes above which a message is refused."""

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self._buffer = bytearray()
        self._max_body = max_body

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that ``data`` completes, as they came.

        Raises BadFrame.
        """
        self._buffer += data
        start, held = 0, len(self._buffer)
        try:
            while held - start >= HEADER.size:
                size = HEADER.unpack_from(self._buffer, start)[0]
                if size > self._max_body:
                    raise BadFrame(f"a message of {size} bytes")
                end = start + HEADER.size + size
                if held < end:
                    break
                yield bytes(self._buffer[start:end])
                start = end
        finally:
            del self._buffer[:start]
