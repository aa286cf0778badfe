"""Waiting that does not take a busy event loop for a slow tool."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")
_PART = 0.25


async def ended_within(task: asyncio.Task[T], seconds: float) -> bool:
    """Whether ``task`` ends within ``seconds`` of an event loop that is free to listen; else it is cancelled and left behind.

    While a model samples in the loop's own thread (on a CPU), nothing that a tool answers can be read, and a call may not even
    have been sent: however long that takes, it counts for a quarter of a second. Not ``wait_for``, which would wait for a task
    that does not let itself be cancelled. A caller that is cancelled cancels the task.
    """
    task.add_done_callback(look_at)
    left = max(seconds, 0.0)
    try:
        while True:
            part = min(left, _PART)
            done, _ = await asyncio.wait({task}, timeout=part)
            left -= part
            if done:
                return True
            if left <= 0:
                break
    except BaseException:
        task.cancel()
        raise
    task.cancel()
    return False


def look_at(task: asyncio.Task[T]) -> None:
    """Take note of how ``task`` ended, so that asyncio does not complain that nobody did."""
    if not task.cancelled():
        task.exception()
