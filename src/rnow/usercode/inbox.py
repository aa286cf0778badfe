"""A worker's inbox: a socket of whole messages, where a large one is carried by a memory file.

Not ``socket.send_fds`` and ``recv_fds``: Python 3.11 drops their flags, and they would block.
"""

from __future__ import annotations

import array
import os
import socket

from rnow.usercode.frames import HEADER

_MAX_INLINE = 32 * 1024


def make_inbox() -> tuple[socket.socket, socket.socket]:
    """The end for ``put``, and the end for ``take``: several processes may hold it, and each message is taken once."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def put(inbox: socket.socket, message: bytes) -> None:
    """Add a message without waiting. Raises OSError when the inbox is full (EAGAIN) or nobody holds the other end."""
    if len(message) <= _MAX_INLINE:
        inbox.send(message, socket.MSG_DONTWAIT)
        return
    file = os.memfd_create("call")
    try:
        view = memoryview(message)[HEADER.size :]
        while view:
            view = view[os.write(file, view) :]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
        inbox.sendmsg([message[: HEADER.size]], [rights], socket.MSG_DONTWAIT)
    finally:
        os.close(file)


def take(inbox: socket.socket, *, wait: bool) -> bytes:
    """The next message; b"" when the other end is closed. Raises BlockingIOError when there is none and not ``wait``."""
    message, ancillary, _, _ = inbox.recvmsg(
        _MAX_INLINE, socket.CMSG_SPACE(4), 0 if wait else socket.MSG_DONTWAIT
    )
    files = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    if not files:
        return message
    with os.fdopen(files[0], "rb") as file:
        file.seek(0)
        return message + file.read()
