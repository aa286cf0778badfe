"""When this process last got on: a token, a micro-batch, a reward, an answer of a tool or a server, a file on the disk.

One clock for the whole process, read by the watchdog (``training.watchdog``); so whoever gets on says so without being handed
anything.
"""

from __future__ import annotations

import time

_moved_at = time.monotonic()
_due_at = _moved_at


def moved(ahead: float = 0.0) -> None:
    """Something got on. Safe from any thread, and cheap enough for every token.

    Args:
        ahead: seconds that something which begins now may take by its own deadline: waiting so long is no standstill.
    """
    global _moved_at, _due_at
    _moved_at = time.monotonic()
    _due_at = max(_due_at, _moved_at + ahead)


def still() -> float:
    """Seconds since anything got on."""
    return time.monotonic() - _moved_at


def overdue() -> float:
    """The same, counted from the end of what has a deadline of its own; below 0 while that may be under way."""
    return time.monotonic() - _due_at
