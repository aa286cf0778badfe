"""What the supervisor is told and keeps: its settings, calls, workers and the zygote."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

from rnow.core.tool_schema import Schema
from rnow.usercode import frames

Fault = Mapping[str, object]
"""Why there is no result, as JSON. Of a call: ``fault`` and what belongs to it; of an import: ``kind`` or ``type``."""


class Settings(TypedDict):
    """What a host is started with, as JSON. ``memory`` is in bytes, the rest as in ``HostLimits`` and ``CodeHost``; ``names``
    are empty until the file has been imported."""

    file: str
    kind: str
    env: dict[str, str]
    secrets: dict[str, str]
    sys_path: list[str]
    import_timeout: float
    memory: int | None
    processes: int
    workers: int
    log: bool
    warm: bool
    names: list[str]


class FunctionReport(TypedDict):
    """A function as ``FunctionInfo`` has it."""

    name: str
    place: str
    description: str
    is_async: bool
    timeout: float | None
    sandbox: bool
    parameters: NotRequired[Schema]
    precondition: NotRequired[bool]


class MistakeReport(TypedDict):
    """What is wrong with a function, where, and what to do."""

    message: str
    place: str
    fix: str
    why: NotRequired[str]


class Report(TypedDict):
    """What is in a file; ``forks``: the process that imported it may be copied."""

    functions: list[FunctionReport]
    mistakes: list[MistakeReport]
    forks: NotRequired[bool]


class Call:
    """One call. ``message`` is as rnow sent it and goes to the worker unchanged. ``due`` is when its time is over, or, once
    it was ``told`` to end, when it must have answered. Nobody waits for one that was ``dropped``."""

    __slots__ = (
        *("dropped", "due", "fault", "function", "id"),
        *("is_async", "message", "timeout", "told", "worker"),
    )

    def __init__(self, message: bytes) -> None:
        _, _, self.id, self.function, self.timeout = frames.HEADER.unpack_from(message)
        self.message = message
        self.is_async = False
        self.worker: Worker | None = None
        self.due = math.inf
        self.fault: Fault | None = None
        self.told = False
        self.dropped = False


@dataclass(slots=True, eq=False, kw_only=True)
class Worker:
    """One worker. ``calls`` is what it was given and has not answered; ``due`` is when it must be ready."""

    is_async: bool
    most_calls: int
    inbox: socket.socket
    back: socket.socket
    outbox: socket.socket
    reader: frames.FrameReader
    calls: dict[int, Call] = field(default_factory=dict)
    pid: int = 0
    ready: bool = False
    due: float = math.inf

    def is_free(self) -> bool:
        """Whether it can be given another call."""
        return self.ready and len(self.calls) < self.most_calls


@dataclass(slots=True, eq=False)
class Zygote:
    """The importing child. ``due`` is when it must have reported; ``ready`` once it can be copied."""

    pid: int
    control: socket.socket
    due: float
    reader: frames.FrameReader = field(default_factory=frames.FrameReader)
    ready: bool = False
