"""When the call of a reward or a tool that is running must have its answer."""

from __future__ import annotations

import math
import time
from contextvars import ContextVar

_due: ContextVar[float] = ContextVar("due", default=math.inf)


def answer_within(seconds: float) -> None:
    """The call that begins here is ended when it takes longer. Each task of an event loop has its own limit."""
    to_hand_it_in = min(seconds / 4, max(1.0, seconds / 20))
    _due.set(time.monotonic() + seconds - to_hand_it_in)


def answer_by() -> float:
    """When (``time.monotonic()``) the running call should know what it answers, so as not to be ended; infinity outside of one."""
    return _due.get()
