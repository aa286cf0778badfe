"""Small things that asyncio lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_anywhere(work: Coroutine[object, object, T]) -> T:
    """``asyncio.run``, also from inside a running loop (a notebook): then in a thread with a loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


def first_cause(failures: BaseExceptionGroup) -> BaseException:
    """What went wrong first in a task group."""
    error = failures.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
