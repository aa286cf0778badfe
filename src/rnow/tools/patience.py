"""Waiting that does not take a busy event loop for a slow tool."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")
_PART = 0.25


async def done_within(task: asyncio.Future[T], seconds: float) -> bool:
    """Whether ``task`` ends within ``seconds`` of an event loop that is free to listen.

    While a model samples in the loop's own thread (on a CPU), nothing that a tool answers can be read, and a call may not even
    have been sent: however long that takes, it counts for a quarter of a second. ``task`` is never cancelled.
    """
    left = max(seconds, 0.0)
    while True:
        part = min(left, _PART)
        done, _ = await asyncio.wait({task}, timeout=part)
        left -= part
        if done or left <= 0:
            return bool(done)
