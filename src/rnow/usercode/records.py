"""What the supervisor keeps of a call, a worker and the zygote."""

from __future__ import annotations

import socket
from typing import Any

from rnow.usercode import frames


class Call:
    """One call. ``message`` is as rnow sent it and goes to the worker unchanged."""

    __slots__ = ("deadline", "dropped", "fault", "function", "id", "message", "timeout", "worker")

    def __init__(self, message: bytes) -> None:
        _, _, self.id, self.function, self.timeout = frames.HEADER.unpack_from(message)
        self.message = message
        self.worker: Worker | None = None
        self.deadline = 0.0
        self.fault: dict[str, Any] | None = None
        self.dropped = False


class Worker:
    """One worker. ``calls`` is what it was given and has not answered; a sync worker is at the first of them."""

    __slots__ = (
        *("back", "calls", "inbox", "is_async", "outbox"),
        *("pid", "reader", "ready", "started"),
    )

    def __init__(
        self,
        is_async: bool,
        inbox: socket.socket,
        back: socket.socket,
        outbox: socket.socket,
        max_answer: int,
    ) -> None:
        self.is_async = is_async
        self.inbox, self.back, self.outbox = inbox, back, outbox
        self.reader = frames.FrameReader(max_answer)
        self.calls: dict[int, Call] = {}
        self.pid = 0
        self.ready = False
        self.started = 0.0


class Zygote:
    """The importing child. ``ready`` once it has reported."""

    __slots__ = ("control", "pid", "reader", "ready", "said")

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self.reader = frames.FrameReader()
        self.ready = False
        self.said = False
